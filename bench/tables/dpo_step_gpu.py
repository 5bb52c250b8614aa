"""One DPO step in plain PyTorch: the padded batch against shared prefixes, by every attention the device has."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from bench.peak import PeakMemoryMeter
from bench.preference import Batch, PairLengths, pair_batch
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, SMOLLM2_135M, num_threads
from bench.table import Column, Outcome, Table
from bench.timing import Candidate, paired_speedup, time_interleaved
from longshadow import PrefixTree, share_prefixes
from longshadow.engine.prefix_sharing.attention import choose_attention

SHAPES = {"llama-3.1-8b": LLAMA_3_1_8B, "smollm2-135m": SMOLLM2_135M}
PADDED = "padded batch, SDPA"
BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A batch of `pairs` pairs."""

    pairs: int
    prompt: int
    response: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """A shape of `SHAPES` with fewer layers, random weights."""

    shape: str
    layers: int
    cells: tuple[Cell, ...]
    dtype: str
    repeats: int
    tolerance: float
    attentions: tuple[str, ...] = ("chains", "flex", "varlen")
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """Each cell: all ways of the same step interleaved."""
    rows: list[Row] = []
    shape = replace(SHAPES[config.shape], num_layers=config.layers)
    dtype = getattr(torch, config.dtype)
    with num_threads(config.threads):
        policy, reference = (
            shape.model(
                dtype=dtype,
                device=session.device,
                seed=session.seed + number,
                max_positions=max(cell.prompt + cell.response for cell in config.cells),
            )
            for number in (0, 1)
        )
        policy.set_attn_implementation("sdpa")
        reference.set_attn_implementation("sdpa")
        able = [name for name in config.attentions if _can(name, policy, session)]
        session.progress("checking")
        error = max(largest_error(policy, reference, name, batch_of(config.cells[0], config, session)) for name in able)
        for cell in config.cells:
            session.progress(f"{cell.pairs} pairs, prompt {cell.prompt:,}, answers {cell.response:,}")
            rows += measure(policy, reference, able, cell, config, session)
    check = Check(
        passed=error <= config.tolerance,
        max_error=error,
        text="gradients of shared steps against the padded step's, norm of the difference / norm of the parameter's "
        f"gradient, largest = {error:.1e} (at most {config.tolerance:.0e})",
    )
    return Outcome(rows=rows, check=check)


def _can(attention: str, model: LlamaForCausalLM, session: Session) -> bool:
    config = model.config
    query = torch.empty(1, config.num_attention_heads, 8, config.head_dim, dtype=model.dtype, device=model.device)
    try:
        choose_attention(attention, query.requires_grad_(), dropout=0.0, softcap=None, sinks=None)
    except ValueError as reason:
        session.progress(str(reason))
        return False
    return True


def batch_of(cell: Cell, config: Config, session: Session) -> Batch:
    """Random pairs without padding."""
    lengths = PairLengths(prompt=cell.prompt, chosen=cell.response, rejected=cell.response)
    batch = pair_batch([lengths] * cell.pairs, vocabulary=SHAPES[config.shape].vocab_size, seed=session.seed)
    return {name: tensor.to(session.device) for name, tensor in batch.items()}


def answer_logps(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """log p(answer) of each row; only the answers' positions meet the vocabulary."""
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    answered = batch["completion_mask"][:, 1:].bool()
    logits = model.lm_head(hidden[:, :-1][answered])
    logps = -F.cross_entropy(logits.float(), batch["input_ids"][:, 1:][answered], reduction="none")
    return logps.view(len(answered), -1).sum(1)


def padded_step(policy: LlamaForCausalLM, reference: LlamaForCausalLM, batch: Batch) -> None:
    """Reference pass, policy pass, backward; gradients replace the old ones."""
    policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        reference_logps = answer_logps(reference, batch)
    chosen, rejected = (answer_logps(policy, batch) - reference_logps).chunk(2)
    (-F.logsigmoid(BETA * (chosen - rejected)).mean()).backward()


def shared_step(policy: LlamaForCausalLM, reference: LlamaForCausalLM, batch: Batch, attention: str) -> None:
    """The same under shared prefixes."""
    with ExitStack() as stack:
        for model in (policy, reference):
            stack.enter_context(share_prefixes(model, verify_first_batch=False, attention=attention))
        padded_step(policy, reference, batch)


def largest_error(policy: LlamaForCausalLM, reference: LlamaForCausalLM, attention: str, batch: Batch) -> float:
    """Of the gradients, relative to their parameter's."""
    padded_step(policy, reference, batch)
    expected = [p.grad for p in policy.parameters() if p.grad is not None]
    shared_step(policy, reference, batch, attention)
    actual = [p.grad for p in policy.parameters() if p.grad is not None]
    return max(
        float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        for mine, theirs in zip(actual, expected, strict=True)
    )


def measure(
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    attentions: list[str],
    cell: Cell,
    config: Config,
    session: Session,
) -> list[Row]:
    """The rows of one cell."""
    batch = batch_of(cell, config, session)
    steps = {PADDED: partial(padded_step, policy, reference, batch)}
    for name in attentions:
        steps[f"share_prefixes, {name}"] = partial(shared_step, policy, reference, batch, name)
    meters: dict[str, PeakMemoryMeter] = {}

    def metered(name: str) -> None:
        with meters[name]:
            steps[name]()

    def renew(name: str) -> None:
        meters[name] = PeakMemoryMeter(session.device)

    timings = time_interleaved(
        {name: Candidate(run=partial(metered, name), prepare=partial(renew, name)) for name in steps},
        repeats=config.repeats,
        warmup=2,
        device=session.device,
    )
    ratio = PrefixTree.from_batch(batch["input_ids"]).token_ratio
    rows: list[Row] = []
    for name, timing in timings.items():
        row: Row = {"pairs": cell.pairs, "prompt": cell.prompt, "response": cell.response, "method": name}
        row |= timing.row() | {"peak": meters[name].bytes, "ratio": ratio}
        row["tokens_per_s"] = batch["input_ids"].numel() / timing.median
        row["speedup"] = paired_speedup(timings[PADDED], timing)
        rows.append(row)
    return rows


def _quick(config: Config) -> Config:
    return replace(config, cells=(Cell(pairs=2, prompt=64, response=16),), repeats=1)


TABLE: Table = Table(
    name="dpo_step_gpu",
    title="One DPO step in plain PyTorch",
    about="Reference pass, policy pass and backward over pairs without padding, no gradient checkpointing; only the "
    "answers' positions meet the vocabulary, in every row. On a GPU Llama-3.1-8B's shapes with 4 of 32 layers, on a "
    "CPU SmolLM2-135M's with 4 of 30. The padded batch runs torch's SDPA (flash attention on a GPU).",
    configs={
        "cpu": Config(
            shape="smollm2-135m",
            layers=4,
            cells=(Cell(pairs=1, prompt=1024, response=128),),
            dtype="float32",
            repeats=5,
            tolerance=1e-4,
        ),
        "cuda": Config(
            shape="llama-3.1-8b",
            layers=4,
            cells=(
                Cell(pairs=4, prompt=256, response=128),
                Cell(pairs=4, prompt=1024, response=128),
                Cell(pairs=4, prompt=1024, response=512),
                Cell(pairs=2, prompt=4096, response=256),
                Cell(pairs=1, prompt=16384, response=512),
            ),
            dtype="bfloat16",
            repeats=10,
            tolerance=3e-2,
        ),
    },
    quick=_quick,
    columns=(
        Column(key="pairs", heading="pairs", unit="count"),
        Column(key="prompt", heading="prompt", unit="count"),
        Column(key="response", heading="answers", unit="count"),
        Column(key="method", heading="method"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="tokens_per_s", heading="padded tokens/s", unit="tok/s"),
        Column(key="peak", heading="peak memory", unit="B"),
        Column(key="ratio", heading="token ratio", unit="x"),
        Column(key="speedup", heading="× padded", unit="x", speedup=True),
    ),
    targets=(),
    run=run,
)
