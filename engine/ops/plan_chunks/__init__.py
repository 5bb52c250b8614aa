"""`plan_chunks(chosen, slot_chunks, last_used, has_values, step, slots, misses, num_misses)`: chunks and their slots.

A chosen chunk that is in a slot keeps it. The n-th chunk that is in none, in the order of `chosen`, gets the n-th slot
in the order of (last use, slot) among those whose chunk is not chosen: the least recently used ones leave. As many
slots as chosen chunks always suffice.

| argument    |                                                                                               |
|-------------|-----------------------------------------------------------------------------------------------|
| chosen      | int32 [B, H, M]: distinct chunks, -1 = none                                                   |
| slot_chunks | int32 [B, H, S], updated: the chunk in each slot, -1 = empty; S >= M                          |
| last_used   | int32 [B, H, S], updated: the last step that chose the slot's chunk, 0 = none yet             |
| has_values  | uint8 [B, H, S, c], cleared for the slots that get another chunk                              |
| step        | int32 [1], larger than any in `last_used`                                                     |
| slots       | int32 [B, H, M], written: the slot of each chosen chunk, -1 where there is none               |
| misses      | int32 [B, H, M], written: places in `chosen` of the chunks to be brought, ascending, then -1  |
| num_misses  | int32 [B, H], written: how many these are                                                     |
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.plan_chunks import reference

define(
    "plan_chunks",
    "(Tensor chosen, Tensor(a!) slot_chunks, Tensor(b!) last_used, Tensor(c!) has_values, Tensor step,"
    " Tensor(d!) slots, Tensor(e!) misses, Tensor(f!) num_misses) -> ()",
    reference.plan_chunks,
    cuda=True,
)
