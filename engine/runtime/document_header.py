"""The header of a document's file: what it says, and whether it was made for this engine.

Every field is checked: a file may come from anywhere.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from longshadow.engine.runtime.errors import DocumentError
from longshadow.engine.runtime.shapes import Start

FORMAT = "longshadow document"
FORMAT_VERSION = 1
METADATA_KEY = "longshadow"
LONGEST_HEADER = 1 << 24
LONGEST_NAME = 1000


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its document, apart from the engine's requirements.

    Attributes:
        segments: tokens of each segment; `tail`: exact tokens after them.
        ranks, energies: of each full-attention layer, for each segment.
    """

    id: str
    name: str | None
    segments: tuple[int, ...]
    tail: int
    ranks: tuple[tuple[int, ...], ...]
    energies: tuple[tuple[float, ...], ...]
    checksum: int

    @property
    def start(self) -> Start:
        """What the sequence is."""
        return Start(segments=self.segments, tail=self.tail)


def read_header(metadata: dict[str, str] | None, requirements: dict[str, Any], max_tokens: int) -> Header:
    """The header in a file's metadata. Raises DocumentError for one that this engine would not have written."""
    text = (metadata or {}).get(METADATA_KEY, "")
    if not text or len(text) > LONGEST_HEADER:
        raise DocumentError("it is no document of longshadow")
    try:
        fields = json.loads(text, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise DocumentError("its header is damaged") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DocumentError("it is no document of longshadow")
    if fields.get("version") != FORMAT_VERSION:
        raise DocumentError(f"its format is version {fields.get('version')!r}, not {FORMAT_VERSION}")
    for key, ours in requirements.items():
        # As JSON has it: tuples are lists there.
        if json.dumps(fields.get(key), sort_keys=True) != json.dumps(ours, sort_keys=True):
            raise DocumentError(f"it was made with another {_difference(key, fields.get(key), ours)}")
    return _checked_header(fields, sum(layer["window"] is None for layer in requirements["layers"]), max_tokens)


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _difference(key: str, theirs: object, ours: object) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in ours:
            if theirs.get(name) != ours[name]:
                return f"{key} setting: {name} is {theirs.get(name)!r:.80}, here {ours[name]!r:.80}"
    return f"{key}: {theirs!r:.80}, here {ours!r:.80}"


def _checked_header(fields: dict[str, Any], num_full: int, max_tokens: int) -> Header:
    def is_count(value: object, least: int = 0) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= max_tokens

    def rows_of(value: object, length: int) -> bool:
        return (
            isinstance(value, list)
            and len(value) == num_full
            and all(isinstance(row, list) and len(row) == length for row in value)
        )

    def is_text(value: object) -> bool:
        if not isinstance(value, str) or len(value) > LONGEST_NAME:
            return False
        # Half a surrogate pair could not be sent to anyone.
        return value.encode(errors="ignore").decode() == value

    keys = ("segments", "ranks", "energies", "id", "name", "checksum")
    found: list[Any] = [fields.get(key) for key in keys]
    segments, ranks, energies, identity, name, check = found
    is_sound = (
        isinstance(segments, list)
        and all(is_count(count, 1) for count in segments)
        and is_count(fields.get("tail"))
        and 1 <= sum(segments) + fields["tail"] <= max_tokens
        and rows_of(ranks, len(segments))
        and all(isinstance(rank, int) and not isinstance(rank, bool) for row in ranks or () for rank in row)
        and rows_of(energies, len(segments))
        and all(isinstance(share, float | int) and math.isfinite(share) for row in energies or () for share in row)
        and is_text(identity)
        and identity
        and (name is None or is_text(name))
        and isinstance(check, int)
    )
    if not is_sound:
        raise DocumentError(f"its header is damaged, or it has more than {max_tokens:,} tokens")
    return Header(
        id=identity,
        name=name,
        segments=tuple(segments),
        tail=fields["tail"],
        ranks=tuple(tuple(row) for row in ranks),
        energies=tuple(tuple(float(share) for share in row) for row in energies),
        checksum=check,
    )
