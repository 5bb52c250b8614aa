"""TRL's own DPO trainer with and without shared prefixes: loss, every logged metric, and the weights after 3 steps."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from longshadow import PrefixSharingDPOTrainer
from longshadow.engine.prefix_sharing import backbone
from tests.engine.prefix_sharing.trainers.runs import assert_same, baseline, model_of, train_pairs, trl

ROOT = Path(__file__).resolve().parents[4]

LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()
SINGLE: dict[str, Any] = dict(dtype=torch.float32)
CASES: dict[str, dict[str, Any]] = {
    "a mixture with weighting and ld_alpha": dict(
        loss_type=["sigmoid", "bco_pair", "ipo"], loss_weights=[0.8, 0.2, 1.0], use_weighting=True, ld_alpha=0.5
    ),
    "another divergence": dict(f_divergence_type="js_divergence"),
    "LoRA, the reference without it": dict(lora=True),
    "precomputed reference": dict(precompute_ref_log_probs=True),
    "soft-cap and sliding window": dict(family="gemma2", **SINGLE),
    "two accumulated batches": dict(gradient_accumulation_steps=2),
    "four accumulated pairs": dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
    "no gradient checkpointing": dict(gradient_checkpointing=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_unchanged(tokenizer: Any, preferences: Any, tmp_path: Path, loss: str) -> None:
    arguments: dict[str, Any] = dict(loss_type=[loss], label_smoothing=0.1 if loss in ("exo_pair", "robust") else 0.0)
    expected = baseline(tokenizer, preferences, tmp_path, **arguments)
    assert_same(train_pairs(tokenizer, preferences, tmp_path, share=True, **arguments), expected)
    ours = train_pairs(tokenizer, preferences, tmp_path, trainer_class=PrefixSharingDPOTrainer, **arguments)
    assert_same(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_unchanged_in_fp32(tokenizer: Any, preferences: Any, tmp_path: Path, loss: str) -> None:
    arguments = SINGLE | dict(loss_type=[loss], label_smoothing=0.1 if loss in ("exo_pair", "robust") else 0.0)
    expected = baseline(tokenizer, preferences, tmp_path, **arguments)
    ours = train_pairs(tokenizer, preferences, tmp_path, trainer_class=PrefixSharingDPOTrainer, **arguments)
    assert_same(ours, expected, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_setting_is_unchanged(tokenizer: Any, preferences: Any, tmp_path: Path, case: str) -> None:
    arguments = CASES[case]
    dtype = arguments.get("dtype", torch.float64)
    expected = baseline(tokenizer, preferences, tmp_path, **arguments)
    assert_same(train_pairs(tokenizer, preferences, tmp_path, share=True, **arguments), expected, dtype)
    ours = train_pairs(tokenizer, preferences, tmp_path, trainer_class=PrefixSharingDPOTrainer, **arguments)
    assert_same(ours, expected, dtype)


@pytest.mark.slow
def test_a_precomputed_reference_is_shared(tokenizer: Any, tmp_path: Path) -> None:
    """On rows of its own: TRL keeps a file of what it has precomputed for others."""
    rows = [{"prompt": "w1 " * 30, "chosen": f"w{uuid4().int % 90} <eos>", "rejected": "w91 w92 <eos>"}] * 4
    expected = train_pairs(tokenizer, Dataset.from_list(rows), tmp_path)
    again = Dataset.from_list(rows)
    ours = train_pairs(tokenizer, again, tmp_path, trainer_class=Watched, precompute_ref_log_probs=True)
    assert Watched.precomputed > 0
    assert_same(ours, expected)


@pytest.mark.slow
def test_packing_bounds_the_precomputed_reference(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows of its own, too, of different lengths, so that packs take them out of order."""
    passes: list[int] = []

    def run_tree(forward: Any, tree: Any, *others: Any, **options: Any) -> Any:
        passes.append(tree.num_tokens)
        return run(forward, tree, *others, **options)

    run = backbone._run_tree
    rows = [
        {"prompt": f"w{length} " * 30, "chosen": f"w{uuid4().int % 90} <eos>", "rejected": "w91 " * length + "<eos>"}
        for length in (3, 50, 9, 40, 1, 20)
    ]
    arguments: dict[str, Any] = dict(per_device_train_batch_size=6)
    expected = train_pairs(tokenizer, Dataset.from_list(rows), tmp_path, **arguments)
    monkeypatch.setattr(backbone, "_run_tree", run_tree)
    ours = train_pairs(
        tokenizer,
        Dataset.from_list(rows),
        tmp_path,
        trainer_class=PrefixSharingDPOTrainer,
        precompute_ref_log_probs=True,
        options=dict(packing_tokens=100, verify_first_batch=False),
        **arguments,
    )
    assert len(passes) > 3 and max(passes) <= 100
    for mine, theirs in zip(ours[0], expected[0], strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected"):
            assert abs(mine[key] - theirs[key]) <= 1e-5 * max(1, abs(theirs[key])), key


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_readme_trains_with_and_without_a_reference_model(
    tokenizer: Any, preferences: Any, tmp_path: Path, lora: bool
) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Train on preferences")[2]
    model = model_of("llama", torch.float32)
    names: dict[str, Any] = dict(
        model=get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])) if lora else model,
        reference=None if lora else model_of("llama", torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), max_steps=1, report_to=[], bf16=False, use_cpu=True, save_strategy="no"
        ),
        preferences=preferences,
        tokenizer=tokenizer,
    )
    exec(section.partition("```python\n")[2].partition("```")[0], names)
    assert names["report"].token_ratio > 1 and (names["trainer"].ref_model is None) == lora


class Watched(PrefixSharingDPOTrainer):
    """Counts the shared passes of the precomputation."""

    precomputed = 0

    def compute_ref_log_probs(self, *args: Any) -> Any:
        result = super().compute_ref_log_probs(*args)
        Watched.precomputed += self.reference_sharing.shared_batches
        return result


@pytest.mark.slow
def test_the_balance_of_experts_is_unchanged(tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(family="qwen3 with experts", **SINGLE)
    expected = baseline(tokenizer, preferences, tmp_path, **arguments)
    ours = train_pairs(tokenizer, preferences, tmp_path, trainer_class=PrefixSharingDPOTrainer, **arguments)
    assert_same(ours, expected, torch.float32)
    # Older versions of TRL leave it out.
    assert all(entry.get("aux_loss", 1) > 0 for entry in expected[0])


@pytest.mark.slow
def test_automatic_mixed_precision(tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    """TRL's default: weights in fp32, products in bf16. `train_pairs` sees to it that batches are shared."""
    arguments: dict[str, Any] = dict(bf16=True, **SINGLE)
    expected, _ = baseline(tokenizer, preferences, tmp_path, **arguments)
    train_pairs(tokenizer, preferences, tmp_path, share=True, **arguments)
    actual, _ = train_pairs(tokenizer, preferences, tmp_path, trainer_class=PrefixSharingDPOTrainer, **arguments)
    for mine, theirs in zip(actual, expected, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-2
        assert abs(mine["logps/chosen"] - theirs["logps/chosen"]) < 1e-2 * abs(theirs["logps/chosen"])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_odd_rows(tokenizer: Any, tmp_path: Path, side: str) -> None:
    prompt = " ".join(f"w{number}" for number in range(40)) + " "
    rows = [
        {"prompt": prompt, "chosen": "w1 w2 <eos>", "rejected": "w1 w2 <eos>"},
        {"prompt": prompt, "chosen": "", "rejected": "w3 <eos>"},
        {"prompt": "<pad> " + prompt + "<pad> w5 ", "chosen": "w1 <pad> w2 <eos>", "rejected": "<pad> <eos>"},
        {"prompt": "w9 ", "chosen": " ".join(["w7"] * 90), "rejected": "w8"},
    ]
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        runs = [
            train_pairs(tokenizer, Dataset.from_list(rows), tmp_path, trainer_class=trainer_class, max_length=50)
            for trainer_class in (None, PrefixSharingDPOTrainer)
        ]
    finally:
        tokenizer.padding_side = before
    assert_same(runs[1], runs[0])
