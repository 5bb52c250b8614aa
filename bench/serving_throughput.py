"""Concurrent requests by the engine, and by transformers one at a time and with its continuous batching."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.prose import passages
from bench.record import Row
from bench.serving_load import Ask, compare, run_one_by_one, run_together
from bench.serving_setting import ENGINE, ENGINE_SPARSE, Config, divergence, engine, greedy, text_tokens, unit, warm_up
from bench.session import Session
from longshadow import ShadowKVConfig
from longshadow.models import LoadedModel
from longshadow.streaming import MeasuringStreamer

THROUGHPUT = "8 requests"
GENERATE, GENERATE_BATCH = "generate, one at a time", "generate_batch"
# Of generate_batch: its own page, and the engine's budget of a step.
PAGE_TOKENS, BATCH_TOKENS = 256, 512


def throughput_units(loaded: LoadedModel, config: Config, session: Session) -> list[dict[str, Any]]:
    """Concurrent requests of equal length by four methods; every engine is compared with itself, one by one."""
    windows = passages(text_tokens(loaded), count=config.num_requests, length=config.prompt_tokens)
    asks = [Ask(prompt=prompt, params=greedy(config.new_tokens)) for prompt in windows]
    ways = {
        ENGINE: ShadowKVConfig(dense_threshold=config.exact_tokens),
        ENGINE_SPARSE: ShadowKVConfig(budget_tokens=config.budget_tokens),
    }

    def progress(name: str) -> None:
        session.progress(f"{config.num_requests} requests of {config.prompt_tokens:,} tokens: {name}")

    def of_engine(name: str) -> dict[str, Any]:
        progress(name)
        with engine(loaded, ways[name], max_num_seqs=config.num_requests, prefix_cache=False) as llm:
            warm_up(llm)
            together = run_together(llm, asks)
            alone = run_one_by_one(llm, asks, progress=lambda done: progress(f"{name}, {done} one by one"))
        comparison = compare(alone, together)
        row = throughput_row(name, together.num_tokens, together.seconds, together.decode_tokens_per_s, config)
        return unit([row | divergence(comparison)], comparison)

    units = [session.unit(f"throughput: {GENERATE}", lambda: one_at_a_time(loaded, asks, config, progress))]
    units.append(session.unit(f"throughput: {GENERATE_BATCH}", lambda: generate_batch(loaded, asks, config, progress)))
    for name in ways:
        units.append(session.unit(f"throughput: {name}", lambda name=name: of_engine(name)))
    return units


def one_at_a_time(loaded: LoadedModel, asks: list[Ask], config: Config, progress: Any) -> dict[str, Any]:
    """transformers' own `generate`, SDPA, one request after the other."""
    model: Any = loaded.model
    seconds, decode_seconds = 0.0, 0.0
    for index, ask in enumerate(asks):
        progress(f"{GENERATE}, {index}")
        streamer = MeasuringStreamer(loaded.tokenizer, lambda text: None)
        started = time.perf_counter()
        model.generate(
            torch.tensor([ask.prompt]),
            attention_mask=torch.ones(1, len(ask.prompt), dtype=torch.long),
            max_new_tokens=config.new_tokens,
            min_new_tokens=config.new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        seconds += time.perf_counter() - started
        assert streamer.tokens_per_second is not None
        decode_seconds += (config.new_tokens - 1) / streamer.tokens_per_second
    decoded = len(asks) * (config.new_tokens - 1) / decode_seconds
    return unit([throughput_row(GENERATE, len(asks) * config.new_tokens, seconds, decoded, config)])


def generate_batch(loaded: LoadedModel, asks: list[Ask], config: Config, progress: Any) -> dict[str, Any]:
    """transformers' continuous batching, where it runs on this device; a row without numbers says that it does not."""
    progress(GENERATE_BATCH)
    model: Any = loaded.model
    settings = GenerationConfig(
        max_new_tokens=config.new_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=loaded.tokenizer.pad_token_id or 0,
    )
    # Without sizes it takes most of the memory and pads its steps to that, which is many times slower.
    num_pages = -(-(config.prompt_tokens + config.new_tokens) // PAGE_TOKENS) + 1
    sizes = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=len(asks) * num_pages, max_batch_tokens=BATCH_TOKENS
    )
    before = model.config._attn_implementation
    started = time.perf_counter()
    try:
        outputs = model.generate_batch(
            inputs=[ask.prompt for ask in asks],
            generation_config=settings,
            continuous_batching_config=sizes,
            progress_bar=False,
        )
    # Whatever it raises where it does not run: the row says so.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:80]
        return unit([{"part": THROUGHPUT, "method": f"{GENERATE_BATCH} (does not run here: {reason})"}])
    finally:
        model.set_attn_implementation(before)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    if num_tokens != len(asks) * config.new_tokens:
        return unit([{"part": THROUGHPUT, "method": f"{GENERATE_BATCH} (gave {num_tokens} tokens)"}])
    return unit([throughput_row(GENERATE_BATCH, num_tokens, seconds, None, config)])


def throughput_row(name: str, num_tokens: int, seconds: float, decode: float | None, config: Config) -> Row:
    """Output tokens per second, prompts included in the time, and of decoding alone."""
    row: Row = {"part": THROUGHPUT, "method": name, "context": config.prompt_tokens, "seconds": seconds}
    row["tokens_per_s"] = num_tokens / seconds
    if decode is not None:
        row["decode_tokens_per_s"] = decode
    return row
