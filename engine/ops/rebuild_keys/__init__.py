"""`rebuild_keys(table, chosen, slots, misses, ...)`: keys of chunks that are not resident into their slots.

key = RoPE(coefficients @ basis + mean). For each m among a head's first num_misses misses, the chunk chosen[m] is
rebuilt into the slot slots[m]. Products are summed in fp32, and rounded to the model's dtype once, after the rotation.

| argument      |                                                                                  |
|---------------|----------------------------------------------------------------------------------|
| table         | `SegmentTable.segments`                                                          |
| chosen, slots | int32 [B, H, M]: chunks and the slots they have                                  |
| misses        | int32 [B, H, M]: places in `chosen` of the chunks to rebuild                     |
| num_misses    | int32 [B, H]: how many these are                                                 |
| kind          | `RowKind` of the coefficients                                                    |
| rotary_style  | `RotaryStyle`                                                                    |
| rotary_dim    | rotated elements of a head, 0 without RoPE                                       |
| key_slots     | [B, H, S, c, D] in the model's dtype, updated                                    |
| rotation_fp32 | `SegmentTable.rotation_fp32`: cos and sin are fp32, else in the model's dtype    |
"""

from longshadow.engine.ops.library import define
from longshadow.engine.ops.rebuild_keys.reference import rebuild_keys

define(
    "rebuild_keys",
    "(Tensor table, Tensor chosen, Tensor slots, Tensor misses, Tensor num_misses, int kind, int rotary_style, "
    "int rotary_dim, Tensor(a!) key_slots, bool rotation_fp32=True) -> ()",
    rebuild_keys,
)
