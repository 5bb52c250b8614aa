"""Regrouped micro-batches: the same rows, whole groups."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.prefix_sharing.grouping import per_step, regroup


def shuffled(num_prompts: int, group: int, num_batches: int, seed: int) -> list[dict]:
    """Rows as TRL shuffles and splits them; prompts 0 and 1 differ only in their length."""
    total = num_prompts * group
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    prompt = torch.arange(total) // group
    ids, mask = (prompt.clamp(min=1) + 5)[:, None].repeat(1, 4), torch.ones(total, 4, dtype=torch.long)
    mask[prompt == 0, :2] = 0
    size = total // num_batches
    return [
        {
            "prompt_ids": ids[rows],
            "prompt_mask": mask[rows],
            "advantages": rows.double(),
            "texts": [str(int(row)) for row in rows],
            "num_items_in_batch": torch.tensor(7),
            "old_per_token_logps": None,
        }
        for rows in order.split(size)
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_groups_stay_whole_and_rows_stay_rows(num_prompts: int, group: int, num_batches: int, seed: int) -> None:
    batches = shuffled(num_prompts * num_batches, group, num_batches, seed)
    regrouped = regroup(batches)
    assert [len(batch["prompt_ids"]) for batch in regrouped] == [num_prompts * group] * num_batches
    rows = torch.cat([batch["advantages"] for batch in regrouped]).long()
    assert sorted(rows.tolist()) == list(range(num_prompts * num_batches * group))
    assert [text for batch in regrouped for text in batch["texts"]] == [str(row) for row in rows.tolist()]
    for batch in regrouped:
        prompts = batch["advantages"].long() // group
        assert len(prompts.unique()) == num_prompts, "a group was torn apart"
        assert torch.equal(batch["prompt_ids"][:, 3], prompts.clamp(min=1) + 5)
        assert torch.equal(batch["prompt_mask"][:, 0] == 0, prompts == 0)
        assert batch["num_items_in_batch"] == 7 and batch["old_per_token_logps"] is None


@pytest.mark.parametrize(
    ("generated", "accumulated", "expected"), [(4, 4, 4), (4, 2, 2), (2, 4, 2), (3, 2, 1), (2, 3, 1), (1, 4, 1)]
)
def test_rows_stay_in_their_optimizer_step(generated: int, accumulated: int, expected: int) -> None:
    """By brute force: micro-batches of one generation may mix only where they always share a step."""
    args = SimpleNamespace(steps_per_generation=generated, gradient_accumulation_steps=accumulated)
    assert per_step(args) == expected
    for number in range(0, 12 * generated, expected):
        assert len({(number + offset) // accumulated for offset in range(expected)}) == 1


def test_batches_with_images_are_left_alone() -> None:
    batches = shuffled(2, 2, 2, seed=0)
    for batch in batches:
        batch["pixel_values"] = torch.zeros(5, 3)
    assert regroup(batches) == batches
