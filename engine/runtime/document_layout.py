"""The tensors of a document's file: their names, dtypes and shapes, known from its header before any is read.

Legend: H KV heads, n tokens of a segment, c chunk size, C = n / c chunks, D head_dim, r rank, p exact chunks per head.
"""

from typing import Any

import torch

from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.document_header import Header
from longshadow.engine.runtime.errors import DocumentError
from longshadow.engine.runtime.shapes import LayerShape
from longshadow.engine.shadowkv.storage import ROW_DTYPES, RowDtype

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}

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


def check_tensors(file: Any, expected: Expected) -> None:
    """Raises DocumentError unless an open safetensors file holds exactly these."""
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


def check_contents(tensors: dict[str, torch.Tensor], header: Header, accounting: Accounting) -> None:
    """Raises DocumentError unless numbers are numbers, and indices of chunks ascend within the segment."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point:
            # The ends tell of every number, without a second tensor of the size of the document.
            is_sound = tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.float().aminmax())
        elif name.split(".")[2] == "exact chunks":
            num_chunks = header.segments[int(name.split(".")[1])] // accounting.config.chunk_size
            is_sound = bool(((tensor >= 0) & (tensor < num_chunks)).all() and (tensor.diff(dim=1) > 0).all())
        else:
            is_sound = True
        if not is_sound:
            raise DocumentError(f"tensor {name} holds impossible numbers")
