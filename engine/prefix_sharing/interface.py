"""The hand-off to transformers' attention: layers that are given a tree attend to it, others as they always did."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longshadow.engine.prefix_sharing.attention import choose_attention
from longshadow.engine.prefix_sharing.tree import PrefixTree

PREFIX = "longshadow_prefix_sharing_"
# The keyword that carries a SharedBatch through a model's forward to its attention.
SHARED = "longshadow_shared_batch"


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedBatch:
    """A tree, and the name of the implementation that attends to it."""

    tree: PrefixTree
    attention: str


def register_tree_attention(previous: str) -> str:
    """An attention implementation that attends to trees and leaves everything else to the previous one."""
    name = PREFIX + previous
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, functools.partial(_attention_forward, previous))
        AttentionMaskInterface.register(name, _mask_function(previous))
    return name


def _mask_function(previous: str) -> Callable[..., Any]:
    function: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[previous]
    return function


def _attention_forward(
    previous: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch: SharedBatch | None = kwargs.pop(SHARED, None)
    if batch is None:
        ordinary: tuple[torch.Tensor, torch.Tensor | None] = _previous_attention(previous, module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return ordinary
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    attend = choose_attention(batch.attention, query, dropout=dropout, softcap=softcap, sinks=sinks)
    output = attend(
        query,
        key,
        value,
        batch.tree,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        sliding_window=kwargs.get("sliding_window"),
        softcap=softcap,
        sinks=sinks,
    )
    return output.transpose(1, 2).contiguous(), None


def _previous_attention(previous: str, module: nn.Module) -> Callable[..., Any]:
    """What the module would have called; "eager" is a function of its own source file."""
    if previous == "eager":
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    function = ALL_ATTENTION_FUNCTIONS[previous]
    return function
