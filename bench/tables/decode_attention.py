"""One decode-attention step over a long context: ShadowKV against attention over the full cache.

Legend: Hq query heads, H KV heads, G = Hq / H, n tokens, D head_dim, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, SyntheticTokens, make_tokens, num_threads
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, Stopwatch, Timing, paired_speedup, rates, tensor_bytes, time_interleaved
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.exact import AttentionParameters, attention_logits, attention_weights, weigh_values
from longshadow.engine.shadowkv.segment import LowRankKeys
from longshadow.engine.shadowkv.selection import chunk_tokens, dot, score_chunks, select_chunks, select_tokens
from longshadow.engine.shadowkv.sequence import Sequence

SHAPE = LLAMA_3_1_8B
RANK = 160
PARAMETERS = AttentionParameters(scaling=SHAPE.head_dim**-0.5)
SDPA, GROUPED = "full cache, SDPA", "full cache, grouped matmul"
KEYS_FIRST = "full cache, grouped matmul, keys first"
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True)
class Context:
    """Tokens of context, selected tokens and outlier chunks of one part of the table."""

    tokens: int
    selected_tokens: int
    outlier_chunks: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """Llama-3.1-8B shapes, batch 1. The targets are for fp32 on two threads of a CPU."""

    contexts: tuple[Context, ...] = (
        Context(tokens=32_768, selected_tokens=512, outlier_chunks=8),
        Context(tokens=131_072, selected_tokens=2048, outlier_chunks=48),
    )
    dtype: str = "float32"
    threads: int = 2
    repeats: int = 21
    warmup: int = 2


class Queries:
    """A fresh random query per step, the same for every candidate of a round."""

    def __init__(self, config: Config, session: Session) -> None:
        generator = torch.Generator(session.device).manual_seed(session.seed + 1)
        shape = (config.repeats + config.warmup, SHAPE.num_query_heads, SHAPE.head_dim)
        self._queries = torch.randn(shape, generator=generator, device=session.device)
        self._queries = self._queries.to(getattr(torch, config.dtype))
        self._round = -1
        self.current = self._queries[0]

    def advance(self) -> None:
        """The next round's query."""
        self._round += 1
        self.current = self._queries[self._round % len(self._queries)]


def run(config: Config, session: Session) -> Outcome:
    """Each context in turn: its correctness, then all its candidates interleaved."""
    rows: list[Row] = []
    errors: list[float] = []
    with num_threads(config.threads), torch.inference_mode():
        for context in config.contexts:
            session.progress(f"{context.tokens:,} tokens: filling the caches")
            tokens = make_tokens(
                SHAPE,
                context.tokens,
                rank=RANK,
                dtype=getattr(torch, config.dtype),
                device=session.device,
                seed=session.seed,
            )
            sequences = make_sequences(tokens, context)
            queries = Queries(config, session)
            session.progress(f"{context.tokens:,} tokens: checking")
            errors.append(largest_error(tokens, sequences, queries.current))
            session.progress(f"{context.tokens:,} tokens: timing")
            rows += measure(tokens, sequences, queries, context, config, session)
    tolerance = TOLERANCES[config.dtype]
    check = Check(
        passed=max(errors) <= tolerance,
        max_error=max(errors),
        text=f"outputs against fp64 attention over the exact keys and values of the same tokens, largest difference / "
        f"largest output = {max(errors):.1e} (at most {tolerance:.0e})",
    )
    return Outcome(rows=rows, check=check)


def make_sequences(tokens: SyntheticTokens, context: Context) -> dict[str, Sequence]:
    """A ShadowKV cache of the tokens per row of the table."""
    default = ShadowKVConfig(
        budget_tokens=context.selected_tokens,
        num_outlier_chunks=context.outlier_chunks,
        rank=RANK,
        resident_factor=0.0,
        dense_threshold=0,
    )
    one_stage = replace(default, candidate_factor=1.0)
    configs = {
        "ShadowKV exact": replace(one_stage, key_store="exact"),
        "ShadowKV low_rank": one_stage,
        "ShadowKV exact, 3 candidates": replace(default, key_store="exact"),
        "ShadowKV low_rank, 3 candidates": default,
        "ShadowKV low_rank, resident slots": replace(one_stage, resident_factor=1.0),
    }
    return {name: tokens.cache(SHAPE, config) for name, config in configs.items()}


def full_attention(tokens: SyntheticTokens, query: torch.Tensor) -> torch.Tensor:
    """matmul, softmax, matmul with the heads of a group together: [Hq, D] -> [Hq, D]."""
    grouped = query.view(SHAPE.num_kv_heads, -1, SHAPE.head_dim)
    logits = torch.bmm(grouped, tokens.keys.transpose(1, 2)).mul_(PARAMETERS.scaling)
    return torch.bmm(logits.softmax(-1), tokens.values).flatten(0, 1)


def keys_first_attention(tokens: SyntheticTokens, query: torch.Tensor) -> torch.Tensor:
    """The same with the keys as the first factor, which a CPU multiplies faster: [Hq, D] -> [Hq, D]."""
    grouped = query.view(SHAPE.num_kv_heads, -1, SHAPE.head_dim)
    logits = dot(grouped * PARAMETERS.scaling, tokens.keys)
    return torch.bmm(logits.softmax(-1), tokens.values).flatten(0, 1)


def sdpa_attention(tokens: SyntheticTokens, query: torch.Tensor) -> torch.Tensor:
    """torch's scaled_dot_product_attention over the same: [Hq, D] -> [Hq, D]."""
    out = F.scaled_dot_product_attention(
        query[None, :, None],
        tokens.keys[None],
        tokens.values[None],
        enable_gqa=True,
        scale=PARAMETERS.scaling,
    )
    return out[0, :, 0]


def largest_error(tokens: SyntheticTokens, sequences: dict[str, Sequence], query: torch.Tensor) -> float:
    """Of every candidate, relative to the largest output; each against fp64 over the tokens it attends to."""
    num_tokens = tokens.keys.shape[1]
    everything = torch.ones(SHAPE.num_kv_heads, num_tokens, dtype=torch.bool, device=query.device)
    pairs = [
        (attention(tokens, query), masked_reference(tokens, query, everything))
        for attention in (full_attention, keys_first_attention, sdpa_attention)
    ]
    for sequence in sequences.values():
        in_parts, chosen = step_in_parts(sequence, query, Stopwatch(query.device.type))
        expected = masked_reference(tokens, query, mask_of(sequence, chosen, num_tokens))
        pairs.append((sequence.attend_token(query, PARAMETERS), expected))
        pairs.append((in_parts, expected))
    return max(float((out - expected).abs().max() / expected.abs().max()) for out, expected in pairs)


def mask_of(sequence: Sequence, chosen_Ht: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The tokens a step attends to, [H, n]: exact chunks, chosen tokens, tail."""
    [segment] = sequence.segments
    mask = torch.zeros(SHAPE.num_kv_heads, num_tokens, dtype=torch.bool, device=chosen_Ht.device)
    mask[:, segment.num_tokens :] = True
    return mask.scatter_(1, chosen_Ht, True).scatter_(1, chunk_tokens(segment.exact_chunks, segment.chunk_size), True)


def masked_reference(tokens: SyntheticTokens, query: torch.Tensor, mask_Hn: torch.Tensor) -> torch.Tensor:
    """Dense attention in fp64 over the tokens of the mask, head by head."""
    grouped = query.view(SHAPE.num_kv_heads, -1, SHAPE.head_dim).double()
    outputs = []
    for head, mask in enumerate(mask_Hn):
        logits = (grouped[head] @ tokens.keys[head].double().T) * PARAMETERS.scaling
        outputs.append(logits.masked_fill(~mask, -torch.inf).softmax(-1) @ tokens.values[head].double())
    return torch.cat(outputs)


def measure(
    tokens: SyntheticTokens,
    sequences: dict[str, Sequence],
    queries: Queries,
    context: Context,
    config: Config,
    session: Session,
) -> list[Row]:
    """Whole steps of all candidates, interleaved, then the parts of a step, interleaved."""
    steps: dict[str, Callable[[], object]] = {
        SDPA: lambda: sdpa_attention(tokens, queries.current),
        GROUPED: lambda: full_attention(tokens, queries.current),
        KEYS_FIRST: lambda: keys_first_attention(tokens, queries.current),
    }
    for name, sequence in sequences.items():
        sequence.counts = StepCounts()
        steps[name] = lambda sequence=sequence: sequence.attend_token(queries.current, PARAMETERS)  # type: ignore[misc]
    timings = time_all(steps, queries, config, session)
    fastest = min((timings[name] for name in (SDPA, GROUPED, KEYS_FIRST)), key=lambda timing: timing.median)
    named = min((timings[SDPA], timings[GROUPED]), key=lambda timing: timing.median)
    rows: list[Row] = []
    for name, timing in timings.items():
        row: Row = {"context": context.tokens, "method": name, "speedup": paired_speedup(named, timing)}
        row["speedup_fastest"] = paired_speedup(fastest, timing)
        row |= timing.row() | rates(timing, num_bytes=bytes_of_step(tokens, sequences.get(name)))
        rows.append(row | hit_rate(sequences.get(name)))
    for name in ("ShadowKV exact", "ShadowKV low_rank", "ShadowKV low_rank, 3 candidates"):
        rows += measure_parts(name, tokens, sequences[name], timings[name], queries, context, config, session)
    return rows


def time_all(
    steps: dict[str, Callable[[], object]], queries: Queries, config: Config, session: Session
) -> dict[str, Timing]:
    """Interleaves the steps; a new query comes before the first of each round."""
    candidates = {
        name: Candidate(run=step, prepare=queries.advance) if index == 0 else Candidate(run=step)
        for index, (name, step) in enumerate(steps.items())
    }
    return time_interleaved(candidates, repeats=config.repeats, warmup=config.warmup, device=session.device)


def hit_rate(sequence: Sequence | None) -> Row:
    """The measured share of selected chunks that were resident."""
    if sequence is None:
        return {}
    return {"hit_rate": sequence.counts.hits / (sequence.counts.hits + sequence.counts.misses)}


def measure_parts(
    name: str,
    tokens: SyntheticTokens,
    sequence: Sequence,
    whole: Timing,
    queries: Queries,
    context: Context,
    config: Config,
    session: Session,
) -> list[Row]:
    """Where a step's time goes, taken within steps like those of `attend_token` without resident slots."""
    laps: dict[str, list[float]] = {}
    for round_number in range(config.warmup + config.repeats):
        queries.advance()
        # As in the whole steps, what the caches of the machine hold is the full cache.
        full_attention(tokens, queries.current)
        stopwatch = Stopwatch(session.device)
        step_in_parts(sequence, queries.current, stopwatch)
        if round_number >= config.warmup:
            for part, seconds in stopwatch.laps.items():
                laps.setdefault(part, []).append(seconds)
    timings = {part: Timing(seconds=tuple(seconds)) for part, seconds in laps.items()}
    return [
        {"context": context.tokens, "method": f"{name}: {part}", "share": timing.median / whole.median} | timing.row()
        for part, timing in timings.items()
    ]


def step_in_parts(sequence: Sequence, query: torch.Tensor, stopwatch: Stopwatch) -> tuple[torch.Tensor, torch.Tensor]:
    """One step, part by part: [Hq, D] -> [Hq, D], and the tokens it selected [H, t]."""
    [segment] = sequence.segments
    config = sequence.config
    grouped = query.view(SHAPE.num_kv_heads, -1, SHAPE.head_dim)
    scores = score_chunks(grouped, sequence.segments, PARAMETERS.scaling, None)
    stopwatch.lap("score")
    num_selected = config.num_selected_chunks(sequence.num_tokens)
    chunks = select_chunks(scores, round(config.candidate_factor * num_selected))
    stopwatch.lap("top-k")
    keys = segment.keys.gather(chunks).flatten(1, 2)
    stopwatch.lap("rebuild keys" if isinstance(segment.keys, LowRankKeys) else "fetch keys")
    all_keys = (keys, segment.exact_keys, sequence.tail.keys)
    logits = [attention_logits(grouped, part, PARAMETERS) for part in all_keys]
    places: torch.Tensor | None = None
    if config.candidate_factor > 1:
        places = select_tokens(attention_weights(logits, PARAMETERS)[0], num_selected * segment.chunk_size)
        logits[0] = logits[0].gather(2, places.unsqueeze(1).expand(-1, logits[0].shape[1], -1))
    tokens = chunk_tokens(chunks, segment.chunk_size, places)
    stopwatch.lap("logits")
    values = segment.values.gather_tokens(tokens)
    stopwatch.lap("fetch values")
    weights = attention_weights(logits, PARAMETERS)
    out = weigh_values(weights, [values, segment.exact_values, sequence.tail.values]).flatten(0, 1)
    stopwatch.lap("softmax, values")
    return out, tokens


def bytes_of_step(tokens: SyntheticTokens, sequence: Sequence | None) -> int:
    """The least a step has to read: every key and value it uses once, in the form they are stored in."""
    if sequence is None:
        return tensor_bytes(tokens.keys, tokens.values)
    [segment] = sequence.segments
    element = tokens.keys.element_size()
    num_selected = SHAPE.num_kv_heads * sequence.config.num_selected_chunks(sequence.num_tokens) * segment.chunk_size
    num_bytes = tensor_bytes(*segment.landmarks.tensors, segment.exact_keys, segment.exact_values)
    num_bytes += tensor_bytes(sequence.tail.keys, sequence.tail.values)
    num_bytes += num_selected * SHAPE.head_dim * element
    num_candidates = round(sequence.config.candidate_factor * num_selected)
    if not isinstance(segment.keys, LowRankKeys):
        return num_bytes + num_candidates * SHAPE.head_dim * element
    angles = SHAPE.head_dim * tokens.rotation.cos.element_size()
    return num_bytes + num_candidates * (RANK * element + angles) + tensor_bytes(*segment.keys.tensors()["basis"])


def _quick(config: Config) -> Config:
    return replace(config, contexts=(Context(tokens=8192, selected_tokens=256, outlier_chunks=8),), repeats=5)


def _target(tokens: int, method: str, at_least: float, column: str, baseline: str) -> Target:
    return Target(
        text=f"{method} at {tokens:,} tokens, against {baseline}",
        row={"context": tokens, "method": method},
        column=column,
        at_least=at_least,
    )


TABLE: Table = Table(
    name="decode_attention",
    title="One decode-attention step",
    about="Llama-3.1-8B shapes (32 query heads, 8 KV heads of 128), one layer, batch 1, hit rate 0: no chunk stays "
    "from one step to the next, except in the row with resident slots. 512 selected tokens at 32K, 2,048 and 384 "
    "outlier tokens at 128K; rank 160. With 3 candidates, the default, three times as many keys are rebuilt and "
    "the 512 or 2,048 tokens of largest weight among them attended; without, all rebuilt ones are. "
    "Speed-ups are paired within rounds: against the faster of SDPA and the grouped "
    "matmul, and against the fastest of all, a grouped matmul whose first product has the keys first, as ShadowKV's "
    "own has. Bytes are the least a step has to read. The rows below the steps time their parts within a step, with "
    "their share of it.",
    configs={"cpu": Config(), "cuda": Config(dtype="bfloat16", repeats=101, warmup=10)},
    quick=_quick,
    columns=(
        Column(key="context", heading="context", unit="count"),
        Column(key="method", heading="method"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="speedup", heading="× SDPA or grouped", unit="x", speedup=True),
        Column(key="speedup_fastest", heading="× keys first", unit="x", speedup=True),
        Column(key="bytes", heading="bytes", unit="B"),
        Column(key="bytes_per_s", heading="achieved", unit="B/s"),
        Column(key="hit_rate", heading="hit rate", unit="%"),
        Column(key="share", heading="share of step", unit="%", digits=0),
    ),
    targets=tuple(
        _target(tokens, method, at_least, column, baseline)
        for column, baseline in (
            ("speedup", "the faster of SDPA and grouped matmul"),
            ("speedup_fastest", "the fastest full cache"),
        )
        for tokens, method, at_least in (
            (32_768, "ShadowKV exact", 6.0),
            (131_072, "ShadowKV exact", 7.0),
            (32_768, "ShadowKV low_rank", 3.5),
            (131_072, "ShadowKV low_rank", 4.0),
            (32_768, "ShadowKV low_rank, 3 candidates", 3.5),
            (131_072, "ShadowKV low_rank, 3 candidates", 4.0),
        )
    ),
    run=run,
)
