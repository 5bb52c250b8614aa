"""`top_chunks(scores, counts, chosen)`: the places of the largest scores of each row.

Of sequence b the counts[b] largest finite scores of each head are chosen, ties to the lower place. The decoding step
takes candidate chunks by it, and then tokens among them.

| argument  |                                                                                                  |
|-----------|--------------------------------------------------------------------------------------------------|
| scores    | fp32 [B, H, n]; infinite ones and NaN are never chosen                                           |
| counts    | int32 [B], 0 .. K                                                                                |
| chosen    | int32 [B, H, K], written: places 0 .. n - 1 in ascending order, then -1 where there are no more  |
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.top_chunks import reference

define(
    "top_chunks",
    "(Tensor scores, Tensor counts, Tensor(a!) chosen) -> ()",
    reference.top_chunks,
    cuda=True,
)
