"""Writes the new token of each sequence behind its tail.

    append_tokens(keys [B, H, D], values [B, H, V], tail_tokens [B], regions)

The tail of sequence b, the last of its regions, becomes tail_tokens[b] tokens long, and the last of these is the new
one; its buffer has the room. A sequence of which tail_tokens is 0 gets none.
"""

from longshadow.engine.ops.append_tokens.reference import append_tokens
from longshadow.engine.ops.library import define

define("append_tokens", "(Tensor keys, Tensor values, Tensor tail_tokens, Tensor(a!) regions) -> ()", append_tokens)
