"""TRL's trainers with shared prefixes in every situation: TRL's step, and the model afterwards."""

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.switching.situations import SITUATIONS, Situation, every_implementation, set_attention

trl = pytest.importorskip("trl", reason="needs the extra train")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from longshadow import PrefixSharingDPOTrainer, PrefixSharingGRPOTrainer  # noqa: E402
from tests.engine.prefix_sharing.trainers.runs import VOCABULARY, model_of, number_of_words  # noqa: E402

# Of weights after one step, whose gradients go through fp32 attention of different forms.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _every_implementation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with every_implementation(monkeypatch):
        yield


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest) -> Iterator[tuple[str, Situation]]:
    chosen = SITUATIONS[request.param]
    torch._dynamo.reset()
    with torch.compiler.set_stance("default" if chosen.compiled else "force_eager"):
        yield request.param, chosen


def train(trainer_class: Any, name: str, situation: Situation, tokenizer: Any, data: Any, folder: Path) -> Any:
    """A trainer after a step, or after the forwards of an evaluation where gradients do not exist."""
    torch.manual_seed(1)
    models = [model_of("llama", torch.float32) for _ in range(2)]
    for model in models:
        set_attention(model, situation.implementation)
    wrapped = [situation.wrap(model) for model in models] if name not in ("PEFT", "torch.compile") else models
    arguments = dict(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        optim="sgd",  # the others' first step depends on signs of gradients alone
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        torch_compile=name == "torch.compile",
        torch_compile_backend="eager" if name == "torch.compile" else None,
    )
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if name == "PEFT" else None
    if issubclass(trainer_class, trl.DPOTrainer):
        trainer = trainer_class(
            model=wrapped[0],
            ref_model=None if adapter else wrapped[1],
            args=trl.DPOConfig(**arguments, max_length=96),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    else:
        trainer = trainer_class(
            model=wrapped[0],
            args=trl.GRPOConfig(**arguments, num_generations=4, max_completion_length=8, beta=0.0),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            reward_funcs=number_of_words,
            peft_config=adapter,
        )
    if situation.learns:
        trainer.train()
    else:
        trainer.evaluate()
    return trainer


def assert_same_step(ours: Any, theirs: Any, situation: Situation) -> None:
    assert ours.policy_sharing.shared_batches > 0 and not ours.policy_sharing.reasons
    key = "loss" if situation.learns else "eval_loss"
    mine, expected = ([log for log in each.state.log_history if key in log] for each in (ours, theirs))
    assert len(mine) == len(expected) == 1
    for name in expected[0]:
        if "time" not in name and "per_second" not in name and name != "total_flos":
            assert mine[0][name] == pytest.approx(expected[0][name], abs=TOLERANCE, rel=TOLERANCE, nan_ok=True), name
    weights = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        if weight.device.type != "meta":
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=TOLERANCE, msg=name)


def assert_as_before(trainer: Any, situation: Situation) -> None:
    """The model after our trainer: no trace, and copies and pickles are plain."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert not [name for module in model.modules() for name in vars(module) if "longshadow" in name]
    assert model.config._attn_implementation == situation.implementation
    ids = torch.arange(2, 30).unsqueeze(0)
    if situation.learns and not situation.compiled:
        with torch.no_grad():
            expected = model.eval()(input_ids=ids).logits
            assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)
            if situation.pickles:
                assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids).logits, expected)


def compare(theirs_of: Any, ours_of: Any, named: tuple[str, Situation], *where: Any) -> None:
    try:
        theirs = train(theirs_of, *named, *where)
    except NotImplementedError as error:  # an offloaded model cannot be moved to the trainer's device
        with pytest.raises(NotImplementedError, match=str(error)[:20]):
            train(ours_of, *named, *where)
        return
    ours = train(ours_of, *named, *where)
    assert_same_step(ours, theirs, named[1])
    assert_as_before(ours, named[1])


@pytest.mark.slow
def test_dpo(situation: tuple[str, Situation], tokenizer: Any, preferences: Any, tmp_path: Path) -> None:
    pairs = preferences.select(range(4))
    compare(trl.DPOTrainer, PrefixSharingDPOTrainer, situation, tokenizer, pairs, tmp_path)


@pytest.mark.slow
def test_grpo(situation: tuple[str, Situation], tokenizer: Any, tmp_path: Path) -> None:
    chance = random.Random(0)
    texts = [" ".join(f"w{chance.randrange(VOCABULARY - 3)}" for _ in range(length)) for length in (30, 19)]
    prompts = Dataset.from_list([{"prompt": text} for text in texts])
    compare(trl.GRPOTrainer, PrefixSharingGRPOTrainer, situation, tokenizer, prompts, tmp_path)
