"""One training step of a preference or group loss: the padded batch against shared prefixes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from bench.peak import PeakMemoryMeter
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import SMOLLM2_135M, num_threads
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, paired_speedup, time_interleaved
from longshadow import PrefixTree, share_prefixes

SHAPE = SMOLLM2_135M
PADDED, SHARED, HEAD = "padded batch", "share_prefixes", "head and loss alone"
PAIR, GROUP = "pair", "group of 8"
BETA = 0.1
TOLERANCE = 1e-4
LEAST_RATIO = 1.1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Rows of one prompt: a pair of answers, or a group of eight."""

    kind: str
    prompt: int
    response: int

    @property
    def num_rows(self) -> int:
        """Answers to the prompt."""
        return 2 if self.kind == PAIR else 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """SmolLM2's architecture with random weights, one prompt per step. The targets are for two threads of a CPU."""

    cells: tuple[Cell, ...] = (
        Cell(kind=PAIR, prompt=256, response=128),
        Cell(kind=PAIR, prompt=512, response=128),
        Cell(kind=PAIR, prompt=1024, response=64),
        Cell(kind=PAIR, prompt=1024, response=128),
        Cell(kind=PAIR, prompt=1024, response=256),
        Cell(kind=GROUP, prompt=1024, response=128),
    )
    repeats: int = 2
    dtype: str = "float32"
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """Each cell: both ways of the same step interleaved, and what the head takes of it."""
    rows: list[Row] = []
    errors = []
    with num_threads(config.threads):
        policy, reference = (
            SHAPE.model(
                dtype=getattr(torch, config.dtype),
                device=session.device,
                seed=session.seed + number,
                max_positions=max(cell.prompt + cell.response for cell in config.cells),
            )
            for number in (0, 1)
        )
        session.progress("checking")
        errors.append(largest_error(policy, reference, make_batch(config.cells[0], session)))
        for cell in config.cells:
            session.progress(f"{cell.kind}, prompt {cell.prompt:,}, answers {cell.response:,}")
            rows += measure(policy, reference, cell, config, session)
    check = Check(
        passed=max(errors) <= TOLERANCE,
        max_error=max(errors),
        text="gradients of the shared step against the padded step's, largest difference / largest gradient of the "
        f"parameter = {max(errors):.1e} (at most {TOLERANCE:.0e})",
    )
    return Outcome(rows=rows, check=check)


def make_batch(cell: Cell, session: Session) -> torch.Tensor:
    """Random tokens [rows, prompt + response]; all rows begin with the same prompt."""
    generator = torch.Generator().manual_seed(session.seed + cell.prompt + cell.response)
    prompt = torch.randint(SHAPE.vocab_size, (1, cell.prompt), generator=generator)
    answers = torch.randint(SHAPE.vocab_size, (cell.num_rows, cell.response), generator=generator)
    return torch.cat([prompt.expand(cell.num_rows, -1), answers], 1).to(session.device)


def answer_logps(model: LlamaForCausalLM, ids: torch.Tensor, num_prompt: int) -> torch.Tensor:
    """log p(answer) of each row; every position goes through the head, as in TRL on a CPU."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logps_of(logits, ids, num_prompt)


def logps_of(logits: torch.Tensor, ids: torch.Tensor, num_prompt: int) -> torch.Tensor:
    """Sums over the answers' tokens, [rows]."""
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return logps[:, num_prompt - 1 :].sum(1)


def loss_of(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """DPO's loss for a pair; for a group, advantages that rise along it times the log-ratios."""
    ratios = logps - reference_logps
    if len(ratios) == 2:
        return -F.logsigmoid(BETA * (ratios[0] - ratios[1]))
    return -(torch.linspace(-1, 1, len(ratios), device=ratios.device) * ratios).mean()


def step(policy: LlamaForCausalLM, reference: LlamaForCausalLM, ids: torch.Tensor, num_prompt: int) -> None:
    """Reference pass, policy pass, backward; gradients replace the old ones."""
    policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        reference_logps = answer_logps(reference, ids, num_prompt)
    loss_of(answer_logps(policy, ids, num_prompt), reference_logps).backward()


def shared_step(policy: LlamaForCausalLM, reference: LlamaForCausalLM, ids: torch.Tensor, num_prompt: int) -> None:
    """The same under shared prefixes."""
    with ExitStack() as stack:
        for model in (policy, reference):
            stack.enter_context(share_prefixes(model, verify_first_batch=False))
        step(policy, reference, ids, num_prompt)


def head_step(policy: LlamaForCausalLM, reference: LlamaForCausalLM, ids: torch.Tensor, num_prompt: int) -> None:
    """The part of a step that sharing leaves as it is: both heads and the loss, from given hidden states."""
    policy.zero_grad(set_to_none=True)
    hidden = torch.ones(*ids.shape, SHAPE.hidden_size, dtype=policy.dtype, device=ids.device, requires_grad=True)
    with torch.no_grad():
        reference_logps = logps_of(reference.lm_head(hidden), ids, num_prompt)
    loss_of(logps_of(policy.lm_head(hidden), ids, num_prompt), reference_logps).backward()


def largest_error(policy: LlamaForCausalLM, reference: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Of the gradients, relative to the largest of their parameter."""
    num_prompt = ids.shape[1] * 2 // 3
    step(policy, reference, ids, num_prompt)
    expected = [p.grad for p in policy.parameters() if p.grad is not None]
    shared_step(policy, reference, ids, num_prompt)
    actual = [p.grad for p in policy.parameters() if p.grad is not None]
    return max(
        float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in zip(actual, expected, strict=True)
    )


def measure(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, cell: Cell, config: Config, session: Session
) -> list[Row]:
    """The rows of one cell."""
    ids = make_batch(cell, session)
    steps = {PADDED: step, SHARED: shared_step, HEAD: head_step}
    meters: dict[str, PeakMemoryMeter] = {}

    def metered(name: str) -> None:
        with meters[name]:
            steps[name](policy, reference, ids, cell.prompt)

    def renew(name: str) -> None:
        meters[name] = PeakMemoryMeter(session.device)

    timings = time_interleaved(
        {name: Candidate(run=partial(metered, name), prepare=partial(renew, name)) for name in steps},
        repeats=config.repeats,
        warmup=1,
        device=session.device,
    )
    ratio = PrefixTree.from_batch(ids).token_ratio
    head_share = timings[HEAD].median / timings[PADDED].median
    bound = 1 / (head_share + (1 - head_share) / ratio)
    rows: list[Row] = []
    for name, timing in timings.items():
        row: Row = {"kind": cell.kind, "prompt": cell.prompt, "response": cell.response, "method": name}
        row |= timing.row() | {"peak": meters[name].bytes}
        if name == HEAD:
            row["share"] = head_share
        else:
            row["speedup"] = paired_speedup(timings[PADDED], timing)
        if name == SHARED:
            row |= {"ratio": ratio, "bound": bound, "reached": row["speedup"] / bound}
        rows.append(row)
    return rows


def _quick(config: Config) -> Config:
    return replace(config, cells=(Cell(kind=PAIR, prompt=64, response=16),), repeats=1)


def _targets() -> list[Target]:
    targets = []
    for cell in Config().cells:
        row = {"kind": cell.kind, "prompt": cell.prompt, "response": cell.response, "method": SHARED}
        place = f"{cell.kind}, prompt {cell.prompt:,}, answers {cell.response}"
        if cell.kind == GROUP:
            targets.append(Target(text=f"{place}: speed-up", row=row, column="speedup", at_least=3.0))
        elif cell.prompt >= 512:
            targets.append(Target(text=f"{place}: of the bound", row=row, column="reached", at_least=0.85))
        targets.append(Target(text=f"{place}: never slower", row=row, column="speedup", at_least=0.97))
    return targets


TABLE: Table = Table(
    name="dpo_step",
    title="One preference step",
    about="SmolLM2-135M's architecture with random weights, one prompt per step, no padding: reference pass, policy "
    "pass, backward, in plain PyTorch with SDPA; every position goes through the LM head, as TRL has it on a CPU. "
    "Sharing leaves head and loss as they are, so with their share h of the padded step the speed-up is at most "
    "1 / (h + (1 - h) / ratio), where ratio is padded tokens per distinct token.",
    configs={"cpu": Config(), "cuda": Config(dtype="bfloat16", repeats=10)},
    quick=_quick,
    columns=(
        Column(key="kind", heading="rows"),
        Column(key="prompt", heading="prompt", unit="count"),
        Column(key="response", heading="answers", unit="count"),
        Column(key="method", heading="method"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="peak", heading="peak memory", unit="B"),
        Column(key="share", heading="share of padded", unit="%", digits=0),
        Column(key="ratio", heading="token ratio", unit="x"),
        Column(key="speedup", heading="× padded", unit="x", speedup=True),
        Column(key="bound", heading="bound", unit="x", speedup=True),
        Column(key="reached", heading="of the bound", unit="%", digits=0, speedup=True),
    ),
    targets=_targets(),
    run=run,
)
