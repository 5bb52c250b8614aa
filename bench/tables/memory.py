"""Device memory of a ShadowKV cache per token, at the attention shapes of Llama-3.1-8B."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import LlamaForCausalLM

from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, ModelShape, make_cache
from bench.table import Column, Outcome, Table, Target
from longshadow import ShadowKVCache, ShadowKVConfig
from longshadow.engine.shadowkv.memory import MemoryReport

SHAPE = LLAMA_3_1_8B
# The attention of the model with a body that is small: nothing else of it is measured.
PROBE = replace(SHAPE, num_layers=2, hidden_size=64, intermediate_size=64, vocab_size=64)
RANK = 160
FULL, BF16, INT8 = "full cache, bf16", "ShadowKV, bf16", "ShadowKV, int8 factors and landmarks"
# What does not grow with the context: the budget's resident slots, outlier and sink chunks, recent tokens, basis. Ids
# are of the decoded token alone; a text that came as ids has four bytes a token, an eighth of a byte for each layer.
FIXED_PARTS = ("resident", "exact chunks", "tail", "basis", "query energy", "token ids")
# One rotation serves all layers of a sequence, one scratch memory all layers of a batch.
SHARED_PARTS = ("rotation", "decode step")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Bytes per token are the slope between two contexts."""

    short_tokens: int = 32_768
    long_tokens: int = 65_536
    selected_tokens: int = 1024


def run(config: Config, session: Session) -> Outcome:
    """Caches at both lengths, after one decoding step, which fills the resident slots."""
    model = PROBE.model(
        dtype=torch.bfloat16, device=session.device, seed=session.seed, max_positions=config.long_tokens + 1
    )
    rows: list[Row] = [full_cache_row(SHAPE)]
    exact = True
    factor_dtypes: dict[str, Literal["int8"] | None] = {BF16: None, INT8: "int8"}
    for name, factor_dtype in factor_dtypes.items():
        reports = []
        for num_tokens in (config.short_tokens, config.long_tokens):
            session.progress(f"{name}, {num_tokens:,} tokens")
            with make_shadow_cache(model, num_tokens, config, factor_dtype, session) as cache:
                reports.append(cache.memory())
                exact &= reports[-1].total_bytes == storage_bytes(cache)
        rows.append({"cache": name, **slope(reports[0], reports[1], config.long_tokens - config.short_tokens)})
    check = Check(
        passed=exact,
        max_error=None,
        text="the reported bytes are those of all tensor storages reachable from the cache, each counted once",
    )
    return Outcome(rows=rows, check=check)


def make_shadow_cache(
    model: LlamaForCausalLM,
    num_tokens: int,
    config: Config,
    factor_dtype: Literal["int8"] | None,
    session: Session,
) -> ShadowKVCache:
    """A compressed prompt and one decoded token."""
    exact = make_cache(PROBE, num_tokens, rank=RANK, dtype=torch.bfloat16, device=session.device, seed=session.seed)
    cache_config = ShadowKVConfig(
        budget_tokens=config.selected_tokens,
        rank=RANK,
        factor_dtype=factor_dtype,
        value_store="host",
        resident_factor=1.0,
        dense_threshold=0,
    )
    cache = ShadowKVCache.from_exact(model, cache_config, exact)
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long, device=session.device), past_key_values=cache)
    return cache


def storage_bytes(cache: ShadowKVCache) -> int:
    """Bytes of the tensor storages that the cache's objects hold, found by walking them."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [cache._state.positions, cache.tokens, *cache.layers]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (torch.nn.Module, type)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif type(thing).__module__.startswith("longshadow"):
            waiting += vars(thing).values()
    return sum(storages.values())


def slope(short: MemoryReport, long: MemoryReport, num_tokens: int) -> Row:
    """Bytes per token and layer by part, and what is there at any length."""
    layers = {
        part: SHAPE.num_layers if part in SHARED_PARTS else PROBE.num_layers
        for part in long.device
        if part not in FIXED_PARTS
    }
    parts = {
        part: (long.device[part] - short.device.get(part, 0)) / num_tokens / num_layers
        for part, num_layers in layers.items()
    }
    total = sum(parts.values())
    return {
        "device": total,
        "ratio": full_bytes(SHAPE) / total,
        **parts,
        "host": (long.host_bytes - short.host_bytes) / num_tokens / PROBE.num_layers,
        "fixed": sum(long.device.get(part, 0) for part in FIXED_PARTS) / PROBE.num_layers,
    }


def full_bytes(shape: ModelShape) -> int:
    """Keys and values of a token in bf16."""
    return 2 * shape.num_kv_heads * shape.head_dim * 2


def full_cache_row(shape: ModelShape) -> dict[str, Any]:
    """The baseline, by arithmetic."""
    return {"cache": FULL, "device": float(full_bytes(shape)), "ratio": 1.0, "host": 0.0, "fixed": 0}


TABLE = Table(
    name="memory",
    title="Device bytes per token and layer",
    about="Llama-3.1-8B shapes (8 KV heads of 128, 32 layers), rank 160, bf16, values in host memory (on a machine "
    "without a GPU: what would be). The slope between 32K and 64K tokens; resident "
    "slots (1,024 selected tokens, 3 candidates each), sink and "
    "outlier chunks, recent tokens and the basis do not grow with the context and "
    "stand apart. The rotation is one table "
    "for all layers and counted by 1/32.",
    configs={"cpu": Config(), "cuda": Config()},
    quick=lambda config: replace(config, short_tokens=4096, long_tokens=8192),
    columns=(
        Column(key="cache", heading="cache"),
        Column(key="device", heading="device bytes per token", digits=1),
        Column(key="ratio", heading="smaller by", unit="x"),
        Column(key="factors", heading="factors", digits=1),
        Column(key="landmarks", heading="landmarks", digits=1),
        Column(key="rotation", heading="rotation", digits=1),
        Column(key="host", heading="host bytes per token", digits=1),
        Column(key="fixed", heading="apart, at any length", unit="B"),
    ),
    targets=(
        Target(text="ShadowKV in bf16", row={"cache": BF16}, column="device", at_most=584),
        Target(text="ShadowKV with int8 factors and landmarks", row={"cache": INT8}, column="device", at_most=320),
    ),
    run=run,
)
