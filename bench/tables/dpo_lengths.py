"""Steps of TRL's DPO trainer on batches with the lengths of six preference data sets."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.peak import PeakMemoryMeter
from bench.preference import Batch, PairLengths, pair_batch, pair_step, pair_trainer
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import SMOLLM2_135M, num_threads
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, paired_speedup, time_interleaved
from longshadow import PrefixTree

# A tenth of SmolLM2's layers and of its vocabulary: the head keeps its share of a step.
SHAPE = replace(SMOLLM2_135M, num_layers=3, vocab_size=4915)
TRL, LABELLED, PADDING_FREE = "TRL as it is", "labelled positions only", "and padding-free"
SHARED, PACKED = "and shared prefixes", "and packed"
PROMPT_SIGMA, ANSWER_SIGMA = 0.6, 0.4
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Published medians (arXiv 2410.20305): tokens of a row, and of its prompt per token of its answer.

    `paper` is the paper's speed-up of sharing and packing over unpacked FlashAttention 3 on eight H100s.
    """

    name: str
    length: int
    prompt_to_answer: float
    paper: float


DATA_SETS = (
    DataSet(name="Capybara", length=1160, prompt_to_answer=1.59, paper=2.85),
    DataSet(name="HH-RLHF", length=186, prompt_to_answer=2.15, paper=4.60),
    DataSet(name="MetaMath-DPO", length=872, prompt_to_answer=3.91, paper=2.75),
    DataSet(name="TLDR", length=416, prompt_to_answer=11.14, paper=1.90),
    DataSet(name="Tulu-Helpsteer", length=775, prompt_to_answer=6.34, paper=2.97),
    DataSet(name="Ultrafeedback", length=409, prompt_to_answer=0.42, paper=2.89),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Lengths are log-normal around the medians. `packing_tokens` is the budget of a micro-batch, packed."""

    data_sets: tuple[DataSet, ...] = DATA_SETS
    pairs: int = 8
    packing_tokens: int = 4096
    repeats: int = 3
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """Each data set: one batch, all ways interleaved."""
    rows: list[Row] = []
    errors: list[float] = []
    with num_threads(config.threads):
        trainers = make_trainers(config, session)
        for data_set in config.data_sets:
            session.progress(data_set.name)
            batches = {share: batch_of(data_set, config, session, share=share) for share in (True, False)}
            unit = session.unit(data_set.name, partial(measure, trainers, data_set, batches, config, session))
            rows += unit["rows"]
            errors.append(unit["error"])
    check = Check(
        passed=max(errors) <= TOLERANCE,
        max_error=max(errors),
        text=f"losses of every way against TRL's on the same batch, largest difference = {max(errors):.1e} "
        f"(at most {TOLERANCE:.0e})",
    )
    return Outcome(rows=rows, check=check)


def make_trainers(config: Config, session: Session) -> dict[str, Any]:
    """One of each, over models of their own with the same weights."""
    from trl.trainer.dpo_trainer import DPOTrainer

    from longshadow import PrefixSharingDPOTrainer

    policy, reference = (
        SHAPE.model(dtype=torch.float32, device=session.device, seed=session.seed + number, max_positions=32_768)
        for number in (0, 1)
    )

    def trainer(trainer_class: Any, **options: Any) -> Any:
        return pair_trainer(trainer_class, copy.deepcopy(policy), copy.deepcopy(reference), **options)

    ours = partial(trainer, PrefixSharingDPOTrainer, verify_first_batch=False)
    return {
        TRL: trainer(DPOTrainer),
        LABELLED: ours(minimum_ratio=math.inf),
        PADDING_FREE: ours(minimum_ratio=1.0),
        SHARED: ours(),
        PACKED: ours(packing_tokens=config.packing_tokens),
    }


def lengths_of(data_set: DataSet, config: Config, session: Session) -> list[PairLengths]:
    """Log-normal around the medians; at least one token."""
    answer = data_set.length / (1 + data_set.prompt_to_answer)
    generator = torch.Generator().manual_seed(session.seed)
    noise = torch.randn(config.pairs, 3, generator=generator).tolist()

    def drawn(median: float, sigma: float, normal: float) -> int:
        return max(1, round(median * math.exp(sigma * normal)))

    return [
        PairLengths(
            prompt=drawn(data_set.length - answer, PROMPT_SIGMA, first),
            chosen=drawn(answer, ANSWER_SIGMA, second),
            rejected=drawn(answer, ANSWER_SIGMA, third),
        )
        for first, second, third in noise
    ]


def batch_of(data_set: DataSet, config: Config, session: Session, *, share: bool) -> Batch:
    """The batch of a data set; without `share`, its rows begin differently."""
    lengths = lengths_of(data_set, config, session)
    return pair_batch(lengths, vocabulary=SHAPE.vocab_size, seed=session.seed, share=share)


def measure(
    trainers: dict[str, Any],
    data_set: DataSet,
    batches: dict[bool, Batch],
    config: Config,
    session: Session,
) -> dict[str, Any]:
    """The rows of one data set, and the largest error of every way's loss."""
    steps = {name: partial(pair_step, trainer, batches[name != PADDING_FREE]) for name, trainer in trainers.items()}
    losses: dict[str, float] = {}
    meters: dict[str, PeakMemoryMeter] = {}

    def metered(name: str) -> None:
        with meters[name]:
            losses[name] = steps[name]()

    def renew(name: str) -> None:
        meters[name] = PeakMemoryMeter(session.device)

    timings = time_interleaved(
        {name: Candidate(run=partial(metered, name), prepare=partial(renew, name)) for name in steps},
        repeats=config.repeats,
        warmup=0,
        device=session.device,
    )
    batch = batches[True]
    real = int(batch["attention_mask"].sum())
    unique = PrefixTree.from_batch(batch["input_ids"], batch["attention_mask"]).num_tokens
    tokens = {TRL: batch["input_ids"].numel(), LABELLED: batch["input_ids"].numel(), PADDING_FREE: real}
    rows: list[Row] = []
    for name, timing in timings.items():
        row: Row = {"data_set": data_set.name, "method": name, "tokens": tokens.get(name, unique)}
        row |= timing.row() | {"peak": meters[name].bytes, "speedup": paired_speedup(timings[TRL], timing)}
        row["ratio"] = tokens[TRL] / row["tokens"]
        if name in (SHARED, PACKED):
            row["reached"] = row["speedup"] / row["ratio"]
        if name == PACKED:
            row["paper"] = data_set.paper
        rows.append(row)
    unshared = pair_step(trainers[TRL], batches[False])
    expected = {name: unshared if name == PADDING_FREE else losses[TRL] for name in losses}
    return {"rows": rows, "error": max(abs(losses[name] - expected[name]) for name in losses)}


def _quick(config: Config) -> Config:
    return replace(config, data_sets=config.data_sets[1:2], pairs=2, packing_tokens=200, repeats=1)


TABLE: Table = Table(
    name="dpo_lengths",
    title="DPO on the lengths of six data sets",
    about="Reference pass, policy pass and backward of TRL's DPO trainer on one batch of 8 pairs, with a tenth of "
    "SmolLM2-135M's layers and of its vocabulary, random weights, no gradient checkpointing. Lengths are log-normal "
    f"around the data sets' published medians (sigma {PROMPT_SIGMA} for prompts, {ANSWER_SIGMA} for answers), tokens "
    "random. Every row adds to the one above it; padding-free without sharing is measured on the same batch with "
    "other first tokens. Packed: the batch in micro-batches of at most 4,096 distinct tokens. The paper's figure, "
    "packed and shared over unpacked FlashAttention 3 on eight H100s, stands beside it.",
    configs={"cpu": Config()},
    quick=_quick,
    columns=(
        Column(key="data_set", heading="lengths of"),
        Column(key="method", heading="method"),
        Column(key="tokens", heading="tokens computed", unit="count"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="peak", heading="peak memory", unit="B"),
        Column(key="ratio", heading="padded over computed", unit="x"),
        Column(key="speedup", heading="× TRL", unit="x", speedup=True),
        Column(key="reached", heading="of the ratio", unit="%", digits=0, speedup=True),
        Column(key="paper", heading="paper, H100s", unit="x"),
    ),
    targets=[
        Target(
            text=f"{data_set.name}, {name.removeprefix('and ')}: of padded over distinct tokens",
            row={"data_set": data_set.name, "method": name},
            column="reached",
            at_least=0.85,
        )
        for data_set in DATA_SETS
        for name in (SHARED, PACKED)
    ],
    run=run,
)
