"""TRL's other trainers under `share_prefixes`: which of their numbers stay, and which look at padding.

The rows of README's table of what is TRL's: ORPO, CPO, KTO and online DPO here, DPO in test_dpo and test_packing, GRPO
and RLOO in test_groups, reward models in test_reward, what runs the ordinary way or is refused in test_trial,
test_backbone and test_lifecycle.
"""

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from longshadow import share_prefixes
from tests.engine.prefix_sharing.trainers.runs import assert_same, model_of, number_of_words

ARGUMENTS: dict[str, Any] = dict(
    per_device_train_batch_size=4,
    max_steps=2,
    learning_rate=1e-3,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    disable_tqdm=True,
    gradient_checkpointing=False,
)


def of(kind: str, module: str) -> tuple[Any, Any]:
    """A trainer's class and its configuration's."""
    found = importlib.import_module(module)
    return getattr(found, f"{kind}Trainer"), getattr(found, f"{kind}Config")


def paired(kind: str, module: str, **given: Any) -> Callable[..., Any]:
    def make(tokenizer: Any, preferences: Any, folder: Path) -> Any:
        trainer, config = of(kind, module)
        arguments = config(output_dir=str(folder), max_length=96, **ARGUMENTS, **given)
        model = model_of("llama", torch.float64)
        return trainer(model=model, args=arguments, train_dataset=preferences, processing_class=tokenizer)

    return make


def unpaired(tokenizer: Any, preferences: Any, folder: Path) -> Any:
    trainer, config = of("KTO", "trl")
    rows = [
        dict(prompt=row["prompt"], completion=row[answer], label=answer == "chosen")
        for row in preferences
        for answer in ("chosen", "rejected")
    ]
    return trainer(
        model=model_of("llama", torch.float64),
        ref_model=model_of("llama", torch.float64),
        args=config(output_dir=str(folder), max_length=96, **(ARGUMENTS | dict(per_device_train_batch_size=8))),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def online(tokenizer: Any, preferences: Any, folder: Path) -> Any:
    trainer, config = of("OnlineDPO", "trl.experimental.online_dpo")
    model_of("llama", torch.float64).save_pretrained(folder / "model")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64) for _ in range(2))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    arguments = config(output_dir=str(folder), max_new_tokens=8, missing_eos_penalty=None, **ARGUMENTS)
    return trainer(
        model=policy,
        ref_model=reference,
        reward_funcs=number_of_words,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences]),
        processing_class=tokenizer,
    )


LOGITS = {"logits/chosen", "logits/rejected"}
# KTO's have been means over real tokens since it left trl.experimental.
KTO_LOGITS = LOGITS if any("experimental" in base.__module__ for base in of("KTO", "trl")[0].__mro__) else set()
KL = {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward", "objective/entropy"}
TRAINERS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "ORPO": (paired("ORPO", "trl.experimental.orpo"), LOGITS),
    "SimPO": (paired("CPO", "trl.experimental.cpo", loss_type="simpo", cpo_alpha=0.5), LOGITS),
    "KTO": (unpaired, KTO_LOGITS),
    "online DPO": (online, KL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_loss_and_weights_stay(tokenizer: Any, preferences: Any, tmp_path: Path, name: str) -> None:
    """All metrics but those that average or sum over padding, where sharing computes nothing."""
    make, over_padding = TRAINERS[name]
    runs = []
    for share in (False, True):
        torch.manual_seed(1)
        try:
            trainer = make(tokenizer, preferences, tmp_path)
        except (ImportError, TypeError) as error:  # an older TRL; the pinned one has to have all
            pytest.skip(f"TRL alone fails: {error}")
        with ExitStack() as stack:
            reports = [
                stack.enter_context(share_prefixes(model))
                for model in (trainer.model, getattr(trainer, "ref_model", None))
                if share and model is not None
            ]
            trainer.train()
        assert all(report.shared_batches and not report.ordinary_batches for report in reports)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((logged, {key: p.detach().clone() for key, p in trainer.model.named_parameters()}))
    (theirs, _), (mine, _) = runs
    differing = {
        key
        for expected, actual in zip(theirs, mine, strict=True)
        for key in expected
        if "time" not in key and abs(actual[key] - expected[key]) > 1e-5 * max(1, abs(expected[key]))
    }
    assert differing == over_padding
    for entry in (*theirs, *mine):
        for key in over_padding:
            entry.pop(key)
    assert_same(runs[1], runs[0])
