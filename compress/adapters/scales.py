"""PEFT's rule for what a layer's B A is multiplied by: alpha / r, with patterns that give layers their own."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from longshadow.compress.solver import Factors

# PEFT's values where a configuration leaves them out.
DEFAULT_RANK = DEFAULT_ALPHA = 8


def layer_rank(config: Mapping[str, Any], name: str) -> int:
    """The rank that a configuration gives to the module of this name."""
    return int(_of_layer(config, "rank_pattern", name, _number(config, "r", DEFAULT_RANK)))


def layer_scale(config: Mapping[str, Any], name: str) -> float:
    """alpha / r, or alpha / sqrt(r) with `use_rslora`, of the module of this name."""
    rank = layer_rank(config, name)
    alpha = _of_layer(config, "alpha_pattern", name, _number(config, "lora_alpha", DEFAULT_ALPHA))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def folded(factors: Factors, scale: float, dtype: torch.dtype) -> Factors:
    """s B and A in `dtype`, which need no scale any more.

    Exact where `dtype` holds the factors and s is a power of two; otherwise B is rounded once. Raises ValueError
    where a factor is not finite in `dtype`.
    """
    cast = Factors(lora_b=(factors.lora_b.double() * scale).to(dtype), lora_a=factors.lora_a.to(dtype))
    if not (cast.lora_b.isfinite().all() and cast.lora_a.isfinite().all()):
        raise ValueError(f"a factor does not fit the range of {str(dtype).removeprefix('torch.')}: choose float32")
    return cast


def _number(config: Mapping[str, Any], field: str, default: int) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or (field == "r" and value < 1):
        raise ValueError(f"the adapter's configuration has {field} = {value!r}, which is no such number")
    return value


def _of_layer(config: Mapping[str, Any], field: str, name: str, default: float) -> float:
    """A pattern counts for a module whose name it matches, whole or after a dot; the first that does wins."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"the adapter's configuration has a {field} that is no mapping")
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return _number(patterns, pattern, 0)
        except re.error as error:
            raise ValueError(f"{field} has {pattern!r}, which is no regular expression ({error})") from error
    return default
