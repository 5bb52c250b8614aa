"""`plan_chunks` in Triton: one program per row.

Slots look for their chunk among the chosen ones, by binary search where these are in ascending order, as `top_chunks`
leaves them, otherwise by comparing with all. Slots are given away round by round, all that were last used in the same
step at once: a step of decoding makes one such set, so in the long run a step uses up one, and there are few rounds.
What one thread of a program writes to memory, others read after a barrier.
"""

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.checks import check_contiguous
from longshadow.engine.ops.configuration import Configuration

LAST = tl.constexpr(0x7FFFFFFF)  # orders chosen chunks that are none behind all others
STAYS = tl.constexpr(0x7FFFFFFF)  # the last use of slots that are not given away
COMPARED = tl.constexpr(16)  # chosen chunks that all slots are compared with at once


@triton.jit
def _load_chunks(chosen, place, num_chosen):
    """Chosen chunks, those that are none behind all others."""
    chunks = tl.load(chosen + place, mask=place < num_chosen, other=-1)
    return tl.where(chunks < 0, LAST, chunks)


@triton.jit
def _is_ascending(chosen, num_chosen, BLOCK_M: tl.constexpr):
    place = tl.arange(0, BLOCK_M)
    chunks = _load_chunks(chosen, place, num_chosen)
    following = _load_chunks(chosen, place + 1, num_chosen)
    return tl.min(((chunks < following) | (following == LAST)).to(tl.int32)) != 0


@triton.jit
def _search(chosen, chunks, num_chosen, STEPS: tl.constexpr):
    """Where each chunk is among the ascending chosen ones; `num_chosen` where it would come behind them."""
    low = tl.zeros_like(chunks)
    high = low + num_chosen
    for _ in range(STEPS):
        middle = (low + high) // 2
        smaller = (low < high) & (_load_chunks(chosen, middle, num_chosen) < chunks)
        high = tl.where(smaller, high, middle)
        low = tl.where(smaller, middle + 1, low)
    return low


@triton.jit
def _compare(chosen, chunks, num_chosen):
    """Where each chunk is among the chosen ones, in any order; `num_chosen` where it is not."""
    found = tl.zeros_like(chunks) + num_chosen
    for start in range(0, num_chosen, COMPARED):
        place = start + tl.arange(0, COMPARED)
        equal = _load_chunks(chosen, place, num_chosen)[:, None] == chunks[None, :]
        found = tl.minimum(found, tl.min(tl.where(equal, place[:, None], num_chosen), 0))
    return found


@triton.jit(do_not_specialize=["num_chosen", "num_slots", "chunk_size"])
def plan_chunks_kernel(
    chosen,
    slot_chunks,
    last_used,
    has_values,
    step,
    slots,
    misses,
    num_misses,
    num_chosen,
    num_slots,
    chunk_size,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid: rows, one of each head of each sequence."""
    row = tl.program_id(0).to(tl.int64)
    chosen += row * num_chosen
    slots += row * num_chosen
    misses += row * num_chosen
    slot_chunks += row * num_slots
    last_used += row * num_slots
    has_values += row * num_slots * chunk_size
    now = tl.load(step)

    place = tl.arange(0, BLOCK_M)
    inside = place < num_chosen
    tl.store(slots + place, -1, mask=inside)
    tl.store(misses + place, -1, mask=inside)

    slot = tl.arange(0, BLOCK_S)
    held = tl.load(slot_chunks + slot, mask=slot < num_slots, other=-1)
    uses = tl.load(last_used + slot, mask=slot < num_slots, other=0)
    if _is_ascending(chosen, num_chosen, BLOCK_M):
        found = _search(chosen, held, num_chosen, STEPS)
    else:
        found = _compare(chosen, held, num_chosen)
    kept = (held >= 0) & (_load_chunks(chosen, found, num_chosen) == held)
    tl.debug_barrier()
    tl.store(slots + found, slot, mask=kept)
    tl.store(last_used + slot, now, mask=kept)
    tl.debug_barrier()

    chunks = tl.load(chosen + place, mask=inside, other=-1)
    missing = ((chunks >= 0) & (tl.load(slots + place, mask=inside, other=0) < 0)).to(tl.int32)
    tl.store(misses + tl.cumsum(missing, 0) - 1, place, mask=missing != 0)
    num_missing = tl.sum(missing)
    tl.store(num_misses + row, num_missing)
    tl.debug_barrier()

    uses = tl.where(kept | (slot >= num_slots), STAYS, uses)
    num_given = 0
    while num_given < num_missing:
        oldest = tl.min(uses)
        given = ((uses == oldest) & (oldest != STAYS)).to(tl.int32)
        turn = num_given + tl.cumsum(given, 0) - 1
        taken = (given != 0) & (turn < num_missing)
        target = tl.load(misses + turn, mask=taken, other=0)
        tl.store(slots + target, slot, mask=taken)
        tl.store(slot_chunks + slot, tl.load(chosen + target, mask=taken, other=0), mask=taken)
        tl.store(last_used + slot, now, mask=taken)
        for offset in range(chunk_size):
            tl.store(has_values + slot.to(tl.int64) * chunk_size + offset, 0, mask=taken)
        num_given = tl.where(oldest == STAYS, num_missing, num_given + tl.sum(given))
        uses = tl.where(given != 0, STAYS, uses)


def plan_chunks(
    chosen: torch.Tensor,
    slot_chunks: torch.Tensor,
    last_used: torch.Tensor,
    has_values: torch.Tensor,
    step: torch.Tensor,
    slots: torch.Tensor,
    misses: torch.Tensor,
    num_misses: torch.Tensor,
) -> None:
    """See the package. Raises ValueError for fewer slots than chosen chunks."""
    batch_size, num_heads, num_chosen = chosen.shape
    num_slots, chunk_size = has_values.shape[2:]
    if num_slots < num_chosen:
        raise ValueError(f"there must be a slot for each of the {num_chosen} chosen chunks, not {num_slots}")
    check_contiguous(
        chosen=chosen,
        slot_chunks=slot_chunks,
        last_used=last_used,
        has_values=has_values,
        slots=slots,
        misses=misses,
        num_misses=num_misses,
    )
    constexprs, num_warps = _sizes(num_chosen, num_slots)
    plan_chunks_kernel[batch_size * num_heads,](
        chosen,
        slot_chunks,
        last_used,
        has_values,
        step,
        slots,
        misses,
        num_misses,
        num_chosen,
        num_slots,
        chunk_size,
        **constexprs,
        num_warps=num_warps,
    )


def _sizes(num_chosen: int, num_slots: int) -> tuple[dict[str, int], int]:
    """The kernel's compile-time parameters, and its warps: 4 slots a thread, until a block is full."""
    block_m, block_s = (max(16, triton.next_power_of_2(size)) for size in (num_chosen, num_slots))
    constexprs = {"BLOCK_M": block_m, "BLOCK_S": block_s, "STEPS": block_m.bit_length()}
    return constexprs, min(16, max(4, block_s // 128))


def _configuration(num_chosen: int, num_slots: int) -> Configuration:
    constexprs, num_warps = _sizes(num_chosen, num_slots)
    pointers = ("chosen", "slot_chunks", "last_used", "has_values", "step", "slots", "misses", "num_misses")
    return Configuration(
        name=f"{num_chosen} of {num_slots}",
        kernel=plan_chunks_kernel,
        signature={
            **{name: "*u8" if name == "has_values" else "*i32" for name in pointers},
            **dict.fromkeys(("num_chosen", "num_slots", "chunk_size"), "i32"),
        },
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=1,
    )


# Candidates of 256 chunks of 8 tokens, one and three times as many, and the largest sizes.
CONFIGURATIONS = [_configuration(*sizes) for sizes in ((256, 256), (768, 1024), (768, 2048), (3072, 4096))]
