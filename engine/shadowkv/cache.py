"""`ShadowKVCache`: a transformers cache whose decoding reads a small, well-chosen part of a long context."""

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pickle import PicklingError
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from longshadow.engine.shadowkv.arrival import WatchedCache, watch
from longshadow.engine.shadowkv.attention import activate
from longshadow.engine.shadowkv.choice import choose_operators, decode_batch
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.families import AttentionLayer, RotaryAngles, describe_attention
from longshadow.engine.shadowkv.layer import ShadowKVLayer
from longshadow.engine.shadowkv.memory import MemoryReport, PeakMemory, report
from longshadow.engine.shadowkv.positions import TORN, RotationSource, TokenPositions
from longshadow.engine.shadowkv.rope import Rotation
from longshadow.engine.shadowkv.state import CacheState
from longshadow.engine.shadowkv.token_log import TokenLog
from longshadow.engine.switching.text_model import unwrapped

# PEFT's kinds of adapters that begin every text with keys and values of their own, in a cache of their own.
OWN_CACHE_ADAPTERS = ("PREFIX_TUNING", "CARTRIDGE")
OWN_CACHE = (
    "ShadowKV does not support PEFT's prefix tuning: it puts a cache of its own in place of the one it is given; "
    "prompt tuning and p-tuning work"
)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts of a cache's decoding so far.

    Attributes:
        hit_rate: share of candidate chunks whose keys were resident; 0 before there were any.
        attended_fraction: attended tokens (sink, outliers, selected, local, tail) over cached tokens, per
            decoding step and KV head; 1 before any step.
        scored_fraction: tokens whose own key, exact or rebuilt, met the query, attended or not, over cached tokens.
        energy_kept: for each ShadowKV layer, the share of key energy (of weighted keys, by default) in each
            segment's low-rank factors, mean over the batch.
        num_tokens: tokens seen, padding included.
    """

    hit_rate: float
    attended_fraction: float
    scored_fraction: float
    energy_kept: list[list[float]]
    num_tokens: int


class ShadowKVCache(WatchedCache):
    """ShadowKV (arXiv 2410.21465) for `model.generate(..., past_key_values=cache)`.

    Made by `for_model`. Prompts are attended exactly; decoding attends to sink, outlier and selected chunks
    and to recent tokens. While a cache is open, calls of the model that carry it run longshadow's attention; all other
    calls are the model's own. A call that is given the cache and does not use it raises RuntimeError.

    A text that goes on must begin with what is cached: `generate` compares the ids it gets with those that came before
    and raises ValueError where they differ. Forwards get new tokens only, and cannot; `token_ids` lets a caller
    compare. LongRoPE beyond its original length reads the whole text again, as with the stock cache.

    Example:
        with ShadowKVCache.for_model(model, ShadowKVConfig(budget_tokens=512)) as cache:
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
            print(cache.memory(), cache.statistics())
    """

    def __init__(self, model: PreTrainedModel, config: ShadowKVConfig) -> None:
        _check_arguments(model, config)
        model = unwrapped(model)
        generation = getattr(model, "generation_config", None)
        if config.prefill_chunk_size is None and generation is not None:
            config = replace(config, prefill_chunk_size=generation.prefill_chunk_size)
        described, angles = describe_attention(model)
        attention_layers = [layer for layer in described if layer is not None]
        width = max(layer.key_width for layer in attention_layers)
        config.prompt_rank(min(layer.key_width for layer in attention_layers))
        self.config = config
        chosen = choose_operators(model, config)
        self._state = CacheState(
            config=config,
            positions=TokenPositions(_rotation_source(attention_layers, angles)),
            segment_tokens=config.generated_segment_tokens(width),
            peak=PeakMemory(self._current_memory),
            operators=chosen,
            batch=decode_batch(model, config, chosen),
        )
        stock = DynamicCache(config=model.config).layers
        super().__init__(
            layers=[
                stock[index] if layer is None else ShadowKVLayer(self._state, layer)
                for index, layer in enumerate(described)
            ]
        )
        self._model = model
        self.tokens, self.num_arrivals = TokenLog(), 0
        self._release: weakref.finalize[..., ShadowKVCache] | None = None
        self._open()

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: ShadowKVConfig | None = None) -> Self:
        """An empty cache for `model`, which can be used from now until `close`.

        model: a causal language model of transformers, or one inside PEFT's or torch.compile's wrapper.

        Raises ValueError for models ShadowKV does not support and for a rank out of range.
        """
        return cls(model, config or ShadowKVConfig())

    @classmethod
    def from_exact(
        cls,
        model: PreTrainedModel,
        config: ShadowKVConfig,
        exact: DynamicCache,
        query_energies: Sequence[torch.Tensor] | None = None,
    ) -> Self:
        """Compresses a prompt that `model` has prefilled into `exact`; no padding.

        query_energies: for each layer [B, KV heads, head_dim], squares of the prompt's (post-RoPE) queries, summed
        over tokens and the query heads of each KV head. Without them all elements of a key count alike.
        """
        cache = cls(model, config)
        num_tokens = exact.get_seq_length()
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, ShadowKVLayer):
                source: Any = exact.layers[index]
                keys, values = source.keys, source.values
                energy = query_energies[index] if query_energies is not None else None
                layer.absorb(keys, values, torch.arange(num_tokens, device=keys.device).unsqueeze(0), energy)
            else:
                cache.layers[index] = exact.layers[index]
        return cache

    def _open(self) -> None:
        if self._release is None:
            undo = activate(self._model), watch(self._model)
            self._release = weakref.finalize(self, lambda: [each() for each in undo])

    def close(self) -> None:
        """Leaves: after its last cache the model is as it was before the first. Repeatable."""
        if self._release is not None:
            self._release()
            self._release = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announces new tokens to a layer. Raises RuntimeError for a cache that is closed."""
        if self._release is None:
            raise RuntimeError("this ShadowKVCache is closed: use the cache inside `with cache:`")
        self.num_arrivals += 1
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return updated

    def check_forward(self, mask: torch.Tensor | None, batch_size: int, num_new: int) -> None:
        """Raises RuntimeError after an interrupted forward, ValueError for a mask that does not fit what is cached.

        Before any layer has the new tokens, so that a call that is put right can follow.
        """
        if not self._state.is_ahead:
            self._check_whole()
            self._state.positions.new_tokens(mask, batch_size, num_new)

    def _check_whole(self) -> None:
        if len({self.get_seq_length(index) for index in range(len(self.layers))}) > 1:
            raise RuntimeError(TORN)

    def copy(self) -> Self:
        """A cache that goes on independently, for another question about the same text.

        It shares what is compressed with this one and owns its recent tokens. It is open if this one is, and is
        closed for itself; it belongs to the same model. `copy.copy` and `copy.deepcopy` do the same.
        """
        copied = type(self).__new__(type(self))
        copied._model, copied._release = self._model, None
        copied.config, copied.tokens, copied.num_arrivals = self.config, self.tokens.copy(), self.num_arrivals
        batch = None if self._state.batch is None else decode_batch(self._model, self.config, self._state.operators)
        copied._state = self._state.copy(PeakMemory(copied._current_memory), batch)
        layers: list[Any] = [
            layer.copy(copied._state) if isinstance(layer, ShadowKVLayer) else _copy_stock(layer)
            for layer in self.layers
        ]
        super(ShadowKVCache, copied).__init__(layers=layers)
        if self._release is not None:
            copied._open()
        return copied

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()

    def __reduce__(self) -> NoReturn:
        raise PicklingError(
            "a ShadowKVCache belongs to a model in memory and cannot be saved: use cache.copy(), or documents of LLM"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest tokens back, as DynamicCache does: `crop(-3)` three of every sequence, padding included.

        Raises ValueError, with nothing changed, where one of them is compressed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        num_columns = -tokens_to_remove
        self._check_whole()
        if num_columns > self.get_seq_length():
            raise ValueError(f"cannot take back {num_columns} tokens: the cache holds {self.get_seq_length()}")
        self._state.check_drop(num_columns)
        for layer in self.layers:
            if not isinstance(layer, ShadowKVLayer):
                stock: Any = layer
                stock.crop(tokens_to_remove)
        self._state.drop_last(num_columns)
        self.tokens.drop_last(num_columns)

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Ids [B, tokens] of what is cached, padding included; None where a forward brought embeddings instead.

        A text that was edited since differs from them.
        """
        return self.tokens.ids(self.get_seq_length())

    @property
    def is_ahead(self) -> bool:
        """True if the tokens of the running call were counted before it."""
        return self._state.is_ahead

    def check_text(self, ids: torch.Tensor) -> None:
        """Raises ValueError where a text's ids [B, tokens] do not begin with what is cached, or end there."""
        known = self.token_ids
        if known is None or len(known) != len(ids):
            return
        common = min(known.shape[1], ids.shape[1])
        differs = known[:, :common] != ids[:, :common].to(known.device)
        mask = self._state.positions.mask_with(0)
        if mask is not None:
            differs &= mask[:, :common].to(known.device)
        if bool(differs.any()):
            sequence, token = differs.nonzero()[0].tolist()
            raise ValueError(
                f"the text differs from what is cached at token {token} of sequence {sequence}: begin again with "
                "cache.reset(), or go on from a copy that was made before"
            )
        if ids.shape[1] <= known.shape[1]:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens, and {known.shape[1]} are cached: take the rest back with "
                f"cache.crop({ids.shape[1] - 1 - known.shape[1]}), or begin again with cache.reset()"
            )

    def memory(self, *, peak: bool = False) -> MemoryReport:
        """Bytes by part and place, now or (`peak`) at the largest total so far.

        The peak counts the exact keys and values of the layer that was being compressed, as "exact layer".
        """
        return self._state.peak.observe() if peak else self._current_memory()

    def _current_memory(self) -> MemoryReport:
        return report(self._tensors(), values_on_host=self.config.value_store == "host")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in self._state.positions.tensors():
            yield "rotation", tensor
        yield from (("token ids", tensor) for tensor in self.tokens.tensors)
        for layer in self.layers:
            if not isinstance(layer, ShadowKVLayer):
                stock: Any = layer
                yield from (("stock layers", held) for held in (stock.keys, stock.values) if held is not None)
                continue
            for sequence in layer.sequences:
                for part, tensors in sequence.tensors().items():
                    yield from ((part, held) for held in tensors)
        if self._state.batch is not None:
            for part, tensors in self._state.batch.tensors().items():
                yield from ((part, held) for held in tensors)

    def statistics(self) -> Statistics:
        """Counts of decoding so far."""
        layers = [layer for layer in self.layers if isinstance(layer, ShadowKVLayer)]
        counts = self._state.counts
        if self._state.batch is not None:
            self._state.batch.add_hits_to(counts)
        candidate_chunks = counts.hits + counts.misses
        return Statistics(
            hit_rate=counts.hits / candidate_chunks if candidate_chunks else 0.0,
            attended_fraction=counts.attended_tokens / counts.context_tokens if counts.context_tokens else 1.0,
            scored_fraction=counts.scored_tokens / counts.context_tokens if counts.context_tokens else 1.0,
            energy_kept=[layer.energy_kept() for layer in layers],
            num_tokens=self.get_seq_length(),
        )

    @property
    def state(self) -> CacheState:
        """The state that its layers share."""
        return self._state

    def reset(self) -> None:
        """Forgets all tokens and statistics."""
        super().reset()  # type: ignore[no-untyped-call]
        self._state.reset()
        self.tokens = TokenLog()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: sequences are copied by reference, only their recent tokens in full."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some sequences of the batch."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence of the batch."""
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _select(self, indices: torch.Tensor) -> None:
        sequences = indices.tolist()
        self._state.positions.select(sequences)
        self.tokens.select(indices)
        if self._state.batch is not None:
            self._state.batch.rearrange(sequences)
        for layer in self.layers:
            if isinstance(layer, ShadowKVLayer):
                layer.select(sequences)
            else:
                stock: Any = layer
                stock.reorder_cache(indices)

    @property
    def max_cache_len(self) -> int:
        """Refuses: PEFT asks for it before it puts a cache of its own, with its prefix, in place of this one."""
        raise ValueError(OWN_CACHE)

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return next(len(layer.sequences) for layer in self.layers if isinstance(layer, ShadowKVLayer))


def _check_arguments(model: Any, config: Any) -> None:
    """Raises ValueError for what is no model or configuration, and for PEFT adapters that have a cache of their own."""
    if not isinstance(unwrapped(model), PreTrainedModel):
        raise ValueError(f"a ShadowKVCache needs a model of transformers, got {type(model).__name__}")
    if not isinstance(config, ShadowKVConfig):
        raise ValueError(f"config must be a ShadowKVConfig, got {type(config).__name__}")
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "peft_type", None) in OWN_CACHE_ADAPTERS:
        raise ValueError(OWN_CACHE)


def _copy_stock(layer: Any) -> Any:
    """An independent copy of transformers' own layer."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(copied, name, value.detach().clone())
    return copied


def _rotation_source(layers: list[AttentionLayer], angles: RotaryAngles) -> RotationSource:
    layouts = {layer.layer_type: layer.layout for layer in layers if layer.layout is not None}

    def rotation(layer_type: str, position_ids: torch.Tensor) -> Rotation:
        return angles.rotation(layer_type, position_ids, layouts[layer_type])

    return rotation
