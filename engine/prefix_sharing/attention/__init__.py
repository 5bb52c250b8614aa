"""Exact attention over a prefix tree, by several implementations of one contract.

| name   | what it does                                                     | where                            |
|--------|------------------------------------------------------------------|----------------------------------|
| dense  | one attention with an explicit T x T mask                        | anywhere; the specification      |
| chains | one small attention per chain, no T x T mask                     | anywhere; the CPU's choice       |
| flex   | FlexAttention with a block-sparse mask                           | CUDA, torch's Triton kernels     |
| varlen | every chain's keys gathered, one variable-length flash attention | CUDA, half precision             |

All take `query [1, Hq, T, D]`, `key, value [1, H, T, D]`, the tree, and the options of `TreeAttention`.
"""

from longshadow.engine.prefix_sharing.attention.choice import NAMES, TreeAttention, choose_attention

__all__ = ["NAMES", "TreeAttention", "choose_attention"]
