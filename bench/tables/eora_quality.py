"""What low-rank compensation wins back on real weights, against other methods and against spending bytes on bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.eora_candidates import BASELINES, DEFAULT, METHODS, WAYS, Candidate, candidates, measure
from bench.eora_judges import Judges, check_full_rank, hooks, judges_of, text_blocks
from bench.quantisers import NormalFloat, Quantiser, TwoOfFour, num_block_weights, quantised
from bench.record import Row
from bench.session import Session
from bench.synthetic import num_threads
from bench.table import Column, Outcome, Table, Target
from longshadow.compress.blocks import compensated, decoder_blocks, linear_layers
from longshadow.compress.calibration import Splits
from longshadow.compress.evaluation import mean_and_interval, own_quality, quality_against
from longshadow.compress.pipeline import SHRINKAGE
from longshadow.compress.rounding import RoundToNearest, finest_rounding
from longshadow.models import load_model

NONE, ALL = "none", "all"
ADAPTER_DTYPE = torch.bfloat16
# The grid that the model's weights come from: rounding to it changes nothing.
OWN_GRID = RoundToNearest(bits=4, group=32)
ROUNDINGS = ((3, 64), (3, 32), (2, 32))


@dataclass(frozen=True, kw_only=True)
class Config:
    """`roundings` are pairs of bits and group. A sample of calibration has `length` tokens, of others `judged`."""

    roundings: tuple[tuple[int, int], ...] = ROUNDINGS
    normal_float: bool = True
    pruned: bool = True
    ranks: tuple[int, ...] = (16, 32, 64)
    methods: tuple[str, ...] = METHODS
    length: int = 512
    samples: int = 48
    judged: int = 256
    judged_samples: int = 16
    selected_samples: int = 8
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """Each quantiser alone, then compensated by every method and rank; what its bytes buy as bits beside it."""
    with num_threads(config.threads):
        session.progress("loading")
        model = load_model("demo", dtype=torch.float32, device=session.device)
        splits = text_blocks(model.tokenizer, length=config.length, samples=config.samples).to(session.device)
        check = check_full_rank(model.model, splits.calibration[:1])
        judges = judges_of(
            model.model,
            splits,
            length=config.judged,
            num_selection=config.selected_samples,
            num_report=config.judged_samples,
        )
        original = own_quality(judges.of_report, judges.report)
        rows: list[Row] = [{"quantiser": NONE, "method": NONE, "perplexity": original.perplexity}]
        for quantiser in quantisers_of(config):
            session.progress(quantiser.name)
            unit = session.unit(
                quantiser.name, partial(_measure_quantiser, model.model, quantiser, splits, judges, config, session)
            )
            rows += _rows(model.model, quantiser, unit["candidates"], judges, session)
    return Outcome(rows=rows + _summary(rows, config), check=check)


def quantisers_of(config: Config) -> list[Quantiser]:
    """Those of the configuration."""
    quantisers: list[Quantiser] = [RoundToNearest(bits=bits, group=group) for bits, group in config.roundings]
    quantisers += [NormalFloat()] if config.normal_float else []
    quantisers += [TwoOfFour()] if config.pruned else []
    return quantisers


def _measure_quantiser(
    model: nn.Module, quantiser: Quantiser, splits: Splits, judges: Judges, config: Config, session: Session
) -> dict[str, Any]:
    smaller = quantised(model, quantiser)
    found = [_judged(NONE, 0, {}, smaller, judges)]
    measured = measure(model, smaller, splits.calibration)
    for method in config.methods:
        session.progress(f"{quantiser.name}, {method}")
        for rank, candidate in candidates(measured, method, config.ranks, ADAPTER_DTYPE).items():
            found.append(_judged(method, rank, candidate, smaller, judges))
    return {"candidates": found}


def _judged(method: str, rank: int, candidate: Candidate, smaller: nn.Module, judges: Judges) -> dict[str, Any]:
    with compensated(hooks(smaller, candidate)):
        selection, report = judges.judge(smaller)
    return {
        "method": method,
        "rank": rank,
        "num_weights": sum(pair.lora_a.numel() + pair.lora_b.numel() for pair in candidate.values()),
        "selection": selection.mean_divergence,
        "divergences": list(report.divergence),
        "perplexity": report.perplexity,
    }


def _rows(
    model: nn.Module, quantiser: Quantiser, found: list[dict[str, Any]], judges: Judges, session: Session
) -> list[Row]:
    alone = _mean(found[0]["divergences"])
    default = {it["rank"]: it["divergences"] for it in found if it["method"] == DEFAULT}
    rows: list[Row] = []
    for it in found:
        bits = quantiser.bits_per_weight + 8 * ADAPTER_DTYPE.itemsize * it["num_weights"] / num_block_weights(model)
        row: Row = {
            "quantiser": quantiser.name,
            "method": it["method"],
            "bits": bits,
            "perplexity": it["perplexity"],
            "divergence": _mean(it["divergences"]),
            "selection": it["selection"],
        }
        if it["method"] != NONE:
            removed = [old - new for old, new in zip(found[0]["divergences"], it["divergences"], strict=True)]
            mean, low, high = mean_and_interval(removed)
            row |= {"rank": it["rank"], "recovered": mean / alone, "low": low / alone, "high": high / alone}
            row["bits_instead"] = _of_bits(model, bits, judges, session)
        if it["method"] not in (NONE, DEFAULT) and it["rank"] in default:
            behind = [new - old for old, new in zip(default[it["rank"]], it["divergences"], strict=True)]
            mean, low, high = mean_and_interval(behind)
            row |= {"behind": mean, "behind_low": low, "behind_high": high}
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def _summary(rows: list[Row], config: Config) -> list[Row]:
    """What each method leaves on the text for choosing, as a share, over all quantisers and ranks; to the default's."""
    alone = {row["quantiser"]: row["selection"] for row in rows if row["method"] == NONE and "selection" in row}
    shares = {
        method: _geometric_mean([row["selection"] / alone[row["quantiser"]] for row in rows if row["method"] == method])
        for method in config.methods
    }
    return [
        {"quantiser": ALL, "method": method, "left": share}
        | ({"left_ratio": share / shares[DEFAULT]} if method != DEFAULT and DEFAULT in shares else {})
        for method, share in shares.items()
    ]


def _of_bits(model: nn.Module, bits: float, judges: Judges, session: Session) -> float | None:
    """The divergence that rounding to nearest leaves with at most so many bits per weight."""
    widths = {
        layer.get_parameter("weight").shape[1]
        for block in decoder_blocks(model)
        for layer in linear_layers(block).values()
    }
    rounding = finest_rounding(bits, widths)
    if rounding == OWN_GRID:
        rounding = finest_rounding(math.nextafter(OWN_GRID.bits_per_weight, 0), widths)
    if rounding is None:
        return None

    def divergence() -> dict[str, float]:
        found = quality_against(judges.of_report, quantised(model, rounding), judges.report)
        return {"divergence": found.mean_divergence}

    return float(session.unit(f"{rounding.name}, alone", divergence)["divergence"])


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _quick(config: Config) -> Config:
    return replace(
        config,
        roundings=((2, 32),),
        normal_float=False,
        pruned=False,
        ranks=(16,),
        methods=(DEFAULT, "diagonal"),
        samples=4,
        length=128,
        judged=128,
        judged_samples=2,
        selected_samples=2,
    )


def _targets() -> list[Target]:
    """No baseline is better at the same rank beyond its interval, and none of our ways was better where they chose."""
    return [
        Target(
            text=f"{quantiser.name}, rank {rank}: {DEFAULT} no worse than {method}",
            row={"quantiser": quantiser.name, "method": method, "rank": rank},
            column="behind_high",
            at_least=0.0,
        )
        for quantiser in quantisers_of(Config())
        for rank in Config().ranks
        for method in BASELINES
    ] + [
        Target(
            text=f"{DEFAULT} leaves no more than {method} on the text for choosing",
            row={"quantiser": ALL, "method": method},
            column="left_ratio",
            at_least=1.0,
        )
        for method in WAYS
        if method != DEFAULT
    ]


TABLE: Table = Table(
    name="eora_quality",
    title="What compensation wins back",
    about="SmolLM2-135M-Instruct. Its weights come from a 4-bit grid of groups of 32, so that grid is left out. Linear "
    "layers of all blocks rounded to nearest, to NF4, or pruned, compensated with bf16 factors calibrated on Python's "
    "documentation, on the inputs that the quantised blocks give: one set of moments for all methods, but for "
    f"GPTQModel's arithmetic, which weighs later samples more. EoRA: C moved by {SHRINKAGE:g} toward its diagonal; as "
    "published: C as it is; Fisher: EoRA with outputs weighed by squared gradients; ranks spread: as many weights as "
    "uniform ranks have. Divergence (KL of the next token from the original's, in nats) and perplexity on documents "
    "that were not calibrated on; recovered: the share of the quantised model's divergence that is gone, with its 95 % "
    f"interval, resampled over samples; behind '{DEFAULT}' (the command's default): how much more divergence is left "
    "at the same rank, likewise; for choosing: divergence on a third part of the documents; left, over all quantisers "
    "and ranks (geometric mean): the share of it that remains, and beside the default's. Bits per weight count scales "
    "and the factors; as bits: the divergence of rounding the original to nearest with at most as many bits per weight "
    "and no adapter.",
    configs={"cpu": Config(), "cuda": Config()},
    quick=_quick,
    columns=(
        Column(key="quantiser", heading="quantiser"),
        Column(key="method", heading="method"),
        Column(key="rank", heading="rank", unit="count"),
        Column(key="bits", heading="bits per weight"),
        Column(key="perplexity", heading="perplexity", digits=2),
        Column(key="divergence", heading="divergence", digits=4),
        Column(key="recovered", heading="recovered", unit="%"),
        Column(key="low", heading="from", unit="%"),
        Column(key="high", heading="to", unit="%"),
        Column(key="behind", heading="behind the default", digits=4),
        Column(key="behind_low", heading="from", digits=4),
        Column(key="behind_high", heading="to", digits=4),
        Column(key="selection", heading="for choosing", digits=4),
        Column(key="bits_instead", heading="as bits", digits=4),
        Column(key="left", heading="left", unit="%"),
        Column(key="left_ratio", heading="to the default's", digits=3),
    ),
    targets=tuple(_targets()),
    run=run,
)
