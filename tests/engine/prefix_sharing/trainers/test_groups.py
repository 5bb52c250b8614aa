"""GRPO and RLOO over shared prompts: loss, every logged metric, and the weights; and the weights of group losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow import PrefixSharingGRPOTrainer, PrefixSharingRLOOTrainer
from longshadow.engine.prefix_sharing.aggregation import delta_l_weights
from tests.engine.prefix_sharing.trainers.runs import STEPS, assert_same, number_of_words, train_groups, trl

KINDS: dict[str, tuple[Any, Any]] = {
    "GRPO": (trl.GRPOTrainer, PrefixSharingGRPOTrainer),
    "RLOO": (trl.RLOOTrainer, PrefixSharingRLOOTrainer),
}


@pytest.mark.slow
@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_unchanged(tokenizer: Any, tmp_path: Path, kind: str, group: int) -> None:
    theirs, ours = KINDS[kind]
    *expected, _ = train_groups(kind, tokenizer, tmp_path, trainer_class=theirs, group=group)
    *actual, trainer = train_groups(kind, tokenizer, tmp_path, trainer_class=ours, group=group)
    assert trainer.policy_sharing.shared_batches >= STEPS and trainer.policy_sharing.ordinary_batches == 0
    assert trainer.policy_sharing.padded_tokens > group / 3 * trainer.policy_sharing.unique_tokens
    assert_same((actual[0], actual[1]), (expected[0], expected[1]))


@pytest.mark.slow
def test_a_reference_shares_too(tokenizer: Any, tmp_path: Path) -> None:
    *expected, _ = train_groups("GRPO", tokenizer, tmp_path, trainer_class=trl.GRPOTrainer, beta=0.1)
    *actual, trainer = train_groups("GRPO", tokenizer, tmp_path, trainer_class=PrefixSharingGRPOTrainer, beta=0.1)
    assert trainer.reference_sharing.shared_batches >= STEPS
    assert_same((actual[0], actual[1]), (expected[0], expected[1]))


# Two accumulated micro-batches of four rows; whether TRL's micro-batches stay, so that all metrics are TRL's, too.
SETTINGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "a generation for two steps": (False, dict(steps_per_generation=4, max_steps=4)),
    "a generation for one and a half": (True, dict(steps_per_generation=3)),
    "two passes over a generation": (False, dict(num_iterations=2, steps_per_generation=4, max_steps=4)),
    **{f"loss {name}": (name == "bnpo", dict(loss_type=name)) for name in ("grpo", "dr_grpo", "dapo", "bnpo")},
    "high entropy only": (True, dict(top_entropy_quantile=0.5)),
    "entropy bonus": (True, dict(entropy_coef=0.1)),
    "adaptive entropy bonus": (True, dict(use_adaptive_entropy=True, entropy_target=6.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_unchanged(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """Loss and weights everywhere. Means over tokens are means over other micro-batches where rows were regrouped."""
    stays, settings = SETTINGS[name]
    try:
        *expected, _ = train_groups("GRPO", tokenizer, tmp_path, trainer_class=trl.GRPOTrainer, batches=2, **settings)
    except TypeError as error:  # an older TRL; the pinned one has to have all
        pytest.skip(f"TRL alone fails: {error}")
    *actual, ours = train_groups(
        "GRPO", tokenizer, tmp_path, trainer_class=PrefixSharingGRPOTrainer, batches=2, **settings
    )
    assert ours.policy_sharing.shared_batches > STEPS and ours._regroups != stays
    for entry in (*expected[0], *actual[0]) if not stays else ():
        for key in [key for key in entry if key == "entropy" or key.startswith("clip_ratio/")]:
            entry.pop(key)
    assert_same((actual[0], actual[1]), (expected[0], expected[1]))


@pytest.mark.slow
def test_micro_batches_hold_whole_groups(tokenizer: Any, tmp_path: Path) -> None:
    *_, trainer = train_groups("GRPO", tokenizer, tmp_path, trainer_class=PrefixSharingGRPOTrainer, batches=2)
    for batch in trainer._buffered_inputs:
        assert len(batch["prompt_ids"].unique(dim=0)) == 1
    assert trainer.policy_sharing.padded_tokens > 2 * trainer.policy_sharing.unique_tokens


def test_delta_l_weights_by_hand() -> None:
    lengths = torch.tensor([1, 4, 2])
    assert delta_l_weights(lengths, 0).tolist() == [1, 1, 1]
    # 1, 1/4, 1/2 sum to 7/4; times three.
    torch.testing.assert_close(delta_l_weights(lengths, 1), torch.tensor([12 / 7, 3 / 7, 6 / 7]))
    # 1, 1/2, 1/sqrt 2
    expected = 3 * torch.tensor([1, 0.5, 0.5**0.5]) / (1.5 + 0.5**0.5)
    torch.testing.assert_close(delta_l_weights(lengths, 0.5), expected)
    # An empty completion takes no weight from the others.
    torch.testing.assert_close(delta_l_weights(torch.tensor([2, 0]), 1), torch.tensor([2.0, 0.0]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        delta_l_weights(lengths, 1.5)


class Watched(PrefixSharingGRPOTrainer):
    """Keeps what it trained on."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.watched = {**getattr(self, "watched", {}), len(getattr(self, "watched", {})): output}
        return output


@pytest.mark.slow
def test_delta_l_weighs_advantages(tokenizer: Any, tmp_path: Path) -> None:
    runs = {
        alpha: train_groups("GRPO", tokenizer, tmp_path, trainer_class=Watched, delta_l=alpha, loss_type="dr_grpo")[
            2
        ].watched[0]
        for alpha in (None, 0.0, 0.75)
    }
    lengths = runs[None]["completion_mask"].sum(1)
    assert len(lengths.unique()) > 2, "all completions are alike: the test is blind"
    assert torch.equal(runs[0.0]["advantages"], runs[None]["advantages"])
    weights = lengths.double() ** -0.75 / (lengths.double() ** -0.75).mean()
    expected = runs[None]["advantages"] * weights.float()
    torch.testing.assert_close(runs[0.75]["advantages"], expected)
    with pytest.raises(ValueError, match="dr_grpo"):
        train_groups("GRPO", tokenizer, tmp_path, trainer_class=Watched, delta_l=1.0, loss_type="grpo")


@pytest.mark.slow
def test_gdpo_is_trls(tokenizer: Any, tmp_path: Path) -> None:
    """z-scores of each reward in its group, their weighted sum, and its z-score over the batch, written out."""
    seen: list[torch.Tensor] = []

    def last_word(completions: list[str], **_: Any) -> list[float]:
        words = number_of_words(completions)
        shares = [float(len(text)) for text in completions]
        seen.append(torch.tensor([words, shares]).T)
        return shares

    *_, trainer = train_groups(
        "GRPO",
        tokenizer,
        tmp_path,
        trainer_class=Watched,
        reward_funcs=[number_of_words, last_word],
        reward_weights=[0.3, 0.7],
        multi_objective_aggregation="normalize_then_sum",
    )
    rewards = seen[0].view(2, 4, 2)
    scores = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    sums = (scores.view(8, 2) * torch.tensor([0.3, 0.7])).sum(1)
    torch.testing.assert_close(trainer.watched[0]["advantages"], (sums - sums.mean()) / (sums.std() + 1e-4))
