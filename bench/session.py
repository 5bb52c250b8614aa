"""What a running table is given: its device and seed, a progress line, and finished units of an earlier run."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any


class UnitStore:
    """Finished units of work of one table, kept in a JSON-lines file so that an interrupted run can go on.

    A unit is found again only under the same configuration and the same sources, both part of `key`.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._units: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = _read_entry(line)
                if entry is not None and entry["key"] == key:
                    self._units[entry["unit"]] = entry["value"]

    def _is_of_another(self, line: str) -> bool:
        entry = _read_entry(line)
        return entry is not None and entry["key"] != self.key

    def get(self, unit: str) -> Any | None:
        """The value stored for `unit`, or None."""
        return self._units.get(unit)

    def put(self, unit: str, value: Any) -> None:
        """Appends `value`, which must be JSON, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lone newline first closes the half line that an interrupted write may have left.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": self.key, "unit": unit, "value": value}))
        self._units[unit] = value

    def clear(self) -> None:
        """Forgets the units of this key, once a run has finished; those of other runs stay."""
        self._units.clear()
        if not self.path.exists():
            return
        others = [line for line in self.path.read_text(encoding="utf-8").splitlines() if self._is_of_another(line)]
        if others:
            self.path.write_text("\n".join(others), encoding="utf-8")
        else:
            self.path.unlink()


def _read_entry(line: str) -> dict[str, Any] | None:
    # An interrupted write leaves half a last line; its unit is measured again.
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    assert isinstance(entry, dict)
    return entry


def unit_key(config: dict[str, Any], sources: str, device: str) -> str:
    """The key under which units are comparable: configuration, sources and device."""
    text = json.dumps({"config": config, "sources": sources, "device": device}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Session:
    """The circumstances of one run. `device` is a torch device name."""

    device: str = "cpu"
    seed: int = 0
    store: UnitStore | None = None
    stream: IO[str] = field(default_factory=lambda: sys.stderr)
    _started: float = field(default_factory=time.perf_counter)

    def progress(self, text: str) -> None:
        """Shows what is being done: over itself on a terminal, line by line elsewhere."""
        elapsed = time.perf_counter() - self._started
        line = f"[{elapsed:6.0f} s] {text}"
        if self.stream.isatty():
            self.stream.write(f"\r\033[K{line}")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def finish_progress(self) -> None:
        """Ends the progress line."""
        if self.stream.isatty():
            self.stream.write("\n")

    def unit(self, name: str, measure: Callable[[], Any]) -> Any:
        """The stored value of the unit `name`, or `measure()`, which is then stored."""
        stored = self.store.get(name) if self.store else None
        if stored is not None:
            return stored
        value = measure()
        if self.store:
            self.store.put(name, value)
        return value
