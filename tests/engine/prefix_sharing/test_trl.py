"""TRL's own DPO trainer with and without shared prefixes: loss, every logged metric, and the weights after 3 steps."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow import share_prefixes

trl = pytest.importorskip("trl", reason="needs the extra train")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from longshadow import PrefixSharingDPOTrainer, PrefixSharingGRPOTrainer, PrefixSharingRLOOTrainer  # noqa: E402

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
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, sliding_window=24, query_pre_attn_scalar=8),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {f"w{index}": index for index in range(VOCABULARY - 3)}
    vocabulary |= {"<pad>": VOCABULARY - 3, "<eos>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def preferences() -> Any:
    chance = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{chance.randrange(VOCABULARY - 3)}" for _ in range(chance.randint(shortest, longest)))

    rows = [
        {"prompt": text(20, 60) + " ", "chosen": text(3, 30) + " <eos>", "rejected": text(3, 30) + " <eos>"}
        for _ in range(8)
    ]
    return Dataset.from_list(rows)


def train(
    tokenizer: Any,
    preferences: Any,
    folder: Path,
    *,
    share: bool = False,
    trainer_class: Any = None,
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    lora: bool = False,
    **arguments: Any,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logged metrics of each step, and the trained weights."""
    torch.manual_seed(1)
    attention = "eager" if family == "gemma2" else "sdpa"  # SDPA has no soft-cap
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention, dtype=dtype)
    reference = None
    if not lora:
        reference = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention, dtype=dtype)
    config = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_length=96,
        **arguments,
    )
    trainer = (trainer_class or trl.DPOTrainer)(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
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
        reports = [trainer.policy_sharing, *([] if lora else [trainer.reference_sharing])]
        assert all(report.shared_batches >= STEPS and not report.ordinary_batches for report in reports)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return logged, weights


CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid in fp32": dict(dtype=torch.float32),
    "a mixture with weighting and ld_alpha": dict(
        loss_type=["sigmoid", "bco_pair", "ipo"], loss_weights=[0.8, 0.2, 1.0], use_weighting=True, ld_alpha=0.5
    ),
    "aot, which mixes pairs": dict(loss_type=["aot"]),
    "LoRA, the reference without it": dict(lora=True),
    "precomputed reference": dict(precompute_ref_log_probs=True),
    "soft-cap and sliding window": dict(family="gemma2", dtype=torch.float32),
    "two accumulated batches": dict(gradient_accumulation_steps=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_dpo_is_unchanged(tokenizer: Any, preferences: Any, tmp_path: Path, case: str) -> None:
    arguments = CASES[case]
    expected = train(tokenizer, preferences, tmp_path, **arguments)
    assert_same(train(tokenizer, preferences, tmp_path, share=True, **arguments), expected, arguments.get("dtype"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_shares_by_itself(tokenizer: Any, preferences: Any, tmp_path: Path, lora: bool) -> None:
    expected = train(tokenizer, preferences, tmp_path, lora=lora)
    assert_same(
        train(tokenizer, preferences, tmp_path, lora=lora, trainer_class=PrefixSharingDPOTrainer), expected, None
    )


def assert_same(mine_of: Any, theirs_of: Any, dtype: torch.dtype | None) -> None:
    (actual, weights), (expected, expected_weights) = mine_of, theirs_of
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5
    assert len(actual) == len(expected) == STEPS
    timed = {"epoch", "step", "total_flos"} | {key for key in expected[0] if "time" in key or "per_second" in key}
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs.keys() - timed:
            assert abs(mine[key] - theirs[key]) <= tolerance * max(1, abs(theirs[key])), key
    for name, weight in weights.items():
        difference = (weight - expected_weights[name]).abs()
        assert (difference <= tolerance * expected_weights[name].abs().clamp(min=1)).all(), name
    assert all(entry["grad_norm"] > 1e-3 for entry in actual), "nothing was learned: the test is blind"


def train_groups(
    kind: str, tokenizer: Any, folder: Path, *, share: bool, batches: int
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], Any]:
    """GRPO or RLOO with two groups of four per generation, split into `batches` micro-batches."""
    ours = {"GRPO": PrefixSharingGRPOTrainer, "RLOO": PrefixSharingRLOOTrainer}[kind]
    chance = random.Random(0)
    prompts = [" ".join(f"w{chance.randrange(VOCABULARY - 3)}" for _ in range(length)) for length in (30, 19, 25, 40)]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa", dtype=torch.float64)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=8 // batches,
        gradient_accumulation_steps=batches,
        num_generations=4,
        max_completion_length=12,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        beta=0.0,
    )
    trainer = (ours if share else getattr(trl, f"{kind}Trainer"))(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return logged, weights, trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_groups_are_unchanged(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    *expected, _ = train_groups(kind, tokenizer, tmp_path, share=False, batches=1)
    *actual, trainer = train_groups(kind, tokenizer, tmp_path, share=True, batches=1)
    assert trainer.policy_sharing.shared_batches >= STEPS
    assert trainer.policy_sharing.padded_tokens > 2 * trainer.policy_sharing.unique_tokens
    assert_same(actual, expected, None)


@pytest.mark.slow
def test_micro_batches_hold_whole_groups(tokenizer: Any, tmp_path: Path) -> None:
    *_, trainer = train_groups("GRPO", tokenizer, tmp_path, share=True, batches=2)
    for batch in trainer._buffered_inputs:
        assert len(batch["prompt_ids"].unique(dim=0)) == 1
    assert trainer.policy_sharing.padded_tokens > 2 * trainer.policy_sharing.unique_tokens
