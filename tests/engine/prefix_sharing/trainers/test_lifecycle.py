"""Trainers on models that live longer than they do: before, after, and when something fails."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from transformers import BloomConfig, TrainerCallback

from longshadow import PrefixSharingDPOTrainer
from longshadow.engine.prefix_sharing import PrefixSharingCallback, enable_prefix_sharing, share_prefixes
from longshadow.engine.prefix_sharing.backbone import is_sharing
from tests.engine.prefix_sharing.trainers.runs import model_of, trl


def make(trainer_class: Any, model: Any, reference: Any, tokenizer: Any, data: Any, folder: Path, **given: Any) -> Any:
    arguments = {name: given.pop(name) for name in ("loss_type", "bf16", "max_steps") if name in given}
    config = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **{"bf16": False, "max_steps": 2, **arguments},
    )
    return trainer_class(
        model=model, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer, **given
    )


@pytest.fixture
def models() -> Any:
    torch.manual_seed(0)
    return model_of("llama", torch.float32), model_of("llama", torch.float32)


def assert_untouched(*models: Any) -> None:
    for model in models:
        assert model.config._attn_implementation == "sdpa" and not is_sharing(model)
        assert "forward" not in vars(model.model)
        ids = torch.arange(12).view(2, 6)
        expected = model(ids).logits
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


@pytest.mark.slow
def test_models_are_their_own_after_training(models: Any, tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    """A notebook's cell run twice, another trainer afterwards, and TRL's own, whose numbers do not change."""
    rest = (*models, tokenizer, preferences, tmp_path)
    twin = [copy.deepcopy(model) for model in models]
    for trainer_class in (PrefixSharingDPOTrainer, PrefixSharingDPOTrainer, trl.DPOTrainer):
        trainer = make(trainer_class, *rest)
        trainer.train()
        assert_untouched(*models)
        theirs = make(trl.DPOTrainer, *twin, *rest[2:])
        theirs.train()
        for mine, expected in zip(trainer.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)


class Failing(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_training_gives_the_models_back(
    models: Any, tokenizer: Any, preferences: Any, tmp_path: Path
) -> None:
    trainer = make(PrefixSharingDPOTrainer, *models, tokenizer, preferences, tmp_path, callbacks=[Failing()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_untouched(*models)
    trainer.remove_callback(Failing)
    trainer.train()
    assert trainer.policy_sharing.shared_batches == 3, "the report goes on"
    with share_prefixes(trainer.model) as report:
        trainer.train()
        assert is_sharing(trainer.model), "the trainer ended the user's own block"
    assert trainer.policy_sharing is report and report.shared_batches == 2


class Untouchable:
    """A data set that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the constructor began its work: {name}")


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packing and a loss over the batch": ("sft", dict(loss_type=["sft"], packing_tokens=100)),
    "packing and a loss nobody knows": ("new_loss", dict(loss_type=["new_loss"], packing_tokens=100)),
    "no pack": ("packing_tokens", dict(packing_tokens=0)),
    "an attention that cannot run": ("flash attention needs a CUDA device", dict(attention="varlen")),
    "an unknown answer to a mismatch": ("on_mismatch", dict(on_mismatch="ignore")),
    "prompt tuning": (
        "prompt-learning",
        dict(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(models: Any, tokenizer: Any, tmp_path: Path, case: str) -> None:
    reason, options = REFUSED[case]
    if case == "an attention that cannot run" and torch.cuda.is_available():
        pytest.skip("it can run here")
    with pytest.raises(ValueError, match=reason) as refusal:
        make(PrefixSharingDPOTrainer, *models, tokenizer, Untouchable(), tmp_path, **options)
    assert "\n" not in str(refusal.value)
    assert_untouched(*models)


@pytest.mark.slow
def test_a_refused_constructor_can_be_corrected(models: Any, tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    policy, reference = models
    reference.config.layer_types = ["linear_attention"] * 2
    with pytest.raises(ValueError, match="linear_attention"):
        make(PrefixSharingDPOTrainer, policy, reference, tokenizer, preferences, tmp_path)
    reference.config.layer_types = None
    make(PrefixSharingDPOTrainer, policy, reference, tokenizer, preferences, tmp_path).train()
    assert_untouched(policy, reference)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_after_training_shares(
    models: Any, tokenizer: Any, preferences: Any, tmp_path: Path, bf16: bool
) -> None:
    """Mixed precision wraps the forward of the policy for good, ours below it; it is used again."""
    rest = (tokenizer, preferences, tmp_path)
    logs = []
    for trainer_class in (trl.DPOTrainer, PrefixSharingDPOTrainer):
        trainer = make(trainer_class, *map(copy.deepcopy, models), *rest, bf16=bf16, eval_dataset=preferences)
        trainer.train()
        trainer.evaluate()
        # Older versions of TRL return the loss alone, and log all.
        logs.append(trainer.state.log_history[-1])
    assert logs[0].keys() == logs[1].keys()
    for key in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins"):
        assert abs(logs[0][key] - logs[1][key]) <= (2e-2 if bf16 else 1e-4) * max(1, abs(logs[0][key])), key
    assert trainer.policy_sharing.shared_batches == 2 + 1 and not trainer.policy_sharing.ordinary_batches
    assert not is_sharing(trainer.model)


@pytest.mark.slow
def test_what_was_shared_is_logged_and_told(
    models: Any, tokenizer: Any, preferences: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By our trainers where it is asked for, and by the callback under TRL's own."""
    added = {"prefix_sharing/token_ratio", "prefix_sharing/shared_batches"}
    rest = (*models, tokenizer, preferences, tmp_path)
    ours = make(PrefixSharingDPOTrainer, *rest, log_sharing=True)
    ours.train()
    assert "prefix sharing: 2 of 2 batches shared" in capsys.readouterr().err
    theirs = make(trl.DPOTrainer, *rest)
    report = enable_prefix_sharing(theirs.model)
    theirs.callback_handler.callbacks.insert(0, PrefixSharingCallback(report))
    with share_prefixes(theirs.model):
        theirs.train()
    assert "prefix sharing: 2 of 2 batches shared" in capsys.readouterr().err
    for trainer, counted in ((ours, ours.policy_sharing), (theirs, report)):
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(steps) == 2 and all(added <= set(entry) for entry in steps)
        assert steps[-1]["prefix_sharing/token_ratio"] == counted.token_ratio > 1.5
        assert steps[-1]["prefix_sharing/shared_batches"] == 1


def test_a_model_by_name_is_refused_by_its_configuration(tmp_path: Path) -> None:
    """Its folder holds nothing else, so the parent would find no weights."""
    BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BloomForCausalLM cannot share prefixes: its attention"):
        PrefixSharingDPOTrainer(model=str(tmp_path), args=None)
