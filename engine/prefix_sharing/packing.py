"""Whole pairs packed into micro-batches by what they cost: distinct tokens, not rows times the longest.

A training batch keeps its pairs, so a step sees the same pairs, however it is cut.
"""

from collections.abc import Sequence
from typing import Any

import torch


def pair_costs(batch: dict[str, Any]) -> list[int]:
    """Distinct tokens of each pair of a batch [chosen rows; rejected rows]: P + C + R if no answers begin alike."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    half, length = len(ids) // 2, ids.shape[1]
    # Turned until each row begins in the first column: a common prefix is the columns before the first difference.
    columns = (torch.arange(length, device=ids.device) + mask.long().argmax(1, keepdim=True)) % length
    ids, mask = ids.gather(1, columns), mask.gather(1, columns)
    same = (ids[:half] == ids[half:]) & mask[:half] & mask[half:]
    shared = same.long().cumprod(1).sum(1)
    return (mask[:half].sum(1) + mask[half:].sum(1) - shared).tolist()  # type: ignore[no-any-return]


def fewest_packs(costs: Sequence[int], budget: int) -> int:
    """In how many packs `pack` stays within the budget of distinct tokens; a pair beyond it has a pack alone."""
    for count in range(max(1, -(-sum(costs) // budget)), len(costs)):
        packs = pack(costs, count)
        if all(len(members) == 1 or sum(costs[pair] for pair in members) <= budget for members in packs):
            return count
    return len(costs)


def pack(costs: Sequence[int], count: int) -> list[list[int]]:
    """The pairs in `count` packs of alike cost, whose sizes depend on nothing but the number of pairs.

    Processes that train together so agree on the sizes, as their metrics have to. The dearest pair goes first, each
    to the cheapest pack with room. Within a pack pairs keep their order.
    """
    sizes = [len(costs) // count + (index < len(costs) % count) for index in range(count)]
    packs: list[list[int]] = [[] for _ in sizes]
    totals = [0] * count
    for pair in sorted(range(len(costs)), key=lambda pair: -costs[pair]):
        index = min((i for i in range(count) if len(packs[i]) < sizes[i]), key=lambda i: totals[i])
        packs[index].append(pair)
        totals[index] += costs[pair]
    return [sorted(members) for members in packs]


def take_pairs(batch: dict[str, Any], pairs: Sequence[int]) -> dict[str, Any]:
    """The batch of these pairs alone, without columns that are padding in all of their rows."""
    half = len(batch["input_ids"]) // 2
    index = torch.tensor([*pairs, *(half + pair for pair in pairs)], device=batch["input_ids"].device)
    used = batch["attention_mask"][index].bool().any(0)
    taken: dict[str, Any] = {}
    for key, value in batch.items():
        if len(value) == 2 * half:
            taken[key] = value[index][:, used] if value.shape[1:2] == used.shape else value[index]
        elif len(value) == half:
            taken[key] = value[index[: len(pairs)]]
        else:
            raise ValueError(f"packing cannot split {key!r} of {len(value)} entries among {half} pairs")
    return taken
