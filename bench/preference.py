"""Steps of TRL's trainers on given batches: no data set, no generation, no optimizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PairLengths:
    """Tokens of a prompt and its two answers."""

    prompt: int
    chosen: int
    rejected: int


def pair_batch(lengths: Sequence[PairLengths], *, vocabulary: int, seed: int, share: bool = True) -> Batch:
    """Random tokens as TRL's DPO collator pads them: chosen rows, then rejected ones. The first answer tokens differ.

    Without `share` no two rows begin alike, so that the same batch has nothing to share but its padding to lose.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    prompts = [text(pair.prompt) for pair in lengths]
    answers = [[2, *text(pair.chosen - 1)] for pair in lengths] + [[3, *text(pair.rejected - 1)] for pair in lengths]
    rows = [prompt + answer for prompt, answer in zip(prompts * 2, answers, strict=True)]
    if not share:
        rows = [[4 + number, *row[1:]] for number, row in enumerate(rows)]
    longest = max(map(len, rows))
    ids, mask, answered = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
        answered[number, len(row) - len(answer) : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answered}


def group_batch(prompt: int, response: int, size: int, *, vocabulary: int, seed: int) -> Batch:
    """A group of completions of one prompt, as TRL's GRPO trainer keeps it; advantages rise along it.

    The completions' first tokens differ.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (1, prompt), generator=generator).expand(size, -1).contiguous()
    completions = torch.randint(4, vocabulary, (size, response), generator=generator)
    completions[:, 0] = torch.arange(size)
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.linspace(-1, 1, size),
        "num_items_in_batch": torch.tensor(float(completions.numel())),
    }


def pair_trainer(trainer_class: Any, policy: nn.Module, reference: nn.Module, **options: Any) -> Any:
    """A DPO trainer that `pair_step` can step."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig

    data = Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}])
    trainer = trainer_class(
        model=policy,
        ref_model=reference,
        args=DPOConfig(max_length=None, **_arguments()),
        train_dataset=data,
        processing_class=_tokenizer(),
        **options,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def group_trainer(trainer_class: Any, policy: nn.Module, group: int, **options: Any) -> Any:
    """A GRPO trainer, without a reference, that `group_step` can step."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig

    trainer = trainer_class(
        model=policy,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(num_generations=group, per_device_train_batch_size=group, beta=0.0, **_arguments()),
        train_dataset=Dataset.from_list([{"prompt": "a "}]),
        processing_class=_tokenizer(),
        **options,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def pair_step(trainer: Any, batch: Batch) -> float:
    """Reference pass, policy pass, backward; new gradients replace the old ones. Returns the loss."""
    trainer.model.zero_grad(set_to_none=True)
    with _sharing(trainer):
        return float(trainer.training_step(trainer.model, dict(batch)).detach())


def group_step(trainer: Any, batch: Batch) -> float:
    """Policy pass and backward on completions that are there. Returns the loss."""
    trainer.model.zero_grad(set_to_none=True)
    with _sharing(trainer):
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
    return float(loss.detach())


def _sharing(trainer: Any) -> AbstractContextManager[None]:
    """What the trainer's own `train` does around its steps."""
    ours: AbstractContextManager[None] | None = trainer.sharing() if hasattr(trainer, "sharing") else None
    return nullcontext() if ours is None else ours


@contextmanager
def without_backbone(*models: nn.Module) -> Iterator[None]:
    """Within, the models' backbones give ones at once: what remains of a step is its head and its loss."""
    replaced: list[tuple[Any, Callable[..., Any]]] = []
    for model in models:
        backbone: Any = model.base_model
        replaced.append((backbone, backbone.forward))
        backbone.forward = _ones_of(backbone)
    try:
        yield
    finally:
        for backbone, forward in replaced:
            backbone.forward = forward


def _ones_of(backbone: Any) -> Callable[..., Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    weight = backbone.norm.weight

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        ones = torch.ones(*input_ids.shape, len(weight), dtype=weight.dtype, device=weight.device)
        return BaseModelOutputWithPast(last_hidden_state=ones * weight)

    return forward


def largest_gradient_error(model: nn.Module, expected: nn.Module) -> float:
    """Of all gradients, relative to the largest of their parameter."""
    return max(
        float((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max())
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True)
        if mine.grad is not None and theirs.grad is not None
    )


def _arguments() -> dict[str, Any]:
    cpu = not torch.cuda.is_available()
    return dict(
        output_dir=tempfile.mkdtemp(prefix="longshadow-bench-"),
        report_to=[],
        bf16=not cpu,
        use_cpu=cpu,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
