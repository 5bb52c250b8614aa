"""`append_tokens` in Triton: one program per head and sequence."""

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.triton_functions import (
    NUM_REGION_FIELDS,
    REGION_KEY_HEAD_STRIDE,
    REGION_KEYS,
    REGION_LENGTH,
    REGION_VALUE_HEAD_STRIDE,
    REGION_VALUES,
)


@triton.jit
def _copy(source, address, stride, head, token, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Copies one head's vector to a token's place in a tail."""
    element = tl.arange(0, BLOCK)
    inside = element < HEAD_DIM
    target = tl.multiple_of(address.to(tl.pointer_type(source.dtype.element_ty)), 16)
    target += head * stride + token * HEAD_DIM
    tl.store(target + element, tl.load(source + element, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["num_regions"])
def append_tokens_kernel(
    keys,
    values,
    tail_tokens,
    regions,
    num_regions,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: heads, sequences."""
    head = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    row = sequence * tl.num_programs(0) + head
    tail = regions + (sequence * num_regions + num_regions - 1) * NUM_REGION_FIELDS
    length = tl.load(tail_tokens + sequence).to(tl.int64)
    # No program reads the length that another writes.
    if head == 0:
        tl.store(tail + REGION_LENGTH, length)
    if length > 0:
        token = length - 1
        stride = tl.load(tail + REGION_KEY_HEAD_STRIDE)
        _copy(keys + row * KEY_DIM, tl.load(tail + REGION_KEYS), stride, head, token, KEY_DIM, BLOCK)
        stride = tl.load(tail + REGION_VALUE_HEAD_STRIDE)
        _copy(values + row * VALUE_DIM, tl.load(tail + REGION_VALUES), stride, head, token, VALUE_DIM, BLOCK)


def append_tokens(keys: torch.Tensor, values: torch.Tensor, tail_tokens: torch.Tensor, regions: torch.Tensor) -> None:
    """See the package."""
    batch_size, num_heads, key_dim = keys.shape
    value_dim = values.shape[2]
    append_tokens_kernel[num_heads, batch_size](
        keys,
        values,
        tail_tokens,
        regions,
        regions.shape[1],
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK=triton.next_power_of_2(max(key_dim, value_dim)),
        num_warps=1,
    )


def _configuration(dtype: str, key_dim: int, value_dim: int) -> Configuration:
    return Configuration(
        name=f"{dtype} {key_dim} {value_dim}",
        kernel=append_tokens_kernel,
        signature={
            "keys": f"*{dtype}",
            "values": f"*{dtype}",
            "tail_tokens": "*i32",
            "regions": "*i64",
            "num_regions": "i32",
        },
        constexprs={
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "BLOCK": triton.next_power_of_2(max(key_dim, value_dim)),
        },
        num_warps=1,
        num_stages=1,
    )


CONFIGURATIONS = [
    _configuration("bf16", 128, 128),
    _configuration("fp16", 128, 128),
    _configuration("bf16", 32, 32),
    _configuration("bf16", 256, 256),
    _configuration("bf16", 192, 128),
]
