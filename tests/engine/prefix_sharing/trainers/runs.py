"""Runs of TRL's trainers, with and without shared prefixes, on tiny random models."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3MoeConfig

from longshadow import share_prefixes

trl = pytest.importorskip("trl", reason="needs the extra train")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

Run = tuple[list[dict[str, float]], dict[str, torch.Tensor]]

VOCABULARY, STEPS = 200, 3
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=VOCABULARY - 3,
    eos_token_id=VOCABULARY - 2,
    bos_token_id=None,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3 with experts": lambda: Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, output_router_logits=True
    ),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, sliding_window=24, query_pre_attn_scalar=8),
}


def model_of(family: str, dtype: torch.dtype) -> Any:
    """A new random model, from torch's seed."""
    attention = "eager" if family == "gemma2" else "sdpa"  # SDPA has no soft-cap
    return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention, dtype=dtype)


def train_pairs(
    tokenizer: Any,
    preferences: Any,
    folder: Path,
    *,
    share: bool = False,
    trainer_class: Any = None,
    options: dict[str, Any] | None = None,
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    lora: bool = False,
    **arguments: Any,
) -> Run:
    """Logged metrics of each step, and the trained weights; with `share` in the context, or by our own trainer."""
    torch.manual_seed(1)
    model = model_of(family, dtype)
    reference = None if lora else model_of(family, dtype)
    config = trl.DPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **{"per_device_train_batch_size": 4, "max_length": 96, "bf16": False, **arguments},
    )
    trainer = (trainer_class or trl.DPOTrainer)(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
        **(options or {}),
    )
    if share:
        with share_prefixes(trainer.model) as report:
            if trainer.ref_model is None:
                trainer.train()
            else:
                with share_prefixes(trainer.ref_model):
                    trainer.train()
        assert report.shared_batches >= STEPS and report.ordinary_batches == 0, report.reasons
        assert report.padded_tokens > 1.3 * report.unique_tokens
    else:
        trainer.train()
    if trainer_class is not None:
        precomputed = trainer.args.precompute_ref_log_probs  # and, if these rows had been seen before, cached
        reports = [trainer.policy_sharing, *([] if lora or precomputed else [trainer.reference_sharing])]
        assert all(report.shared_batches >= STEPS and not report.ordinary_batches for report in reports)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return logged, weights


def baseline(*arguments: Any, **options: Any) -> Run:
    """TRL alone. A setting that another version of TRL does not have is skipped; the pinned one has to have all."""
    try:
        return train_pairs(*arguments, **options)
    except Exception as error:
        pytest.skip(f"TRL alone fails: {error}")


def number_of_words(completions: list[str], **_: Any) -> list[float]:
    """A reward: how many different words."""
    return [float(len(set(text.split()))) for text in completions]


def train_groups(
    kind: str, tokenizer: Any, folder: Path, *, trainer_class: Any, batches: int = 1, group: int = 4, **given: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], Any]:
    """GRPO or RLOO with two groups per generation, split into `batches` micro-batches; completions end early, some."""
    chance = random.Random(0)
    prompts = [" ".join(f"w{chance.randrange(VOCABULARY - 3)}" for _ in range(length)) for length in (30, 19, 25, 40)]
    torch.manual_seed(1)
    model_of("llama", torch.float64).save_pretrained(folder / "model")  # where a reference is loaded from
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    options, arguments = {"reward_funcs": number_of_words}, {}
    for name, value in given.items():
        (options if name in ("reward_funcs", "delta_l") else arguments)[name] = value
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=2 * group // batches,
        gradient_accumulation_steps=batches,
        num_generations=group,
        max_completion_length=12,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        # Few words are left to say, so that the end comes up.
        generation_kwargs={"suppress_tokens": list(range(VOCABULARY - 12))},
        **{"beta": 0.0, "max_steps": STEPS, **arguments},
    )
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return logged, weights, trainer


def assert_same(mine_of: Run, theirs_of: Run, dtype: torch.dtype = torch.float64) -> None:
    """Every logged metric and every weight, to 1e-5 in fp64 and 1e-4 in fp32."""
    (actual, weights), (expected, expected_weights) = mine_of, theirs_of
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5
    assert len(actual) == len(expected) > 0
    timed = {"epoch", "step", "total_flos"} | {key for key in expected[0] if "time" in key or "per_second" in key}
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs.keys() - timed:
            assert abs(mine[key] - theirs[key]) <= tolerance * max(1, abs(theirs[key])), key
    for name, weight in weights.items():
        difference = (weight - expected_weights[name]).abs()
        assert (difference <= tolerance * expected_weights[name].abs().clamp(min=1)).all(), name
    assert all(entry["grad_norm"] > 1e-3 for entry in actual), "nothing was learned: the test is blind"
