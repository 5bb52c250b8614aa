"""`score_chunks(query, table, scaling, softcap, kind, scores, workspace)`: which chunks a query looks at.

Per query head, softmax over the chunks of all segments of scaling * query . landmark, soft-capped first where softcap
is not 0; score = maximum over the query heads that share a KV head. Exact chunks, attended anyway, take no part.

| argument  |                                                                                                |
|-----------|------------------------------------------------------------------------------------------------|
| query     | [B, H, G, D] in the model's dtype                                                              |
| table     | `SegmentTable.segments`                                                                        |
| kind      | `RowKind` of the landmarks                                                                     |
| scores    | fp32 [B, H, C], written, by chunk of all segments; -inf for exact chunks and beyond the last   |
| workspace | fp32, `score_chunks_workspace(...)` elements                                                   |
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.score_chunks import reference
from longshadow.engine.ops.splits import num_chunk_splits

define(
    "score_chunks",
    "(Tensor query, Tensor table, float scaling, float softcap, int kind, Tensor(a!) scores, Tensor(b!) workspace)"
    " -> ()",
    reference.score_chunks,
)


def score_chunks_workspace(batch_size: int, num_kv_heads: int, num_groups: int, max_chunks: int) -> int:
    """Elements of the workspace: a logit per query head and chunk, a maximum and a sum per query head and part."""
    num_pairs = batch_size * num_kv_heads
    return num_pairs * num_groups * (max_chunks + 2 * num_chunk_splits(num_pairs, max_chunks))
