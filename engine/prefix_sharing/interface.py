"""The hand-off to transformers' attention: calls that carry a tree attend to it, others as they always did."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from longshadow.engine.prefix_sharing.attention import choose_attention
from longshadow.engine.prefix_sharing.tree import PrefixTree
from longshadow.engine.switching.attention import lend_attention, offer_attention, outside_graphs
from longshadow.engine.switching.text_model import text_model

IMPLEMENTATION = "longshadow_prefix_sharing"
# The keyword that carries a SharedBatch through a model's forward to its attention.
SHARED = "longshadow_shared_batch"


@dataclass(eq=False, kw_only=True)
class SharedBatch:
    """A tree, the name of the implementation that attends to it, and how often that was done."""

    tree: PrefixTree
    attention: str
    num_attended: int = 0


class _Attending(threading.local):
    """The batch whose layer this thread computes: a backward that recomputes layers may be another one's."""

    batch: SharedBatch | None = None


_attending = _Attending()


def offer_tree_attention(model: nn.Module) -> Callable[[], None]:
    """Lets the attention of `model` attend to trees, until the returned function is called.

    Raises ValueError for a model whose attention is not transformers' interface.
    """
    text = text_model(model)
    if text is None:
        raise ValueError(
            f"{type(model).__name__} cannot share prefixes: its attention does not go through transformers' attention "
            "interface"
        )
    return offer_attention(text.attention, _around_attention)


def _around_attention(module: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    if kwargs.get(SHARED) is None:
        return forward(**kwargs)
    return _attend_tree(module, forward, **kwargs)


@outside_graphs
def _attend_tree(module: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    batch: SharedBatch = kwargs[SHARED]
    before, num_attended = _attending.batch, batch.num_attended
    _attending.batch = batch
    try:
        output = lend_attention(IMPLEMENTATION, forward, **kwargs)
    finally:
        _attending.batch = before
    if batch.num_attended == num_attended:
        raise RuntimeError(f"{type(module).__name__} did not attend to the tree of its batch: disable prefix sharing")
    return output


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    batch = _attending.batch
    assert batch is not None
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError(f"{type(module).__name__} makes a mask of its own")
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
    batch.num_attended += 1
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
