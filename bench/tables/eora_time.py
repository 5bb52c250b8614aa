"""How long compensation takes: a small model or some blocks of a large one, and one layer as the textbook solves it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.peak import PeakMemoryMeter
from bench.quantisers import quantised
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, SMOLLM2_135M, num_threads
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, time_interleaved
from longshadow.compress.blocks import decoder_blocks
from longshadow.compress.pipeline import compensate
from longshadow.compress.planning import layer_shapes
from longshadow.compress.rounding import RoundToNearest
from longshadow.compress.solver import solve
from longshadow.compress.statistics import InputMoments

SHAPES = {"smollm2-135m": SMOLLM2_135M, "llama-3.1-8b": LLAMA_3_1_8B}
OURS, TEXTBOOK = "leading eigenvectors of R C Rᵀ", "eigh(C), full SVD of R C^½, inverse"
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Config:
    """`layers` of the shape are compensated; where the model has more, its time is extrapolated from theirs."""

    shape: str = "smollm2-135m"
    layers: int = 30
    dtype: str = "float32"
    rank: int = 32
    samples: int = 64
    length: int = 512
    solver_shapes: tuple[tuple[int, int], ...] = ((2048, 7168), (7168, 2048))
    repeats: int = 1
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """The model, then the layers."""
    rows: list[Row] = []
    errors = []
    with num_threads(config.threads):
        session.progress(f"{config.shape}, {config.layers} layers")
        rows.append(session.unit("model", partial(_model_row, config, session)))
        for outputs, inputs in config.solver_shapes:
            session.progress(f"a layer of {outputs:,} x {inputs:,}")
            unit = session.unit(f"{outputs} x {inputs}", partial(_layer_rows, outputs, inputs, config, session))
            rows += unit["rows"]
            errors.append(unit["error"])
    error = max(errors, default=0.0)
    check = Check(
        passed=error <= TOLERANCE,
        max_error=error,
        text="what our factors leave of a layer's error against what the textbook's leave, relative difference = "
        f"{error:.1e} (at most {TOLERANCE:.0e})",
    )
    return Outcome(rows=rows, check=check)


def _model_row(config: Config, session: Session) -> dict[str, Any]:
    """A whole model, or its first blocks, rounded to 3 bits; random weights and tokens, since neither matters here."""
    shape = SHAPES[config.shape]
    fewer = replace(shape, num_layers=config.layers)
    dtype = getattr(torch, config.dtype)
    model = fewer.model(dtype=dtype, device=session.device, seed=session.seed, max_positions=config.length)
    smaller = quantised(model, RoundToNearest(bits=3, group=64))
    generator = torch.Generator().manual_seed(session.seed)
    samples = torch.randint(shape.vocab_size, (config.samples, config.length), generator=generator)
    budget = sum(config.rank * (m + n) for m, n in layer_shapes(model))
    with PeakMemoryMeter(session.device) as meter:
        start = time.perf_counter()
        compensate(model, smaller, samples.to(session.device), rank=None, budget=budget)
        if session.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    row = {
        "what": f"{config.shape}, {config.layers} of {shape.num_layers} blocks",
        "way": "compensate()",
        "median": seconds,
        "whole": seconds / config.layers * shape.num_layers,
        # The two models are there already when the meter starts.
        "memory": None if meter.bytes is None else meter.bytes + 2 * weights,
        "floor": _floor(decoder_blocks(model), config),
    }
    return {key: value for key, value in row.items() if value is not None}


def _floor(blocks: nn.ModuleList, config: Config) -> float:
    """Operations of two passes over the tokens, which calibrating a block on the one before it cannot do without."""
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return 2 * 2 * weights * config.samples * config.length


def _layer_rows(outputs: int, inputs: int, config: Config, session: Session) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(session.seed)
    residual = torch.randn(outputs, inputs, generator=generator).to(session.device)
    # Channels of very different size, as activations have them.
    tokens = torch.randn(2 * inputs, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    covariance = (tokens.T @ tokens / len(tokens)).double().to(session.device)
    moments = InputMoments.of(covariance)
    products: dict[str, torch.Tensor] = {}

    def ours() -> None:
        products[OURS] = solve(residual, moments, config.rank).product

    def theirs() -> None:
        products[TEXTBOOK] = textbook(residual, covariance, config.rank)

    candidates = {TEXTBOOK: Candidate(run=theirs), OURS: Candidate(run=ours)}
    timings = time_interleaved(candidates, repeats=config.repeats, warmup=0, device=session.device)
    rows = [
        {
            "what": f"layer of {outputs:,} x {inputs:,}",
            "way": way,
            "median": timing.median,
            "ratio": timings[TEXTBOOK].median / timing.median,
        }
        for way, timing in timings.items()
    ]
    ours_left, textbook_left = (_left(residual, products[way], covariance) for way in (OURS, TEXTBOOK))
    return {"rows": rows, "error": abs(ours_left / textbook_left - 1)}


def textbook(residual: torch.Tensor, covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """[R T]_r T^-1 with T = Q L^½ of C = Q L Qᵀ: eigenvalues in fp64, the decomposition of R T in fp32."""
    values, vectors = torch.linalg.eigh(covariance)
    roots = values.clamp(min=1e-12 * float(values.max())).sqrt()
    left, scales, right = torch.linalg.svd(residual @ (vectors * roots).float(), full_matrices=False)
    unscaled = right[:rank] @ (vectors / roots).T.float()
    return (left[:, :rank] * scales[:rank]) @ unscaled


def _left(residual: torch.Tensor, product: torch.Tensor, covariance: torch.Tensor) -> float:
    remainder = (residual - product).float()
    return float(((remainder @ covariance.float()) * remainder).double().sum())


def _quick(config: Config) -> Config:
    return replace(config, layers=2, samples=2, length=64, solver_shapes=((64, 192), (192, 64)), shape="smollm2-135m")


TABLE: Table = Table(
    name="eora_time",
    title="What compensation takes",
    about="`compensate()` on a model rounded to 3 bits, both models in memory, random weights and tokens, as the "
    "command does it by default: outputs weighed by gradients, the size of the configuration's rank spread over the "
    "layers; `whole` extrapolates from the blocks that were run to all of the model's; memory is the peak "
    "with both models in it; floor: operations of two passes of the tokens through the blocks. Layers: one solution "
    "from given moments, against the eigendecomposition of the moments and a full SVD, in the same run.",
    configs={
        "cpu": Config(),
        "cuda": Config(shape="llama-3.1-8b", layers=2, dtype="bfloat16", rank=64, samples=128, length=2048, repeats=3),
    },
    quick=_quick,
    columns=(
        Column(key="what", heading="what"),
        Column(key="way", heading="way"),
        Column(key="median", heading="median", unit="s"),
        Column(key="whole", heading="whole model", unit="s"),
        Column(key="memory", heading="memory", unit="B"),
        Column(key="floor", heading="floor, operations"),
        Column(key="ratio", heading="speed-up", unit="x", speedup=True),
    ),
    targets=(
        Target(
            text="a whole SmolLM2, 64 x 512 tokens, in 8 minutes",
            row={"what": "smollm2-135m, 30 of 30 blocks"},
            column="whole",
            at_most=480.0,
        ),
        Target(text="within 3 GB", row={"what": "smollm2-135m, 30 of 30 blocks"}, column="memory", at_most=3e9),
        *(
            Target(
                text=f"a layer of {outputs:,} x {inputs:,} 5 times as fast as by the textbook",
                row={"what": f"layer of {outputs:,} x {inputs:,}", "way": OURS},
                column="ratio",
                at_least=5.0,
            )
            for outputs, inputs in Config().solver_shapes
        ),
        Target(
            text="Llama-3.1-8B in 8 minutes at rank 64",
            row={"what": "llama-3.1-8b, 2 of 32 blocks"},
            column="whole",
            at_most=480.0,
        ),
    ),
    run=run,
)
