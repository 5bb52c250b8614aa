"""Reads the longest sequence of a model: one rule for `plan`, `serve`, `LLM` and `generate`, from its configuration.

It reads a plain mapping, a config.json or a transformers configuration's `to_dict`, and imports nothing.
"""

from collections.abc import Mapping
from typing import Any

# Kinds of RoPE whose angles depend on the longest sequence of a batch, beyond as many positions as this says.
LENGTH_DEPENDENT_ROPE = {
    "dynamic": "max_position_embeddings",
    "longrope": "original_max_position_embeddings",
    "su": "original_max_position_embeddings",  # longrope's first name
}


def rope_parameters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary parameters, one mapping per kind of layer that has its own."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def rope_kind(rope: Mapping[str, Any]) -> str:
    """The name of a RoPE, "default" without one."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Longest sequence in tokens, rotary scaling included; None without a limit.

    Beyond some length dynamic NTK and LongRoPE turn all keys by other angles. Sequences of all lengths share a batch
    and a cache, so that length is the limit.
    """
    config = {**config, **(config.get("text_config") or {})}
    limit: int | None = config.get("max_position_embeddings")
    for rope in rope_parameters(config):
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if limit is not None and original and factor:
            limit = max(limit, int(original * factor))
    for rope in rope_parameters(config):
        name = LENGTH_DEPENDENT_ROPE.get(rope_kind(rope))
        if name is not None:
            fixed = rope.get(name) or config.get(name) or config.get("max_position_embeddings")
            limit = min((length for length in (limit, fixed) if length is not None), default=None)
    return limit
