"""The record of one benchmark run: what was measured, where, on which code, and whether it was correct."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The correctness check of a run. `max_error` is in the units that `text` names; None where nothing is compared."""

    passed: bool
    max_error: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Revision:
    """The code a record was measured on. `branch` is None when the commit was given by hand."""

    commit: str
    branch: str | None
    dirty: bool


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one table. Written once, never edited.

    Times are seconds, sizes bytes and rates units per second throughout; rendering chooses the scale.
    """

    table: str
    device: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    check: Check
    environment: Mapping[str, Any]
    revision: Revision
    command: str
    seed: int
    quick: bool
    created_at: str
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def is_publishable(self) -> bool:
        """True for a complete run of committed code whose check is green."""
        return self.check.passed and not self.quick and not self.revision.dirty

    @property
    def file_name(self) -> str:
        """`<date>-<commit>.json`: a name that sorts by date and says which code it is about."""
        return f"{self.created_at[:10]}-{self.revision.commit[:10]}.json"

    def path(self, results: Path) -> Path:
        """Where the record belongs below `results`: tracked when publishable, in `scratch/` otherwise."""
        root = results if self.is_publishable else results / "scratch"
        return root / self.table / self.device / self.file_name

    def to_json(self) -> str:
        """The record as indented JSON. Raises ValueError for NaN or infinity, which JSON cannot hold."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Record:
        """Inverse of `to_json`. Raises ValueError for text that is no record of this schema."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"not a benchmark record of schema {SCHEMA_VERSION}")
        check, revision = Check(**data.pop("check")), Revision(**data.pop("revision"))
        return Record(check=check, revision=revision, **data)

    def write(self, path: Path) -> None:
        """Writes the record to `path`, whose folders are made as needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")


def read_records(results: Path) -> list[Record]:
    """Every tracked record below `results`, oldest first; scratch is left out."""
    paths = [path for path in results.glob("*/*/*.json") if path.parts[len(results.parts)] != "scratch"]
    records = [Record.from_json(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(records, key=lambda record: record.created_at)


def newest_records(records: Sequence[Record]) -> list[Record]:
    """The newest record of each table and device, so that no rendered table mixes two runs."""
    newest = {(record.table, record.device): record for record in sorted(records, key=lambda r: r.created_at)}
    return [newest[key] for key in sorted(newest)]
