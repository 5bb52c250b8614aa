"""Which implementation attends to a tree: the one asked for, or the fastest one that can."""

import logging
from typing import Protocol

import torch

from longshadow.engine.prefix_sharing.attention.chains import attend_chains
from longshadow.engine.prefix_sharing.attention.dense import attend_dense
from longshadow.engine.prefix_sharing.attention.flex import attend_flex, why_not_flex
from longshadow.engine.prefix_sharing.attention.varlen import attend_varlen, why_not_varlen
from longshadow.engine.prefix_sharing.tree import PrefixTree

logger = logging.getLogger(__name__)

NAMES = ("auto", "dense", "chains", "flex", "varlen")


class TreeAttention(Protocol):
    """softmax(scaling q . k) v of every node over its ancestors and itself.

    Equal to attention in the separate rows, in values and gradients.

    Args:
        query: [1, Hq, T, D]; key, value: [1, H, T, D], nodes in tree order.
        dropout: probability that a weight is dropped.
        sliding_window: see only fewer than this many positions above.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: [Hq] logits of a column that takes weight and gives nothing (gpt-oss).

    Returns [1, Hq, T, Dv].
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tree: PrefixTree,
        *,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


_ALL: dict[str, TreeAttention] = {
    "dense": attend_dense,
    "chains": attend_chains,
    "flex": attend_flex,
    "varlen": attend_varlen,
}
_told: set[str] = set()


def choose_attention(
    name: str, query: torch.Tensor, *, dropout: float, softcap: float | None, sinks: torch.Tensor | None
) -> TreeAttention:
    """The implementation `name` (of `NAMES`), or for "auto" the first of varlen, flex and chains that can.

    Raises ValueError where the one asked for cannot do it, with the reason. Says once per choice what was chosen.
    """
    reasons = {
        "varlen": why_not_varlen(query, dropout=dropout, softcap=softcap, sinks=sinks),
        "flex": why_not_flex(query, dropout=dropout),
    }
    if name == "auto":
        on_cuda = ("varlen", "flex") if query.is_cuda else ()
        name = next((able for able in on_cuda if reasons[able] is None), "chains")
        _tell(f"prefix sharing attends with {name} ({query.device.type}, {str(query.dtype).removeprefix('torch.')})")
    elif reasons.get(name) is not None:
        raise ValueError(f"attention={name!r} cannot run here: {reasons[name]}")
    return _ALL[name]


def _tell(line: str) -> None:
    if line not in _told:
        _told.add(line)
        logger.info(line)
