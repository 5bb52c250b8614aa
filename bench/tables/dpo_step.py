"""One step of TRL's DPO and GRPO trainers: as it is, under `share_prefixes`, and by the drop-in trainers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.peak import PeakMemoryMeter
from bench.preference import (
    Batch,
    PairLengths,
    group_batch,
    group_step,
    group_trainer,
    largest_gradient_error,
    pair_batch,
    pair_step,
    pair_trainer,
    without_backbone,
)
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import SMOLLM2_135M, num_threads
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, paired_speedup, time_interleaved
from longshadow import PrefixTree, share_prefixes

SHAPE = SMOLLM2_135M
PAIR, GROUP = "pair", "group of 8"
TRL, HEAD, LABELLED = "TRL as it is", "TRL: head and loss alone", "labelled positions only"
CONTEXT, DROP_IN = "share_prefixes", "drop-in trainer"
GROUP_SIZE = 8
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Rows of one prompt: a pair of answers, or a group of eight."""

    kind: str = PAIR
    prompt: int
    response: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """SmolLM2's architecture with random weights, one prompt per step. The targets are for two threads of a CPU."""

    cells: tuple[Cell, ...] = (
        *(Cell(prompt=prompt, response=response) for prompt, response in product((256, 1024, 2048), (64, 128, 256))),
        Cell(kind=GROUP, prompt=1024, response=128),
    )
    repeats: int = 2
    dtype: str = "float32"
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """Each cell: all ways of the same step interleaved. A cell is a unit that an interrupted run does not repeat."""
    rows: list[Row] = []
    errors: list[float] = []
    with num_threads(config.threads):
        for kind, make, check, measure in (
            (PAIR, pair_trainers, pair_error, measure_pairs),
            (GROUP, group_trainers, group_error, measure_group),
        ):
            cells = [cell for cell in config.cells if cell.kind == kind]
            if not cells:
                continue
            session.progress(f"{kind}: checking")
            # One kind after the other: the trainers of both, each with models of its own, would not fit.
            trainers = make(config, session)
            errors.append(check(trainers, cells[0], session))
            for cell in cells:
                place = f"{cell.kind}, prompt {cell.prompt:,}, answers {cell.response:,}"
                session.progress(place)
                rows += session.unit(place, partial(measure, trainers, cell, config, session))
            del trainers
    check = Check(
        passed=max(errors) <= TOLERANCE,
        max_error=max(errors),
        text="losses, and gradients relative to the largest of their parameter, of every way against TRL's, largest "
        f"difference = {max(errors):.1e} (at most {TOLERANCE:.0e})",
    )
    return Outcome(rows=rows, check=check)


def make_model(config: Config, session: Session, number: int) -> LlamaForCausalLM:
    """Random weights from the seed and `number`."""
    return SHAPE.model(
        dtype=getattr(torch, config.dtype),
        device=session.device,
        seed=session.seed + number,
        max_positions=max(cell.prompt + cell.response for cell in config.cells),
    )


def pair_trainers(config: Config, session: Session) -> dict[str, Any]:
    """One of each, over models of their own; training never steps, so weights stay equal."""
    from trl.trainer.dpo_trainer import DPOTrainer

    from longshadow import PrefixSharingDPOTrainer

    def trainer(trainer_class: Any, **options: Any) -> Any:
        policy, reference = (make_model(config, session, number) for number in (0, 1))
        return pair_trainer(trainer_class, policy, reference, **options)

    return {
        TRL: trainer(DPOTrainer),
        LABELLED: trainer(PrefixSharingDPOTrainer, minimum_ratio=math.inf, verify_first_batch=False),
        DROP_IN: trainer(PrefixSharingDPOTrainer, verify_first_batch=False),
    }


def group_trainers(config: Config, session: Session) -> dict[str, Any]:
    """As `pair_trainers`, of GRPO; with gradient checkpointing, since a padded group's activations are large."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    from longshadow import PrefixSharingGRPOTrainer

    def trainer(trainer_class: Any, **options: Any) -> Any:
        policy = make_model(config, session, 0)
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        return group_trainer(trainer_class, policy, GROUP_SIZE, **options)

    return {TRL: trainer(GRPOTrainer), DROP_IN: trainer(PrefixSharingGRPOTrainer, verify_first_batch=False)}


def shared_step(trainer: Any, batch: Batch) -> float:
    """TRL's own trainer within the context."""
    with (
        share_prefixes(trainer.model, verify_first_batch=False),
        share_prefixes(trainer.ref_model, verify_first_batch=False),
    ):
        return pair_step(trainer, batch)


def head_step(trainer: Any, batch: Batch) -> float:
    """What sharing leaves as it is: both heads and the loss, from given hidden states."""
    with without_backbone(trainer.model, trainer.ref_model):
        return pair_step(trainer, batch)


def pairs_of(cell: Cell, session: Session) -> Batch:
    """One pair, no padding."""
    lengths = PairLengths(prompt=cell.prompt, chosen=cell.response, rejected=cell.response)
    return pair_batch([lengths], vocabulary=SHAPE.vocab_size, seed=session.seed + cell.prompt + cell.response)


def group_of(cell: Cell, session: Session) -> Batch:
    """One group, no padding."""
    return group_batch(cell.prompt, cell.response, GROUP_SIZE, vocabulary=SHAPE.vocab_size, seed=session.seed)


def pair_error(trainers: dict[str, Any], cell: Cell, session: Session) -> float:
    """The largest of losses and gradients of every way, on a batch of the cell's lengths."""
    batch = pairs_of(cell, session)
    baseline, *others = trainers.values()
    loss = shared_step(baseline, batch)
    shared = [None if p.grad is None else p.grad.clone() for p in baseline.model.parameters()]
    expected = pair_step(baseline, batch)
    errors = [abs(loss - expected)]
    for gradient, parameter in zip(shared, baseline.model.parameters(), strict=True):
        if gradient is not None:
            errors.append(float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max()))
    for trainer in others:
        errors.append(abs(pair_step(trainer, batch) - expected))
        errors.append(largest_gradient_error(trainer.model, baseline.model))
    return max(errors)


def group_error(trainers: dict[str, Any], cell: Cell, session: Session) -> float:
    """As `pair_error`, on a group of an eighth of the cell's lengths."""
    group = group_of(replace(cell, prompt=cell.prompt // 8, response=cell.response // 8), session)
    theirs, ours = trainers.values()
    difference = abs(group_step(theirs, group) - group_step(ours, group))
    return max(difference, largest_gradient_error(ours.model, theirs.model))


def measure_pairs(trainers: dict[str, Any], cell: Cell, config: Config, session: Session) -> list[Row]:
    """The rows of one pair's cell."""
    batch = pairs_of(cell, session)
    steps = {
        TRL: partial(pair_step, trainers[TRL], batch),
        HEAD: partial(head_step, trainers[TRL], batch),
        CONTEXT: partial(shared_step, trainers[TRL], batch),
        LABELLED: partial(pair_step, trainers[LABELLED], batch),
        DROP_IN: partial(pair_step, trainers[DROP_IN], batch),
    }
    rows = timed_rows(steps, cell, config, session)
    ratio = PrefixTree.from_batch(batch["input_ids"]).token_ratio
    share = rows[HEAD]["median"] / rows[TRL]["median"]
    rows[HEAD]["share"] = share
    for name, bound in ((CONTEXT, 1 / (share + (1 - share) / ratio)), (DROP_IN, ratio)):
        rows[name] |= {"ratio": ratio, "bound": bound, "reached": rows[name]["speedup"] / bound}
    del rows[HEAD]["speedup"]
    return list(rows.values())


def measure_group(trainers: dict[str, Any], cell: Cell, config: Config, session: Session) -> list[Row]:
    """The rows of one group's cell."""
    batch = group_of(cell, session)
    rows = timed_rows(
        {name: partial(group_step, trainer, batch) for name, trainer in trainers.items()}, cell, config, session
    )
    ratio = PrefixTree.from_batch(torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)).token_ratio
    rows[DROP_IN] |= {"ratio": ratio, "bound": ratio, "reached": rows[DROP_IN]["speedup"] / ratio}
    return list(rows.values())


def timed_rows(steps: dict[str, Any], cell: Cell, config: Config, session: Session) -> dict[str, Row]:
    """Interleaved, each with the peak of its last round."""
    meters: dict[str, PeakMemoryMeter] = {}

    def metered(name: str) -> None:
        with meters[name]:
            steps[name]()

    def renew(name: str) -> None:
        meters[name] = PeakMemoryMeter(session.device)

    timings = time_interleaved(
        {name: Candidate(run=partial(metered, name), prepare=partial(renew, name)) for name in steps},
        repeats=config.repeats,
        warmup=0,
        device=session.device,
    )
    return {
        name: {"kind": cell.kind, "prompt": cell.prompt, "response": cell.response, "method": name}
        | timing.row()
        | {"peak": meters[name].bytes, "speedup": paired_speedup(timings[TRL], timing)}
        for name, timing in timings.items()
    }


def _quick(config: Config) -> Config:
    return replace(config, cells=(Cell(prompt=64, response=16), Cell(kind=GROUP, prompt=64, response=16)), repeats=1)


def _targets() -> list[Target]:
    targets = []
    for cell in Config().cells:
        place = f"{cell.kind}, prompt {cell.prompt:,}, answers {cell.response}"

        def target(method: str, column: str, least: float, text: str, cell: Cell = cell, place: str = place) -> Target:
            row = {"kind": cell.kind, "prompt": cell.prompt, "response": cell.response, "method": method}
            return Target(text=f"{place}: {text}", row=row, column=column, at_least=least)

        if cell.kind == GROUP:
            targets.append(target(DROP_IN, "speedup", 3.0, "drop-in trainer"))
            continue
        targets.append(target(CONTEXT, "speedup", 0.97, "share_prefixes is never slower"))
        if cell.prompt >= 512:
            targets.append(target(CONTEXT, "reached", 0.85, "share_prefixes, of its bound"))
            targets.append(target(DROP_IN, "reached", 0.85, "drop-in trainer, of the token ratio"))
    return targets


TABLE: Table = Table(
    name="dpo_step",
    title="One step of TRL's trainers",
    about="SmolLM2-135M's architecture with random weights, one prompt per step, no padding. "
    "A pair: reference pass, policy pass and backward of DPO; a group: policy pass and backward of "
    "GRPO on given completions, with gradient checkpointing. "
    "TRL projects every position through the LM head on a CPU. `share_prefixes` leaves "
    "head and loss as they are, so with their share h its speed-up is at most 1 / (h + (1 - h) / ratio), where ratio "
    "is padded tokens per distinct token; the drop-in trainer projects labelled positions only and shares, and is "
    "held to the ratio itself. Peak memory is what a step takes beyond weights.",
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
        Column(key="share", heading="share of TRL's step", unit="%", digits=0),
        Column(key="ratio", heading="token ratio", unit="x"),
        Column(key="speedup", heading="× TRL", unit="x", speedup=True),
        Column(key="bound", heading="bound", unit="x", speedup=True),
        Column(key="reached", heading="of the bound", unit="%", digits=0, speedup=True),
    ),
    targets=_targets(),
    run=run,
)
