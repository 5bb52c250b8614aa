"""Bytes on the device and on the host: of one sequence exactly, of a whole machine with workspaces.

`sequence_memory` counts what `ShadowKVCache.memory()` reports, part by part.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from longshadow.engine.planning.implementation import FUSED, Implementation
from longshadow.engine.planning.layout import SequenceSize, grown_capacity, lay_out
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.shadowkv.config import ShadowKVConfig

SCALE_BYTES = 4
INDEX_BYTES = 8
TOKEN_ID_BYTES = 4
GIBIBYTE = 2**30
# The driver's context, the libraries' workspaces, and what an allocator cannot use.
RESERVED_DEVICE_BYTES = GIBIBYTE
USABLE_DEVICE_SHARE = 0.98
# The operating system and the process.
RESERVED_HOST_BYTES = 4 * GIBIBYTE


@dataclass(frozen=True, kw_only=True)
class SequenceMemory:
    """Bytes of one sequence in all layers, by part."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """Sum over the device's parts."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Sum over the host's parts."""
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Bytes that a batch takes at its peak, weights included."""

    device_bytes: int
    host_bytes: int


def vector_bytes(width: int, shape: ModelShape, quantized: str | None) -> int:
    """A stored vector of `width` elements: in the model's type, or a byte each and an fp32 scale."""
    return width * shape.element_bytes if quantized is None else width + SCALE_BYTES


def sequence_memory(
    shape: ModelShape, config: ShadowKVConfig, size: SequenceSize, implementation: Implementation = FUSED
) -> SequenceMemory:
    """A sequence of a ShadowKV cache, after a step on a GPU (or with `resident_factor` given)."""
    num_heads, vector = shape.num_kv_heads, shape.head_dim * shape.element_bytes
    factors = landmarks = basis = exact = stored = 0
    value = vector_bytes(shape.head_dim, shape, config.value_dtype)
    for segment in size.segments:
        num_chunks = segment.num_tokens // config.chunk_size
        landmark = vector_bytes(shape.head_dim, shape, config.factor_dtype) + implementation.landmark_id_bytes
        landmarks += num_heads * num_chunks * landmark
        exact += num_heads * segment.num_exact_chunks * (INDEX_BYTES + 2 * config.chunk_size * vector)
        stored += num_heads * segment.num_tokens * value
        if config.key_store == "low_rank":
            factors += segment.num_tokens * vector_bytes(segment.rank, shape, config.factor_dtype)
            basis += num_heads * (segment.rank + 1) * vector
    layer = {
        "factors": factors,
        "basis": basis,
        "landmarks": landmarks,
        "exact chunks": exact,
        "tail": 2 * num_heads * size.tail_capacity * vector,
        "resident": _resident_bytes(shape, size),
        "query energy": num_heads * shape.head_dim * SCALE_BYTES if config.query_weighted else 0,
    }
    device = {part: shape.num_full_layers * num_bytes for part, num_bytes in layer.items()}
    if implementation.keeps_rotations and config.key_store == "low_rank":
        rotated = size.num_compressed + size.logged_rotations
        device["rotation"] = rotated * shape.rotary_dim * shape.element_bytes
    if implementation.keeps_token_ids:
        device["token ids"] = size.num_tokens * TOKEN_ID_BYTES
    device["stock layers"] = _sliding_bytes(shape, size.num_tokens)
    values = {"values": shape.num_full_layers * stored}
    if config.key_store == "exact":
        values["keys"] = values["values"]
    host = values if config.value_store == "host" else {}
    return SequenceMemory(device=_present(device if host else {**device, **values}), host=_present(host))


def _present(parts: dict[str, int]) -> dict[str, int]:
    return {part: num_bytes for part, num_bytes in parts.items() if num_bytes}


def _resident_bytes(shape: ModelShape, size: SequenceSize) -> int:
    """Slots: chunk and age, which values are there, keys and values; and the candidates' slots, where they differ."""
    if not size.num_slots:
        return 0
    token = 1 + 2 * shape.head_dim * shape.element_bytes
    slots = size.num_slots * (2 * INDEX_BYTES + size.chunk_size * token)
    candidates = size.num_candidate_chunks if size.num_candidate_chunks != size.num_slots else 0
    return shape.num_kv_heads * (slots + candidates * INDEX_BYTES)


def _sliding_bytes(shape: ModelShape, num_tokens: int) -> int:
    # transformers keeps the window without the token that comes next
    held = min(num_tokens, max(shape.sliding_window - 1, 0))
    return 2 * shape.num_sliding_layers * held * shape.key_width * shape.element_bytes


def full_cache_bytes(shape: ModelShape, num_tokens: int) -> int:
    """Keys and values of a sequence without ShadowKV."""
    full = 2 * shape.num_full_layers * num_tokens * shape.key_width * shape.element_bytes
    return full + _sliding_bytes(shape, num_tokens)


def activation_bytes(shape: ModelShape, num_tokens: int) -> int:
    """The most that a forward of `num_tokens` holds besides weights and cache, in one of its layers.

    Residual and normed hidden states, with the network's gate, product and input to it, or with queries, keys,
    values and attention's output, rotated and not.
    """
    network = 3 * shape.num_active_experts * shape.intermediate_size
    attention = 3 * shape.query_width + 3 * shape.key_width
    return num_tokens * shape.element_bytes * (2 * shape.hidden_size + max(network, attention))


def step_bytes(shape: ModelShape, batch: int, num_chunks: int) -> int:
    """What a decoding step holds besides: logits of the vocabulary and of landmarks, twice."""
    return 8 * batch * (shape.vocab_size + shape.num_heads * num_chunks)


def demand(
    shape: ModelShape,
    config: ShadowKVConfig | None,
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    batch: int,
    prefill_chunk_size: int | None,
    implementation: Implementation = FUSED,
) -> Demand:
    """The larger of decoding `batch` sequences and of reading the last prompt beside the others' caches.

    Prompts come one after another. `config` None is full attention.
    """
    num_tokens = num_prompt_tokens + num_new_tokens
    if config is None:
        own, num_chunks = SequenceMemory(device={"cache": full_cache_bytes(shape, num_tokens)}), 0
    else:
        size = lay_out(config, shape.key_width, num_prompt_tokens, num_new_tokens)
        own, num_chunks = sequence_memory(shape, config, size, implementation), size.num_chunks
    prompt = _prompt_demand(shape, config, own, num_prompt_tokens, prefill_chunk_size)
    decoding = own.device_bytes + step_bytes(shape, batch, num_chunks)
    others = (batch - 1) * own.device_bytes
    return Demand(
        device_bytes=shape.weight_bytes + others + max(decoding, prompt.device_bytes),
        host_bytes=(batch - 1) * own.host_bytes + max(own.host_bytes, prompt.host_bytes),
    )


def _prompt_demand(
    shape: ModelShape, config: ShadowKVConfig | None, own: SequenceMemory, num_tokens: int, chunk: int | None
) -> Demand:
    """One prompt being read: its activations, and what it holds until it is compressed.

    Whole: one layer's exact keys and values at a time. In chunks: those of all layers, parked in the value store, and
    when a layer is compressed its own twice.
    """
    size = num_tokens if chunk is None else chunk
    pieces = [min(size, num_tokens - start) for start in range(0, num_tokens, size)]
    active = activation_bytes(shape, pieces[0])
    if config is None or config.runs_dense(num_tokens):
        return Demand(device_bytes=own.device_bytes + active, host_bytes=own.host_bytes)
    token = 2 * shape.key_width * shape.element_bytes
    if len(pieces) == 1:
        return Demand(device_bytes=own.device_bytes + active + num_tokens * token, host_bytes=own.host_bytes)
    parked = shape.num_full_layers * _appended_capacity(pieces) * token
    joined = active + 2 * num_tokens * token
    if config.value_store == "host":
        return Demand(device_bytes=own.device_bytes + joined, host_bytes=max(parked, own.host_bytes))
    return Demand(device_bytes=max(parked, own.device_bytes) + joined, host_bytes=0)


def _appended_capacity(pieces: Iterable[int]) -> int:
    """Room of a buffer after all pieces but the last were appended: that one never joins them."""
    capacity = num_tokens = 0
    *most, _ = pieces
    for piece in most:
        capacity = grown_capacity(capacity, num_tokens, piece)
        num_tokens += piece
    return capacity
