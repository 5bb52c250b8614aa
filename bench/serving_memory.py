"""How many sequences fit at Llama-3.1-8B's shapes, by the engine's accounting, and whether that is right."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from bench.record import Row
from bench.session import Session
from bench.synthetic import LLAMA_3_1_8B, make_tokens
from longshadow import ShadowKVConfig
from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.batch_room import batch_size
from longshadow.engine.runtime.shapes import LayerShape
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.shadowkv.batch_memory import batch_bytes
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.step_buffers import Capacity, Geometry

SHAPE = LLAMA_3_1_8B
DTYPE = torch.bfloat16
RANK = 160
GENERATED = 256
STEPS = 3
STOCK, ENGINE, PART = "stock cache", "engine, compressed", "sequences at once"
CONFIG = ShadowKVConfig(
    budget_tokens=512,
    rank=RANK,
    factor_dtype="int8",
    candidate_factor=1.0,
    resident_factor=1.0,
    dense_threshold=0,
    # A sum over no queries weighs all elements alike, and takes the same memory.
    query_weighted=False,
)
LAYER = LayerShape(
    num_kv_heads=SHAPE.num_kv_heads, key_dim=SHAPE.head_dim, value_dim=SHAPE.head_dim, itemsize=DTYPE.itemsize
)


def memory_rows(contexts: Sequence[int], device_bytes: int) -> list[Row]:
    """For each length the sequences that can be held while one more prompt is read, and those of exact caches.

    The memory of the batch in which they decode is theirs, too.
    """
    device = torch.device("cuda")
    accounting = Accounting([LAYER] * SHAPE.num_layers, CONFIG, device, is_batched=True)
    geometry = Geometry(
        num_kv_heads=SHAPE.num_kv_heads,
        key_dim=SHAPE.head_dim,
        value_dim=SHAPE.head_dim,
        chunk_size=CONFIG.chunk_size,
        layout=SHAPE.layout,
        dtype=DTYPE,
        device=device,
    )
    rows: list[Row] = []
    for context in contexts:
        need = accounting.need(context - GENERATED, GENERATED)
        held = need.shared + need.completion
        rotation = context * SHAPE.head_dim * DTYPE.itemsize
        left = device_bytes - rotation - (need.prefill.device - held.device)

        def taken(count: int, each: int = held.device, room: Capacity = need.room) -> int:
            places = batch_size(count)
            batch = batch_bytes(CONFIG, (geometry,) * SHAPE.num_layers, SHAPE.num_query_heads, room, places)
            return each * count + batch

        count = bisect_right(range(1, left // held.device + 1), left, key=taken)
        exact = LAYER.token_bytes * SHAPE.num_layers * context
        of_stock = device_bytes // exact
        for name, size, fitting in ((STOCK, exact, of_stock), (ENGINE, taken(count) / count, count)):
            rows.append(
                {
                    "part": PART,
                    "method": name,
                    "context": context,
                    "sequence_bytes": size,
                    "sequences": fitting,
                    "memory_ratio": fitting / of_stock,
                }
            )
    return rows


def check_accounting(contexts: Sequence[int], session: Session) -> int:
    """Bytes by which real sequences of one layer, after some decoding, differ from the prediction."""
    error = 0
    accounting = Accounting([LAYER], CONFIG, torch.device("cpu"))
    for context in contexts:
        session.progress(f"accounting at {context:,} tokens")
        tokens = make_tokens(SHAPE, context, rank=RANK, dtype=DTYPE, device="cpu", seed=session.seed)
        sequence = tokens.cache(SHAPE, CONFIG)
        for _ in range(STEPS):
            sequence.append(tokens.keys[:, :1], tokens.values[:, :1], lambda start, stop: None)
            query = torch.randn(SHAPE.num_query_heads, SHAPE.head_dim, dtype=DTYPE)
            sequence.attend_token(query, AttentionParameters(scaling=SHAPE.head_dim**-0.5))
        report = SequenceState(layers=[sequence]).memory(values_on_host=True)
        need = accounting.need(context, STEPS)
        predicted = need.shared + need.completion
        error += abs(predicted.device - report.device_bytes) + abs(predicted.host - report.host_bytes)
    return error
