"""Decoding throughput of Llama-3.1-8B's shapes over long contexts: ShadowKV against full attention, both in graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import LlamaForCausalLM

from bench.baselines.fixed_cache import implementations
from bench.decoding_check import check_steps
from bench.predictions import hardware_of, planned_shape, predicted_tokens_per_second, sequence_device_bytes
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B
from bench.synthetic_decoding import SegmentPool, Setting, Step, filled_cache, full_step, shadowkv_step
from bench.table import Column, Outcome, Table, Target
from bench.timing import Candidate, time_interleaved
from bench.traces import Traces
from longshadow.engine.planning.advice import PLACEMENTS
from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig

SHAPES = {"llama-3.1-8b": LLAMA_3_1_8B}
FULL = "full attention"
LARGEST = "largest"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Random weights, caches filled without a prompt.

    Attributes:
        batch_sizes: beside the largest that fits.
        steps, blocks: timed steps that the host does not wait between, and how often.
        host_bytes: of pinned memory; layers take turns with values that would be more.
        reserved_bytes: of the device, beside weights and caches.
        device_bytes: free memory of the device; None asks it.
        backend: of the operators; None is the best.
    """

    shape: str = "llama-3.1-8b"
    layers: int = 32
    contexts: tuple[int, ...] = (60 * 1024, 122 * 1024, 244 * 1024)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    placements: tuple[str, ...] = tuple(PLACEMENTS)
    steps: int = 8
    blocks: int = 7
    host_bytes: int = 24 * 2**30
    reserved_bytes: int = 6 * 2**30
    device_bytes: int | None = None
    checked_context: int = 8192
    dtype: str = "bfloat16"
    tolerance: float = 3e-2
    backend: str | None = None


def run(config: Config, session: Session) -> Outcome:
    """The check, then context by context and method by method, the largest batch first; each batch is a unit."""
    setting = Setting(
        shape=replace(SHAPES[config.shape], num_layers=config.layers),
        traces=Traces.load(),
        dtype=getattr(torch, config.dtype),
        device=torch.device(session.device),
        seed=session.seed,
        host_bytes=config.host_bytes,
        backend=config.backend,
    )
    rows: list[Row] = []
    with torch.no_grad():
        session.progress("checking")
        check = session.unit(
            "check",
            lambda: vars(check_steps(setting, config.checked_context, config.placements, config.tolerance)),
        )
        bench = Bench(config, setting, session)
        for context in config.contexts:
            of_context: list[Row] = []
            for name, implementation in implementations(setting.device).items():
                of_context += bench.full_rows(context, name, implementation)
            for placement in config.placements:
                of_context += bench.shadowkv_rows(context, placement)
            add_speedups(of_context)
            rows += of_context
    return Outcome(rows=rows, check=Check(**check))


def add_speedups(rows: list[Row]) -> None:
    """Against the context's best full attention, at whatever batch and at the same."""
    full = [row for row in rows if row["method"].startswith(FULL)]
    for row in rows:
        same = [other["tokens_per_s"] for other in full if other["batch"] == row["batch"]]
        row["speedup_best"] = row["tokens_per_s"] / max(other["tokens_per_s"] for other in full)
        row["speedup_same"] = row["tokens_per_s"] / max(same) if same else None


class Bench:
    """Measures units; they share the model, which is made when the first one needs it."""

    def __init__(self, config: Config, setting: Setting, session: Session) -> None:
        self._config, self._setting, self._session = config, setting, session
        self._shape, self._device = setting.shape, setting.device
        self._planned = planned_shape(setting.shape, element_bytes=setting.dtype.itemsize)
        self._model: LlamaForCausalLM | None = None

    @property
    def model(self) -> LlamaForCausalLM:
        """Random weights."""
        if self._model is None:
            self._session.progress("making the model")
            self._model = self._setting.model(max(self._config.contexts) + 1024)
        return self._model

    def full_rows(self, context: int, name: str, implementation: str) -> list[Row]:
        """One way of full attention at all batches."""
        per_sequence = 2 * self._shape.num_layers * context * self._shape.key_width * self._setting.dtype.itemsize

        def measure(batch_size: int) -> Row:
            step = full_step(self._setting, self.model, context, batch_size, implementation)
            row = self._timed(step, batch_size) | {"device": batch_size * per_sequence}
            return row | self._predicted(None, context, batch_size, 0.0)

        return self._units(context, f"{FULL}, {name}", per_sequence, measure)

    def shadowkv_rows(self, context: int, placement: str) -> list[Row]:
        """One placement of ShadowKV's values at all batches."""
        shadowkv = self._setting.config(placement, context)
        pool = SegmentPool(self._setting, shadowkv, context)
        per_step = self._setting.replay(shadowkv, context, 1).num_candidates
        per_step *= self._shape.num_layers * self._shape.num_kv_heads

        def measure(batch_size: int) -> Row:
            with filled_cache(self._setting, self.model, shadowkv, pool, context, batch_size) as cache:
                step = shadowkv_step(self.model, cache, context)
                for _ in range(3):
                    step()
                before = self._misses(cache)
                row = self._timed(step, batch_size)
                num_chosen = (1 + self._config.blocks) * self._config.steps * batch_size * per_step
                row["hit_rate"] = 1 - (self._misses(cache) - before) / num_chosen
                row["device"] = cache.memory().device_bytes
            if shadowkv.value_store == "host":
                row["host"] = batch_size * self._shape.num_layers * pool.value_bytes
            return row | self._predicted(shadowkv, context, batch_size, row["hit_rate"])

        per_sequence = sequence_device_bytes(self._planned, shadowkv, context)
        rows = self._units(context, f"ShadowKV, {placement}", per_sequence, measure, pool.drop)
        pool.drop()
        self._collect()
        return rows

    def _units(
        self,
        context: int,
        method: str,
        per_sequence: int,
        measure: Callable[[int], Row],
        drop: Callable[[], None] = lambda: None,
    ) -> list[Row]:
        """Rows of the largest batch, whatever it turns out to be, and of smaller ones."""

        def largest() -> Row:
            estimate = self._free_bytes() // per_sequence
            for batch_size in range(estimate, 0, -max(1, estimate // 20)):
                try:
                    return measure(batch_size)
                except torch.cuda.OutOfMemoryError:
                    drop()
                self._collect()
            raise ValueError(f"not one sequence of {context:,} tokens fits on {self._device}: {method}")

        def row(size: str, work: Callable[[], Row]) -> Row:
            self._session.progress(f"{context:,} tokens: {method}, batch {size}")
            measured = self._session.unit(f"{context}, {method}, {size}", work)
            self._collect()
            return {"context": context, "method": method, "size": size, **measured}

        first = row(LARGEST, largest)
        smaller = [size for size in sorted(self._config.batch_sizes, reverse=True) if size < first["batch"]]
        return [first, *(row(str(size), partial(measure, size)) for size in smaller)]

    def _timed(self, step: Step, batch_size: int) -> Row:
        def block() -> None:
            for _ in range(self._config.steps):
                step()

        timings = time_interleaved({"": Candidate(run=block)}, repeats=self._config.blocks, device=self._session.device)
        seconds = {name: taken / self._config.steps for name, taken in timings[""].row().items()}
        return {"batch": batch_size, **seconds, "tokens_per_s": batch_size / seconds["median"]}

    def _predicted(self, shadowkv: ShadowKVConfig | None, context: int, batch_size: int, hit_rate: float) -> Row:
        hardware = hardware_of(torch.cuda.get_device_name(self._device)) if self._device.type == "cuda" else None
        if hardware is None:
            return {}
        predicted = predicted_tokens_per_second(
            self._planned, shadowkv, num_tokens=context, batch_size=batch_size, hit_rate=hit_rate, hardware=hardware
        )
        return {"predicted": predicted}

    def _free_bytes(self) -> int:
        """For caches, with the weights in place."""
        if self._config.device_bytes is not None:
            return self._config.device_bytes
        assert self.model is not None
        self._collect()
        return int(torch.cuda.mem_get_info(self._device)[0]) - self._config.reserved_bytes

    def _collect(self) -> None:
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    @staticmethod
    def _misses(cache: ShadowKVCache) -> int:
        cache.statistics()
        return cache.state.counts.misses


TABLE: Table = Table(
    name="decode_gpu",
    title="Decoding over long contexts",
    about="Llama-3.1-8B's shapes (embeddings tied) with random weights in bf16; seconds per step of a whole model, "
    "from a CUDA graph, in blocks of steps that the host does not wait between. Full attention has a preallocated "
    "cache. ShadowKV's caches are filled with random factors, landmarks and values, and its steps select what "
    "SmolLM2-135M selected at the same share of 4,000 tokens of prose, scaled up so that as many candidates stay from "
    "step to step: the selecting operators run, then the recorded choices take the place of theirs, which costs some "
    "launches. Budget 1.56 % of the context, 3 candidates per selected chunk, these resident. Each sequence has its "
    "own memory on the device; on the host layers take turns where the values of all would exceed 24 GiB of pinned "
    "memory, and the column host says what they would take. Predicted is what the cost model says at the measured hit "
    "rate: no measurement.",
    configs={"cuda": Config()},
    quick=lambda config: replace(
        config, layers=2, contexts=(16 * 1024,), batch_sizes=(1,), device_bytes=4 * 2**30, steps=2, blocks=2
    ),
    columns=(
        Column(key="context", heading="context", unit="count"),
        Column(key="method", heading="method"),
        Column(key="size", heading="size"),
        Column(key="batch", heading="batch", unit="count"),
        Column(key="median", heading="step, median", unit="s"),
        Column(key="p20", heading="p20", unit="s"),
        Column(key="p80", heading="p80", unit="s"),
        Column(key="tokens_per_s", heading="tokens/s", digits=1),
        Column(key="predicted", heading="predicted tokens/s", digits=1),
        Column(key="speedup_best", heading="× best full attention", unit="x", speedup=True),
        Column(key="speedup_same", heading="× full, same batch", unit="x", speedup=True),
        Column(key="hit_rate", heading="hit rate", unit="%", digits=0),
        Column(key="device", heading="device", unit="B"),
        Column(key="host", heading="host", unit="B"),
    ),
    targets=(
        *(
            Target(
                text=f"ShadowKV at 122K, largest batch, against full attention's best: {step}",
                row={"context": 122 * 1024, "method": "ShadowKV, int8 on the device", "size": LARGEST},
                column="speedup_best",
                at_least=least,
            )
            for step, least in (("first step", 4.0), ("what the bytes allow", 8.0))
        ),
        Target(
            text="ShadowKV at 122K, one sequence, values on the device",
            row={"context": 122 * 1024, "method": "ShadowKV, int8 on the device", "batch": 1},
            column="speedup_same",
            at_least=1.3,
        ),
    ),
    run=run,
)
