"""`sparse_attention(query, places, key_slots, value_slots, regions, sinks, scaling, softcap, out, lse, workspace)`.

out = softmax(scaling * query . key) value over the tokens at `places`, the tokens of all regions, and the sink column,
which has no value; logits are soft-capped first where softcap is not 0. Without any token out is 0.

| argument    |                                                                                        |
|-------------|----------------------------------------------------------------------------------------|
| query       | [B, H, G, D] in the model's dtype                                                      |
| places      | int32 [B, H, T], slot * c + offset of each token, -1: none                             |
| key_slots   | [B, H, S, c, D]                                                                        |
| value_slots | [B, H, S, c, V]                                                                        |
| regions     | `SegmentTable.regions`                                                                 |
| sinks       | [H, G] logits; None without                                                            |
| out         | [B, H, G, V] in the model's dtype, written                                             |
| lse         | fp32 [B, H, G], written: natural logarithm of the sum of exp(logit), sinks included    |
| workspace   | fp32, `sparse_attention_workspace(...)` elements                                       |
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.sparse_attention import reference
from longshadow.engine.ops.splits import num_token_splits

define(
    "sparse_attention",
    "(Tensor query, Tensor places, Tensor key_slots, Tensor value_slots, Tensor regions, Tensor? sinks, float scaling,"
    " float softcap, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) workspace) -> ()",
    reference.sparse_attention,
)


def sparse_attention_workspace(
    batch_size: int, num_kv_heads: int, num_groups: int, value_dim: int, max_tokens: int
) -> int:
    """Elements of the workspace for T = `max_tokens`: per part and query head a weighted sum of values, a maximum and
    a sum."""
    num_pairs = batch_size * num_kv_heads
    return num_pairs * num_groups * num_token_splits(num_pairs, max_tokens) * (value_dim + 2)
