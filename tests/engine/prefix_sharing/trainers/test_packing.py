"""Pairs packed by distinct tokens weigh alike, however they are cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshadow import PrefixSharingDPOTrainer, PrefixTree
from longshadow.engine.prefix_sharing.packing import fewest_packs, pack, pair_costs, take_pairs
from tests.engine.prefix_sharing.batches import pad, pairs
from tests.engine.prefix_sharing.trainers.runs import assert_same, baseline, train_pairs


def batch(side: str = "right") -> dict[str, Any]:
    ids, mask = pad(pairs(), side=side, extra=2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": mask * (ids > 60),
        "ref_chosen_logps": torch.arange(3.0),
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_costs_are_those_of_trees(side: str) -> None:
    whole = batch(side)
    trees = [take_pairs(whole, [pair]) for pair in range(3)]
    expected = [PrefixTree.from_batch(tree["input_ids"], tree["attention_mask"]).num_tokens for tree in trees]
    assert pair_costs(whole) == expected
    assert sum(expected) < sum(map(len, pairs()))


@pytest.mark.parametrize("side", ["right", "left"])
def test_taken_pairs_are_trimmed(side: str) -> None:
    whole = batch(side)
    taken = take_pairs(whole, [0, 2])
    real = taken["attention_mask"].bool()
    assert real.shape == (4, 39) and real.any(0).all()
    for row, original in enumerate([0, 2, 3, 5]):
        cells = whole["attention_mask"][original].bool()
        for key in ("input_ids", "completion_mask"):
            assert torch.equal(taken[key][row, real[row]], whole[key][original, cells])
    assert taken["ref_chosen_logps"].tolist() == [0, 2]
    assert take_pairs(whole | {"weights": torch.arange(6)}, [0, 2])["weights"].tolist() == [0, 2, 3, 5]
    with pytest.raises(ValueError, match="'labels'"):
        take_pairs(whole | {"labels": torch.zeros(5)}, [0])


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 300))
def test_packs(costs: list[int], budget: int) -> None:
    count = fewest_packs(costs, budget)
    packs = pack(costs, count)
    assert sorted(pair for members in packs for pair in members) == list(range(len(costs)))
    assert all(len(members) == 1 or sum(costs[pair] for pair in members) <= budget for members in packs)
    sizes = [len(members) for members in packs]
    assert len(packs) == count and sizes == [len(members) for members in pack([1] * len(costs), count)]
    assert max(sizes) - min(sizes) <= 1


PER_PAIR = ["sigmoid", "hinge", "ipo", "bco_pair", "sppo_hard", "apo_down"]


@pytest.mark.slow
@pytest.mark.parametrize(("losses", "accumulation"), [(PER_PAIR, 1), (PER_PAIR, 2), (["sigmoid_norm"], 1)])
def test_packed_is_unpacked(
    tokenizer: Any, preferences: Any, tmp_path: Path, losses: list[str], accumulation: int
) -> None:
    """A budget of 150 tokens cuts batches of eight pairs, or two of four, into packs of one to three."""
    arguments: dict[str, Any] = dict(
        per_device_train_batch_size=8 if accumulation == 1 else 4,
        gradient_accumulation_steps=accumulation,
        loss_type=losses,
        loss_weights=[1.0] * len(losses),
    )
    expected = baseline(tokenizer, preferences, tmp_path, **arguments)
    arguments |= dict(trainer_class=PrefixSharingDPOTrainer, options={"packing_tokens": 150})
    actual = train_pairs(tokenizer, preferences, tmp_path, **arguments)
    # Means over tokens become means over pairs of their micro-batches' means.
    for entry in (*expected[0], *actual[0]):
        for key in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
            entry.pop(key)
    assert_same(actual, expected)


@pytest.mark.slow
def test_pairs_of_uneven_batches_weigh_alike(tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    """An epoch of 8 pairs in batches of 5 and 3, accumulated: packed, every pair weighs an eighth, as in one of 8."""
    arguments: dict[str, Any] = dict(trainer_class=PrefixSharingDPOTrainer, max_grad_norm=0.0, optim="sgd")
    whole = train_pairs(tokenizer, preferences, tmp_path, per_device_train_batch_size=8, **arguments)
    uneven = dict(per_device_train_batch_size=5, gradient_accumulation_steps=2)
    packed = train_pairs(tokenizer, preferences, tmp_path, options={"packing_tokens": 150}, **uneven, **arguments)
    unpacked = train_pairs(tokenizer, preferences, tmp_path, **uneven, **arguments)
    for name, weight in whole[1].items():
        torch.testing.assert_close(packed[1][name], weight, rtol=0, atol=1e-7)
    assert any((unpacked[1][name] - weight).abs().max() > 1e-6 for name, weight in whole[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
def test_losses_of_a_batch_are_refused(tokenizer: Any, preferences: Any, tmp_path: Path, loss: str) -> None:
    with pytest.raises(ValueError, match=loss):
        train_pairs(
            tokenizer,
            preferences,
            tmp_path,
            trainer_class=PrefixSharingDPOTrainer,
            loss_type=[loss],
            options={"packing_tokens": 100},
        )


@pytest.mark.slow
def test_noise_that_prevents_sharing_is_refused(tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NEFTune"):
        train_pairs(
            tokenizer,
            preferences,
            tmp_path,
            trainer_class=PrefixSharingDPOTrainer,
            neftune_noise_alpha=5.0,
            options={"packing_tokens": 100},
        )
