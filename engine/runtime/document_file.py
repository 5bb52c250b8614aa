"""Documents on disk: safetensors, with a header that is compared, shapes included, before anything is allocated.

A file may come from anywhere. The container is checked by safetensors, the header here; every tensor must be the one
that this engine would have made, its indices must point into the document, and a checksum covers the contents.

Legend: H KV heads, n tokens of a segment, c chunk size, C = n / c chunks, D head_dim, r rank, p exact chunks per head.
"""

import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.errors import DocumentError
from longshadow.engine.runtime.shapes import LayerShape, Start
from longshadow.engine.runtime.state import SHARED_BY_ALL, SequenceState
from longshadow.engine.runtime.windows import WindowSequence
from longshadow.engine.shadowkv.sequence import Sequence
from longshadow.engine.shadowkv.storage import ROW_DTYPES, RowDtype

FORMAT = "longshadow document"
FORMAT_VERSION = 1
METADATA_KEY = "longshadow"
LONGEST_HEADER = 1 << 24
LONGEST_NAME = 1000
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}


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


def write_document(document: Document, path: Path, requirements: dict[str, Any]) -> None:
    """Writes beside the target and moves it there once it is on the disk. Raises DocumentError."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in named_tensors(document.state)}
    full = [layer for layer in document.state.layers if isinstance(layer, Sequence)]
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **requirements,
        "id": document.id,
        "name": document.name,
        "segments": list(document.state.start.segments),
        "tail": document.state.start.tail,
        "ranks": [[getattr(segment.keys, "rank", 0) for segment in layer.segments] for layer in full],
        "energies": [[segment.energy_kept for segment in layer.segments] for layer in full],
        "checksum": checksum(tensors),
    }
    with _writing(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[str]:
    """A name beside `path` that takes its place if all goes well, and vanishes otherwise."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise DocumentError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise DocumentError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def named_tensors(state: SequenceState) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a document under the name it has in a file."""
    for index, layer in enumerate(state.layers):
        if isinstance(layer, WindowSequence):
            for keys, values in layer.recent():
                yield f"{index}.window.0", keys
                yield f"{index}.window.1", values
            continue
        for place, segment in enumerate(layer.segments):
            for part, tensors in segment.tensors().items():
                if part != SHARED_BY_ALL:
                    yield from ((f"{index}.{place}.{part}.{number}", held) for number, held in enumerate(tensors))
        if layer.tail.num_tokens:
            yield f"{index}.tail.0", layer.tail.keys
            yield f"{index}.tail.1", layer.tail.values
        yield from ((f"{index}.energy.0", held) for held in layer.query_energy.tensors)


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 of the tensors' bytes in the order of their names."""
    result = 0
    for name in sorted(tensors):
        result = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, result)
    return result


def read_document(
    path: Path,
    requirements: dict[str, Any],
    accounting: Accounting,
    dtype: torch.dtype,
    max_tokens: int,
    reserve: Callable[[Header], None],
) -> tuple[Header, dict[str, torch.Tensor]]:
    """A document's header and tensors. `reserve` is called between the checks and the first allocation.

    Raises DocumentError, in one line, for a file that this engine would not have written.
    """
    try:
        if not path.is_file():
            raise DocumentError(f"there is no file {path}")
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata(), requirements, len(accounting.layers), max_tokens)
            expected = expected_tensors(header, accounting, dtype)
            _check_tensors(file, expected)
            reserve(header)
            # Copies: what safe_open returns may be the file itself, which others can change.
            tensors = {name: file.get_tensor(name).clone() for name in expected}
    except DocumentError as error:
        raise DocumentError(f"cannot load {path}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise DocumentError(f"cannot load {path}: it is damaged or no document ({error})") from error
    if checksum(tensors) != header.checksum:
        raise DocumentError(f"cannot load {path}: it is damaged, its checksum differs")
    _check_contents(path, tensors, header, accounting)
    return header, tensors


def _header(metadata: dict[str, str] | None, requirements: dict[str, Any], num_layers: int, max_tokens: int) -> Header:
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
        and isinstance(identity, str)
        and 0 < len(identity) <= LONGEST_NAME
        and (name is None or (isinstance(name, str) and len(name) <= LONGEST_NAME))
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


Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def expected_tensors(header: Header, accounting: Accounting, dtype: torch.dtype) -> Expected:
    """dtype and shape of every tensor of a document with this header. Raises DocumentError for an impossible one."""
    expected: Expected = {}
    ranks = iter(header.ranks)
    for index, layer in enumerate(accounting.layers):
        if layer.window is not None:
            num_kept = min(layer.window, header.start.num_tokens)
            expected |= _pair(f"{index}.window", layer, num_kept, dtype)
            continue
        first = 0
        for place, (num_tokens, rank) in enumerate(zip(header.segments, next(ranks), strict=True)):
            if num_tokens % accounting.config.chunk_size:
                raise DocumentError("its header is damaged: a segment has half a chunk")
            prefix = f"{index}.{place}"
            expected |= _segment_tensors(prefix, layer, accounting, num_tokens, rank, first, dtype)
            first = first or num_tokens
        if header.tail:
            expected |= _pair(f"{index}.tail", layer, header.tail, dtype)
        if accounting.config.query_weighted:
            expected[f"{index}.energy.0"] = (torch.float32, (layer.num_kv_heads, layer.key_dim))
    return expected


def _pair(prefix: str, layer: LayerShape, num_tokens: int, dtype: torch.dtype) -> Expected:
    return {
        f"{prefix}.0": (dtype, (layer.num_kv_heads, num_tokens, layer.key_dim)),
        f"{prefix}.1": (dtype, (layer.num_kv_heads, num_tokens, layer.value_dim)),
    }


def _segment_tensors(
    prefix: str,
    layer: LayerShape,
    accounting: Accounting,
    num_tokens: int,
    rank: int,
    first: int,
    dtype: torch.dtype,
) -> Expected:
    config, heads = accounting.config, layer.num_kv_heads
    chunk, num_chunks = config.chunk_size, num_tokens // config.chunk_size
    num_exact = accounting.sizes.num_exact_chunks(num_tokens, first)
    values, factors = config.value_dtype, config.factor_dtype
    expected: Expected = {
        f"{prefix}.exact chunks.0": (torch.int64, (heads, num_exact)),
        f"{prefix}.exact chunks.1": (dtype, (heads, num_exact * chunk, layer.key_dim)),
        f"{prefix}.exact chunks.2": (dtype, (heads, num_exact * chunk, layer.value_dim)),
        **_rows(f"{prefix}.landmarks", (heads, num_chunks, layer.key_dim), dtype, packed=factors),
        **_rows(f"{prefix}.values", (heads * num_chunks, chunk, layer.value_dim), dtype, packed=values),
    }
    if config.key_store == "exact":
        return expected | _rows(f"{prefix}.keys", (heads * num_chunks, chunk, layer.key_dim), dtype, packed=values)
    allowed = accounting.sizes.rank(layer, num_tokens, first)
    if not (1 <= rank <= allowed if config.rank_energy is not None else rank == allowed):
        raise DocumentError(f"its header is damaged: rank {rank}")
    return expected | {
        **_rows(f"{prefix}.factors", (num_chunks, chunk, rank), dtype, packed=factors),
        f"{prefix}.basis.0": (dtype, (heads, rank, layer.key_dim)),
        f"{prefix}.basis.1": (dtype, (heads, 1, layer.key_dim)),
    }


def _rows(name: str, shape: tuple[int, int, int], dtype: torch.dtype, *, packed: RowDtype | None) -> Expected:
    """A `RowStore`."""
    if packed is None:
        return {f"{name}.0": (dtype, shape)}
    return {f"{name}.0": (ROW_DTYPES[packed][0], shape), f"{name}.1": (torch.float32, shape[:2])}


def _check_tensors(file: Any, expected: Expected) -> None:
    names = set(file.keys())
    if names != set(expected):
        example = sorted(names ^ set(expected))[0]
        raise DocumentError(f"its tensors are not those of its header, for example {example!r:.80}")
    for name, (dtype, shape) in expected.items():
        found = file.get_slice(name)
        if found.get_dtype() != DTYPE_NAMES[dtype] or tuple(found.get_shape()) != shape:
            raise DocumentError(
                f"tensor {name} is {found.get_dtype()} {list(found.get_shape())!r:.80}, not "
                f"{DTYPE_NAMES[dtype]} {list(shape)}"
            )


def _check_contents(path: Path, tensors: dict[str, torch.Tensor], header: Header, accounting: Accounting) -> None:
    """Numbers are numbers, and indices of chunks ascend within the segment."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point:
            is_sound = bool(tensor.float().isfinite().all())
        elif name.split(".")[2] == "exact chunks":
            num_chunks = header.segments[int(name.split(".")[1])] // accounting.config.chunk_size
            is_sound = bool(((tensor >= 0) & (tensor < num_chunks)).all() and (tensor.diff(dim=1) > 0).all())
        else:
            is_sound = True
        if not is_sound:
            raise DocumentError(f"cannot load {path}: tensor {name} holds impossible numbers")
