"""`fetch_values(table, slot_chunks, places, kind, has_values, value_slots)`: values of selected tokens to their slots.

Where has_values is 0 at a place, the token `offset` of the slot's chunk is read from its segment, in device memory or
in pinned host memory, dequantised, and stored at the same place of value_slots; has_values becomes 1 there.

| argument    |                                                                                    |
|-------------|------------------------------------------------------------------------------------|
| table       | `SegmentTable.segments`                                                            |
| slot_chunks | int32 [B, H, S]: the chunk in each slot                                            |
| places      | int32 [B, H, T]: slot * c + offset, each once per head, -1 = none                  |
| kind        | `RowKind` of the values, MODEL or INT8                                             |
| has_values  | uint8 [B, H, S, c], updated                                                        |
| value_slots | [B, H, S, c, V] in the model's dtype, updated                                      |
"""

from longshadow.engine.ops.fetch_values.reference import fetch_values
from longshadow.engine.ops.library import define

define(
    "fetch_values",
    "(Tensor table, Tensor slot_chunks, Tensor places, int kind, Tensor(a!) has_values, Tensor(b!) value_slots) -> ()",
    fetch_values,
    cuda=True,
)
