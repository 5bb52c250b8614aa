"""ShadowKV's share of a prefill: one layer's compression against one layer of the model."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache

from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, ModelShape, SyntheticTokens, make_tokens
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, time_interleaved
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.segment import Segment, compress
from longshadow.engine.shadowkv.summary import summarize

SHAPES = {"llama-3.1-8b": LLAMA_3_1_8B}
LAYER = "one layer of the model: attention and network"
SUMMARY = "ShadowKV's operator on the keys"
COMPRESSED = "ShadowKV, all of a layer, values to {}"
PLACES = ("host", "device")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Random weights and tokens whose keys have the rank of the default configuration; one sequence."""

    shape: str = "llama-3.1-8b"
    contexts: tuple[int, ...] = (32 * 1024, 60 * 1024, 122 * 1024)
    repeats: int = 7
    dtype: str = "bfloat16"
    tolerance: float = 3e-2
    backend: str | None = None


def run(config: Config, session: Session) -> Outcome:
    """Each context is a unit."""
    rows: list[Row] = []
    errors: list[float] = []
    with torch.no_grad():
        for context in config.contexts:
            session.progress(f"{context:,} tokens")
            unit = session.unit(f"{context}", partial(measure, config, context, session))
            rows += unit["rows"]
            errors.append(unit["error"])
    # NaN is the largest of all.
    error = max(errors, key=lambda error: (math.isnan(error), error))
    check = Check(
        passed=error <= config.tolerance,
        max_error=error if math.isfinite(error) else None,
        text="keys rebuilt from the compressed layer against the exact ones, whose rank is that of the factors, norm "
        f"of the difference / norm = {error:.1e} (at most {config.tolerance:.0e})",
    )
    return Outcome(rows=rows, check=check)


def measure(config: Config, context: int, session: Session) -> dict[str, object]:
    """The rows of one context, their parts interleaved, and the error of the rebuilt keys."""
    shape, dtype = SHAPES[config.shape], getattr(torch, config.dtype)
    rank = ShadowKVConfig().prompt_rank(shape.key_width)
    tokens = make_tokens(shape, context, rank=rank, dtype=dtype, device=session.device, seed=session.seed)
    device = tokens.keys.device
    query = torch.randn(shape.num_query_heads, context, shape.head_dim, dtype=dtype, device=device)
    operators = choose_operators(device, config.backend)

    def compressed(place: str) -> Segment:
        return compress_layer(shape, tokens, query, place, config)

    runs: dict[str, Callable[[], object]] = {
        LAYER: prefill_layer(shape, context, config, session),
        SUMMARY: lambda: summarize(tokens.keys, tokens.rotation, shape.layout, ShadowKVConfig().chunk_size, operators),
        **{COMPRESSED.format(place): partial(compressed, place) for place in PLACES},
    }
    segment = compressed("device")
    rebuilt = segment.keys.span(0, segment.num_chunks).flatten(1, 2).float()
    exact = tokens.keys[:, : segment.num_tokens].float()
    error = float((rebuilt - exact).norm() / exact.norm())
    del segment, rebuilt, exact
    timings = time_interleaved(
        {name: Candidate(run=timed) for name, timed in runs.items()}, repeats=config.repeats, device=session.device
    )
    rows = []
    for name, timing in timings.items():
        row: Row = {"context": context, "part": name, **timing.row()}
        row["model"] = shape.num_layers * timing.median
        if name != LAYER:
            row["share"] = timing.median / timings[LAYER].median
        rows.append(row)
    del runs
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return {"rows": rows, "error": error}


def compress_layer(
    shape: ModelShape, tokens: SyntheticTokens, query: torch.Tensor, place: str, config: Config
) -> Segment:
    """What the cache does after a layer's attention: query weights, summary, basis, factors, landmarks, values."""
    shadowkv = ShadowKVConfig(value_store="host" if place == "host" else "device")
    num_tokens = (query.shape[1] - shadowkv.local_tokens) // shadowkv.chunk_size * shadowkv.chunk_size
    energy = QueryEnergy()
    energy.add(query, shape.num_kv_heads)
    return compress(
        tokens.keys[:, :num_tokens],
        tokens.values[:, :num_tokens],
        tokens.rotation[:num_tokens],
        shape.layout,
        shadowkv,
        rank=shadowkv.prompt_rank(shape.key_width),
        key_weights=energy.key_weights(shape.layout),
        num_sink_chunks=shadowkv.num_sink_chunks,
        num_outlier_chunks=shadowkv.num_outlier_chunks,
        operators=choose_operators(query.device, config.backend),
    )


def prefill_layer(shape: ModelShape, context: int, config: Config, session: Session) -> Callable[[], object]:
    """A prompt through one layer with torch's SDPA (flash attention on a GPU); the head sees one token."""
    with torch.device(session.device):
        model = replace(shape, num_layers=1).model(
            dtype=getattr(torch, config.dtype), device=session.device, seed=session.seed, max_positions=context
        )
    model.set_attn_implementation("sdpa")
    ids = torch.zeros(1, context, dtype=torch.long, device=session.device)
    return lambda: model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)


TABLE: Table = Table(
    name="prefill_gpu",
    title="ShadowKV's share of a prefill",
    about="Llama-3.1-8B's shapes with random weights, one prompt read at once. One layer of the model, with the "
    "embeddings and the last token's logits that come with it, against what ShadowKV adds to it; the column for the "
    "model is 32 times that. Compression is everything that follows a layer's attention: the queries' energies, the "
    "operator on the keys, basis, factors, landmarks, exact chunks, and values into their store, of which memory on "
    "the host is pinned anew for each layer.",
    configs={"cuda": Config()},
    quick=lambda config: replace(config, contexts=(4096,), repeats=2),
    columns=(
        Column(key="context", heading="context", unit="count"),
        Column(key="part", heading="part"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="model", heading="all layers", unit="s"),
        Column(key="share", heading="share of prefill", unit="%", digits=1),
    ),
    targets=tuple(
        Target(
            text=f"ShadowKV's share of prefill at 122K, values to {place}",
            row={"context": 122 * 1024, "part": COMPRESSED.format(place)},
            column="share",
            at_most=0.02,
        )
        for place in PLACES
    ),
    run=run,
)
