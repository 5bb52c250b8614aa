"""Documents on disk: safetensors, with a header that is compared, shapes included, before anything is allocated.

A file may come from anywhere. The container is checked by safetensors, the header by `document_header`, names, shapes
and indices of the tensors by `document_layout`, and a checksum covers the contents.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.document_header import FORMAT, FORMAT_VERSION, METADATA_KEY, Header, read_header
from longshadow.engine.runtime.document_layout import check_contents, check_tensors, expected_tensors
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.durable import written_whole
from longshadow.engine.runtime.errors import DocumentError
from longshadow.engine.runtime.state import SHARED_BY_ALL, SequenceState
from longshadow.engine.runtime.windows import WindowSequence
from longshadow.engine.shadowkv.sequence import Sequence


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
    try:
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"cannot write {path}: {reason}") from error


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
            header = read_header(file.metadata(), requirements, max_tokens)
            expected = expected_tensors(header, accounting, dtype)
            check_tensors(file, expected)
            reserve(header)
            # Copies: what safe_open returns may be the file itself, which others can change.
            tensors = {name: file.get_tensor(name).clone() for name in expected}
        if checksum(tensors) != header.checksum:
            raise DocumentError("it is damaged, its checksum differs")
        check_contents(tensors, header, accounting)
    except DocumentError as error:
        raise DocumentError(f"cannot load {path}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise DocumentError(f"cannot load {path}: it is damaged or no document ({error})") from error
    return header, tensors
