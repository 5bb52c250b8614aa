"""`score_tokens(query, slots, key_slots, regions, sinks, scaling, softcap, scores, workspace)`: which tokens of the
candidate chunks a query attends to.

Attention weight of each candidate token, in one softmax per query head over scaling * query . key (soft-capped first
where softcap is not 0) of the candidates' tokens, the tokens of all regions, and the sink column; then the maximum
over the query heads that share a KV head.

| argument  |                                                                                          |
|-----------|------------------------------------------------------------------------------------------|
| query     | [B, H, G, D] in the model's dtype                                                        |
| slots     | int32 [B, H, M], slot of each candidate chunk, -1: none                                  |
| key_slots | [B, H, S, c, D]                                                                          |
| regions   | `SegmentTable.regions`                                                                   |
| sinks     | [H, G] logits of a column that takes probability and gives nothing; None without         |
| scores    | fp32 [B, H, M c], written; -inf for tokens of no candidate                               |
| workspace | fp32, `score_tokens_workspace(...)` elements                                             |
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.score_tokens import reference
from longshadow.engine.ops.splits import num_token_splits

define(
    "score_tokens",
    "(Tensor query, Tensor slots, Tensor key_slots, Tensor regions, Tensor? sinks, float scaling, float softcap,"
    " Tensor(a!) scores, Tensor(b!) workspace) -> ()",
    reference.score_tokens,
)


def score_tokens_workspace(batch_size: int, num_kv_heads: int, num_groups: int, max_tokens: int) -> int:
    """Elements of the workspace for M c = `max_tokens`: a logit per query head and candidate token, and per part a
    maximum and a sum per query head."""
    num_pairs = batch_size * num_kv_heads
    return num_pairs * num_groups * (max_tokens + 2 * num_token_splits(num_pairs, max_tokens))
