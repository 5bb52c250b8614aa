"""Variable-length flash attention over a prefix tree: each chain is a sequence, its keys gathered from its path.

Chains are contiguous in the tree and their paths contiguous in position, so the kernel's causal mask, aligned at the
last query and key, and its sliding window are exact. The copies of keys and values take 2P + C + R rows for a pair.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longshadow.engine.prefix_sharing.attention.chains import visible_ancestors
from longshadow.engine.prefix_sharing.tree import PrefixTree

LARGEST_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class VarlenLayout:
    """Chains as sequences.

    Attributes:
        key_index: [K], the node of every gathered key.
        cu_queries, cu_keys: [chains + 1] (int32), where each sequence begins among queries and gathered keys.
        max_queries, max_keys: of the longest ones.
    """

    key_index: torch.Tensor
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, tree: PrefixTree, sliding_window: int | None) -> "VarlenLayout":
        """Each chain with the ancestors that its first query can see."""
        keys, num_queries = [], []
        for chain in tree.chains:
            spans = [*visible_ancestors(chain, sliding_window), (chain.start, chain.stop)]
            keys.append(np.concatenate([np.arange(*span) for span in spans]))
            num_queries.append(chain.stop - chain.start)
        num_keys = [len(path) for path in keys]
        device = tree.token_ids.device

        def starts(counts: list[int]) -> torch.Tensor:
            return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32)).to(device)

        return cls(
            key_index=torch.from_numpy(np.concatenate(keys)).to(device),
            cu_queries=starts(num_queries),
            cu_keys=starts(num_keys),
            max_queries=max(num_queries),
            max_keys=max(num_keys),
        )


def why_not_varlen(
    query: torch.Tensor, *, dropout: float, softcap: float | None, sinks: torch.Tensor | None
) -> str | None:
    """Why variable-length flash attention cannot do it; None where it can."""
    if not query.is_cuda:
        return "flash attention needs a CUDA device"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention needs float16 or bfloat16, this is {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD_DIM:
        return f"flash attention needs a head_dim of whole eights up to {LARGEST_HEAD_DIM}, this is {query.shape[-1]}"
    if sinks is not None:
        return "flash attention has no sinks"
    if _has("flash_attn"):
        return None
    if dropout or softcap is not None:
        return "torch's own flash attention has neither dropout nor soft-cap; flash-attn does: the extra flash"
    return None if _has("torch.nn.attention.varlen") else "this torch has no variable-length attention"


def attend_varlen(
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
) -> torch.Tensor:
    """As `TreeAttention`, without sinks."""
    assert sinks is None
    layout = tree.remembered(("varlen", sliding_window), lambda: VarlenLayout.of(tree, sliding_window))
    keys, values = (tensor[0].transpose(0, 1).index_select(0, layout.key_index) for tensor in (key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = _kernel()(query[0].transpose(0, 1).contiguous(), keys, values, layout, scaling, dropout, window, softcap)
    return output.transpose(0, 1).unsqueeze(0)


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, VarlenLayout, float, float, tuple[int, int], float | None], torch.Tensor
]


@functools.cache
def _kernel() -> Kernel:
    """flash-attn's kernel where it is installed, torch's otherwise."""
    return _flash_attn if _has("flash_attn") else _torch_varlen


def _flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: VarlenLayout,
    scaling: float,
    dropout: float,
    window: tuple[int, int],
    softcap: float | None,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
        softcap=0.0 if softcap is None else softcap,
    )
    return output


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: VarlenLayout,
    scaling: float,
    dropout: float,
    window: tuple[int, int],
    softcap: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert not dropout and softcap is None
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # torch 2.11
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output = varlen_attn(
        query,
        key,
        value,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=window,
        **grouped,
    )
    assert isinstance(output, torch.Tensor)
    return output


@functools.cache
def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
