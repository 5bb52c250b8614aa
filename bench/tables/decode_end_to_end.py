"""Decoding and prefill of a whole model: ShadowKV against transformers' own cache and a preallocated one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import Cache

from bench.baselines import preallocated
from bench.baselines.preallocated import preallocated_cache, stored_tokens
from bench.peak import PeakMemoryMeter
from bench.quality import feed
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import SMOLLM2_135M, make_cache, num_threads
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, Timing, paired_speedup, time_interleaved
from longshadow import ShadowKVCache, ShadowKVConfig

SHAPE = SMOLLM2_135M
DYNAMIC, PREALLOCATED, ALONE = "DynamicCache", "preallocated full cache", "no context: the model alone"
SHADOWKV, SHADOWKV_EXACT, SHADOWKV_ONE_STAGE = "ShadowKV", "ShadowKV, exact keys", "ShadowKV, 1 candidate"
COMPRESSION = "ShadowKV: un-rotation, basis, landmarks"
COMPRESSED = (SHADOWKV, SHADOWKV_EXACT, SHADOWKV_ONE_STAGE)
RANK_OF_TOKENS = 64
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True)
class Config:
    """SmolLM2's architecture with random weights, batch 1. The targets are for fp32 on two threads of a CPU."""

    decode_context: int = 32_768
    decode_steps: int = 40
    warmup: int = 4
    prefill_context: int = 8192
    prefill_repeats: int = 3
    dtype: str = "float32"
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """The correctness of each cache, then prefill, then decoding, candidates interleaved."""
    torch.manual_seed(session.seed)
    with num_threads(config.threads), torch.inference_mode():
        model = SHAPE.model(
            dtype=getattr(torch, config.dtype),
            device=session.device,
            seed=session.seed,
            max_positions=config.decode_context + config.decode_steps + config.warmup,
        )
        session.progress("checking")
        check = check_caches(model, config)
        rows = measure_prefill(model, config, session) + measure_decoding(model, config, session)
    return Outcome(rows=rows, check=check)


def shadowkv_config(name: str) -> ShadowKVConfig:
    """The default configuration, with exact keys, or attending to all rebuilt keys."""
    variants = {
        SHADOWKV: ShadowKVConfig(),
        SHADOWKV_EXACT: ShadowKVConfig(key_store="exact"),
        SHADOWKV_ONE_STAGE: ShadowKVConfig(candidate_factor=1.0),
    }
    return variants[name]


def attention(name: str) -> str:
    """The attention that the model is set to; a ShadowKVCache brings its own."""
    return preallocated.IMPLEMENTATION if name == PREALLOCATED else "sdpa"


@contextmanager
def empty_cache(model: LlamaForCausalLM, name: str, capacity: int) -> Iterator[Cache]:
    """A cache without tokens, the model running the attention it needs."""
    if name in COMPRESSED:
        with ShadowKVCache.for_model(model, shadowkv_config(name)) as cache:
            yield cache
        return
    previous = model.config._attn_implementation
    model.set_attn_implementation(attention(name))
    yield DynamicCache() if name == DYNAMIC else preallocated_cache(model, capacity)
    model.set_attn_implementation(previous)


def check_caches(model: LlamaForCausalLM, config: Config) -> Check:
    """A prompt and a token through every cache, ShadowKV with everything selected, against DynamicCache."""
    num_tokens = config.prefill_context // 8
    tokens = random_tokens(model, num_tokens + 1)
    everything = ShadowKVConfig(budget_tokens=num_tokens, rank=SHAPE.num_kv_heads * SHAPE.head_dim, dense_threshold=0)
    logits = {}
    for name in (DYNAMIC, PREALLOCATED):
        with empty_cache(model, name, num_tokens + 1) as cache:
            feed(model, cache, tokens[:-1])
            logits[name] = feed(model, cache, tokens[-1:])
    for name, shadowkv in ((SHADOWKV, everything), (SHADOWKV_EXACT, replace(everything, key_store="exact"))):
        with ShadowKVCache.for_model(model, shadowkv) as cache:
            feed(model, cache, tokens[:-1])
            logits[name] = feed(model, cache, tokens[-1:])
    expected = logits.pop(DYNAMIC)
    tolerance = TOLERANCES[config.dtype]
    error = max(float((other - expected).abs().max() / expected.abs().max()) for other in logits.values())
    return Check(
        passed=error <= tolerance,
        max_error=error,
        text=f"logits of every cache, ShadowKV at full rank and budget, against DynamicCache "
        f"after {num_tokens:,} tokens, "
        f"largest difference / largest logit = {error:.1e} (at most {tolerance:.0e})",
    )


def random_tokens(model: LlamaForCausalLM, count: int) -> list[int]:
    """Token ids without meaning."""
    tokens: list[int] = torch.randint(model.config.vocab_size, (count,)).tolist()
    return tokens


def measure_prefill(model: LlamaForCausalLM, config: Config, session: Session) -> list[Row]:
    """Time to the first token and peak memory of a prompt, and what compressing it alone takes."""
    prompt = random_tokens(model, config.prefill_context)
    rows: dict[str, Row] = {}

    def prefill(name: str) -> None:
        session.progress(f"prefill of {config.prefill_context:,} tokens: {name}")
        with empty_cache(model, name, config.prefill_context + 1) as cache, meters[name]:
            int(feed(model, cache, prompt).argmax())
        row = rows.setdefault(name, {"part": "prefill", "context": config.prefill_context, "method": name})
        row["peak"] = meters[name].bytes
        row["cache"] = cache_bytes(cache)

    meters = {name: PeakMemoryMeter(session.device) for name in (DYNAMIC, PREALLOCATED, SHADOWKV)}
    timings = time_interleaved(
        {name: Candidate(run=partial(prefill, name), prepare=partial(renew, meters, name, session)) for name in meters},
        repeats=config.prefill_repeats,
        warmup=0,
        device=session.device,
    )
    session.progress("compression alone")
    exact = make_cache(
        SHAPE,
        config.prefill_context,
        rank=RANK_OF_TOKENS,
        dtype=model.dtype,
        device=session.device,
        seed=session.seed,
    )

    def compress() -> None:
        ShadowKVCache.from_exact(model, shadowkv_config(SHADOWKV), exact).close()

    compression = time_interleaved(
        {COMPRESSION: Candidate(run=compress)},
        repeats=config.prefill_repeats,
        warmup=1,
        device=session.device,
    )[COMPRESSION]
    for name, timing in timings.items():
        rows[name] |= timing.row()
    share = compression.median / timings[SHADOWKV].median
    alone = {"part": "prefill", "context": config.prefill_context, "method": COMPRESSION, "share": share}
    return [*rows.values(), alone | compression.row()]


def renew(meters: dict[str, PeakMemoryMeter], name: str, session: Session) -> None:
    """A meter measures once."""
    meters[name] = PeakMemoryMeter(session.device)


def cache_bytes(cache: Cache) -> int:
    """Bytes a cache holds."""
    if isinstance(cache, ShadowKVCache):
        return cache.memory().total_bytes
    return sum(keys.nbytes + values.nbytes for keys, values in stored_tokens(cache))


def measure_decoding(model: LlamaForCausalLM, config: Config, session: Session) -> list[Row]:
    """Seconds per token over caches filled without a prefill; every candidate decodes the same tokens."""
    session.progress(f"decoding: filling caches with {config.decode_context:,} tokens")
    num_steps = config.warmup + config.decode_steps
    dynamic = make_cache(
        SHAPE,
        config.decode_context,
        rank=RANK_OF_TOKENS,
        dtype=model.dtype,
        device=session.device,
        seed=session.seed,
    )
    caches: dict[str, Cache] = {
        DYNAMIC: dynamic,
        PREALLOCATED: preallocated_cache(model, config.decode_context + num_steps, dynamic),
        ALONE: DynamicCache(),
    }
    tokens = random_tokens(model, num_steps)
    with ExitStack() as opened:
        for name in COMPRESSED:
            caches[name] = opened.enter_context(ShadowKVCache.from_exact(model, shadowkv_config(name), dynamic))
        session.progress("decoding")
        timings = time_interleaved(
            {
                name: Candidate(
                    run=make_step(model, cache, tokens),
                    prepare=partial(model.set_attn_implementation, attention(name)),
                )
                for name, cache in caches.items()
            },
            repeats=config.decode_steps,
            warmup=config.warmup,
            device=session.device,
        )
        model.set_attn_implementation(attention(SHADOWKV))
        return [decoding_row(name, caches[name], timings, config) for name in caches]


def make_step(model: LlamaForCausalLM, cache: Cache, tokens: list[int]) -> Callable[[], object]:
    """Decodes the next of `tokens` at each call."""
    remaining = iter(tokens)
    return lambda: int(feed(model, cache, [next(remaining)]).argmax())


def decoding_row(name: str, cache: Cache, timings: dict[str, Timing], config: Config) -> Row:
    """One candidate's speed beside both full caches."""
    timing = timings[name]
    row: Row = {"part": "decode", "context": config.decode_context, "method": name}
    row |= timing.row() | {"tokens_per_s": 1 / timing.median, "cache": cache_bytes(cache)}
    row["speedup_dynamic"] = paired_speedup(timings[DYNAMIC], timing)
    row["speedup_preallocated"] = paired_speedup(timings[PREALLOCATED], timing)
    if isinstance(cache, ShadowKVCache):
        statistics = cache.statistics()
        row |= {"hit_rate": statistics.hit_rate, "attended": statistics.attended_fraction}
    return row


def _target(text: str, row: dict[str, str], column: str, **bound: float) -> Target:
    return Target(text=text, row=row, column=column, **bound)


TABLE: Table = Table(
    name="decode_end_to_end",
    title="Decoding and prefill of a whole model",
    about="SmolLM2-135M's architecture with random weights, batch 1, ShadowKV's default "
    "configuration (3 candidate keys rebuilt to each attended token), and with 1. Decoding at 32K: "
    "seconds per token through the whole model, caches filled with random tokens; "
    "no cache can be faster than the model alone, with an empty one. "
    "Prefill at 8K: the median is the time to "
    "the first token, the peak what the process takes beyond its weights, activations included; the last prefill row "
    "compresses such a prompt alone, with its share of ShadowKV's time to first token.",
    configs={"cpu": Config(), "cuda": Config(dtype="bfloat16")},
    quick=lambda config: replace(
        config, decode_context=4096, decode_steps=8, warmup=1, prefill_context=2048, prefill_repeats=1
    ),
    columns=(
        Column(key="part", heading="part"),
        Column(key="context", heading="context", unit="count"),
        Column(key="method", heading="method"),
        Column(key="median", heading="median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="tokens_per_s", heading="tokens/s", digits=1),
        Column(key="speedup_dynamic", heading="× DynamicCache", unit="x", speedup=True),
        Column(key="speedup_preallocated", heading="× preallocated", unit="x", speedup=True),
        Column(key="cache", heading="cache", unit="B"),
        Column(key="peak", heading="peak memory", unit="B"),
        Column(key="hit_rate", heading="hit rate", unit="%", digits=0),
        Column(key="attended", heading="attended", unit="%"),
        Column(key="share", heading="share of prefill", unit="%", digits=1),
    ),
    targets=(
        *(
            _target(
                f"{method}: decoding against {baseline}", {"part": "decode", "method": method}, column, at_least=least
            )
            for method in (SHADOWKV, SHADOWKV_ONE_STAGE)
            for baseline, column, least in (
                ("DynamicCache", "speedup_dynamic", 6.0),
                ("a preallocated full cache", "speedup_preallocated", 2.0),
            )
        ),
        _target("ShadowKV's part of prefill", {"method": COMPRESSION}, "share", at_most=0.10),
    ),
    run=run,
)
