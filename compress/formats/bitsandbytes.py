"""bitsandbytes: NF4 and FP4 in blocks, and int8 in rows (LLM.int8()), whose layers round their inputs to int8, too."""

import sys
from typing import Any

import torch
from torch import nn

from longshadow.compress.formats.origin import comes_from
from longshadow.compress.formats.probe import probed_weight


def name_of(layer: nn.Module) -> str | None:
    """ "bitsandbytes NF4", "bitsandbytes FP4" or "bitsandbytes int8"."""
    weight: Any = getattr(layer, "weight", None)
    if not comes_from(weight, "bitsandbytes"):
        return None
    return f"bitsandbytes {weight.quant_type.upper() if _has_blocks(weight) else 'int8'}"


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32, after the rounding to the dtype that it was quantised from.

    Raises ValueError for a layer of 4 bits that was not moved to a device yet, which is when it is quantised.
    """
    weight: Any = layer.weight
    functional = sys.modules["bitsandbytes"].functional
    if not _has_blocks(weight):
        return _of_rows(layer, functional)
    if weight.quant_state is None:
        raise ValueError(f"{type(layer).__name__} is not quantised yet: move it to a device first")
    # On CPUs with AVX512-BF16 the first run packs the weight anew, for a kernel that takes scales in bf16.
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        return probed_weight(layer)
    return torch.as_tensor(functional.dequantize_4bit(weight.data, weight.quant_state)).float()


def _of_rows(layer: Any, functional: Any) -> torch.Tensor:
    weight = layer.weight
    if weight.dtype == torch.int8:
        # The layer's state takes over the scales when it first runs.
        codes, scales = weight.data, layer.state.SCB if weight.SCB is None else weight.SCB
    else:  # `has_fp16_weights`: a full weight, which is rounded in each run
        codes, scales, _ = functional.int8_vectorwise_quant(weight.data.half())
    return torch.as_tensor(functional.int8_vectorwise_dequant(codes, scales)).float()


def _has_blocks(weight: Any) -> bool:
    """NF4 and FP4."""
    return hasattr(weight, "quant_type")
