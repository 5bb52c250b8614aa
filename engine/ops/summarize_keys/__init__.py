"""`summarize_keys(keys, cos, sin, ...)`: what the compression of a prompt needs to know of its keys, read once.

Of post-RoPE keys: the mean of each chunk and the smallest cosine between it and the chunk's keys (`summarize_chunks`).
Of the keys with their rotation undone, each token's heads one after the other: these themselves, and with x = w * key
the sum of x and of the outer products x x^T, from which the basis follows (`GramAccumulator.add_sums`).

| argument     |                                                                                          |
|--------------|------------------------------------------------------------------------------------------|
| keys         | [H, n, D] in the model's dtype, heads and tokens apart by any stride; n a multiple of c  |
| cos, sin     | [n, P] fp32 or in the model's dtype, None without RoPE                                   |
| rotary_style | `RotaryStyle`                                                                            |
| rotary_dim   | rotated elements of a head, 0 without RoPE                                               |
| chunk_size   | c                                                                                        |
| weights      | fp32 [W], w, or None: all 1; W = H D                                                     |
| plain        | [n, W] in the model's dtype, written: un-rotated keys, without the weights               |
| landmarks    | fp32 [H, n / c, D], written                                                              |
| min_cosine   | fp32 [H, n / c], written                                                                 |
| gram         | fp32 [W, W], added to: both triangles, of `plain` as it is rounded                       |
| key_sum      | fp32 [W], added to                                                                       |
| workspace    | fp32, `summarize_keys_workspace(...)` elements                                           |

Sums are taken in an order that depends on shapes alone.
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.summarize_keys.reference import summarize_keys
from longshadow.engine.ops.summarize_keys.tiling import num_blocks, num_splits

define(
    "summarize_keys",
    "(Tensor keys, Tensor? cos, Tensor? sin, int rotary_style, int rotary_dim, int chunk_size, Tensor? weights, "
    "Tensor(a!) plain, Tensor(b!) landmarks, Tensor(c!) min_cosine, Tensor(d!) gram, Tensor(e!) key_sum, "
    "Tensor(f!) workspace) -> ()",
    summarize_keys,
)


def summarize_keys_workspace(num_kv_heads: int, num_tokens: int, head_dim: int, chunk_size: int) -> int:
    """Elements of the workspace: a Gram matrix for each split of the tokens, a sum of keys for each block."""
    width = num_kv_heads * head_dim
    return num_splits(num_tokens) * width**2 + num_blocks(num_tokens, head_dim, chunk_size) * width
