"""One measured generation: the prompt, the cache, the tokens as they come, the times and the bytes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from longshadow import ShadowKVCache, ShadowKVConfig
from longshadow.models import LoadedModel

TextCallback = Callable[[str], None]
PrefillCallback = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: tokens to generate at most; at least 1.
        temperature: 0 takes the most likely token, above 0 samples.
        top_p: sample from the most likely tokens that together have this probability, 0 < top_p <= 1.
        seed: of the random numbers, when sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (most likely token) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def arguments(self) -> dict[str, Any]:
        """For `model.generate`, with everything a model's own defaults could add to it switched off."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one generation gave and took.

    Args:
        tokens: the generated ids, an end-of-sequence token included.
        first_token_seconds: from the call to the first token; None when there is no token.
        tokens_per_second: of the tokens after the first; None when there is none.
        peak_bytes: device and host bytes at the moment when their sum was largest.
        attended_fraction: mean share of the context that a decoding step attended to, everything counted.
        interrupted: it was stopped by Ctrl-C; the rest tells what was done until then.
    """

    text: str
    tokens: list[int]
    first_token_seconds: float | None
    tokens_per_second: float | None
    device_bytes: int
    host_bytes: int
    peak_bytes: int
    attended_fraction: float
    interrupted: bool


def full_cache_bytes(config: PreTrainedConfig, num_tokens: int, itemsize: int) -> int:
    """What an exact cache of that many tokens takes: 2 x layers x KV heads x head_dim x tokens x itemsize.

    Sliding-window layers hold at most their window, linear-attention layers no keys.
    """
    text_config = config.get_text_config()
    layer_types = (
        getattr(text_config, "layer_types", None) or ["full_attention"] * text_config.num_hidden_layers
    )
    window = getattr(text_config, "sliding_window", None) or num_tokens
    tokens_per_type = {"full_attention": num_tokens, "sliding_attention": min(num_tokens, window)}
    tokens = sum(tokens_per_type.get(layer_type, 0) for layer_type in layer_types)
    return 2 * key_width(config) * tokens * itemsize


def key_width(config: PreTrainedConfig) -> int:
    """Elements of one token's keys in one layer, KV heads x head_dim: the largest rank they can have."""
    text_config = config.get_text_config()
    num_heads: int = text_config.num_attention_heads
    num_kv_heads: int = getattr(text_config, "num_key_value_heads", None) or num_heads
    head_dim: int = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    return num_kv_heads * head_dim


def warm_up(model: PreTrainedModel) -> None:
    """Runs one token: weights are memory-mapped, and reading them is no part of the time to first token."""
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def generate(
    loaded: LoadedModel,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    *,
    shadow: ShadowKVConfig | None,
    on_text: TextCallback,
    on_prefill: PrefillCallback,
) -> Generation:
    """Generates an answer to a prompt and measures it.

    Args:
        prompt_ids: [1, n].
        shadow: configuration of the ShadowKV cache; None attends to a full cache instead.
        on_text: receives the text as it comes.
        on_prefill: receives (finished layers, all layers) while the prompt is processed.

    Ctrl-C ends the generation early; what there is until then is returned.
    """
    if shadow is None:
        return _generate_exactly(loaded, prompt_ids, sampling, on_text, on_prefill)
    with ShadowKVCache.for_model(loaded.model, shadow) as shadow_cache:
        streamer, interrupted = _stream(loaded, prompt_ids, sampling, shadow_cache, on_text, on_prefill)
        memory = shadow_cache.memory()
        return streamer.measured(
            device_bytes=memory.device_bytes,
            host_bytes=memory.host_bytes,
            peak_bytes=shadow_cache.memory(peak=True).total_bytes,
            attended_fraction=shadow_cache.statistics().attended_fraction,
            interrupted=interrupted,
        )


def _generate_exactly(
    loaded: LoadedModel,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    on_text: TextCallback,
    on_prefill: PrefillCallback,
) -> Generation:
    cache = DynamicCache(config=loaded.model.config)
    streamer, interrupted = _stream(loaded, prompt_ids, sampling, cache, on_text, on_prefill)
    num_bytes = _dynamic_cache_bytes(cache)
    return streamer.measured(
        device_bytes=num_bytes,
        host_bytes=0,
        peak_bytes=num_bytes,
        attended_fraction=1.0,
        interrupted=interrupted,
    )


class _MeasuringStreamer(TextStreamer):
    """Hands on text as words are complete, and keeps the tokens and when they came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: TextCallback) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._started = time.perf_counter()
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._tokens.extend(value.flatten().tolist())
            self._times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._pieces.append(text)
            self._on_text(text)

    def measured(self, **usage: Any) -> Generation:
        """The generation so far, together with what its cache took."""
        rate = (len(self._times) - 1) / (self._times[-1] - self._times[0]) if len(self._times) > 1 else None
        return Generation(
            text="".join(self._pieces),
            tokens=list(self._tokens),
            first_token_seconds=self._times[0] - self._started if self._times else None,
            tokens_per_second=rate,
            **usage,
        )


def _stream(
    loaded: LoadedModel,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    cache: DynamicCache | ShadowKVCache,
    on_text: TextCallback,
    on_prefill: PrefillCallback,
) -> tuple[_MeasuringStreamer, bool]:
    set_seed(sampling.seed)
    prompt_ids = prompt_ids.to(loaded.model.device)
    streamer = _MeasuringStreamer(loaded.tokenizer, on_text)
    try:
        with _prefill_hooks(loaded.model, on_prefill):
            loaded.model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=sampling.max_new_tokens,
                past_key_values=cache,
                streamer=streamer,
                **sampling.arguments(),
            )
    except KeyboardInterrupt:
        streamer.end()  # the last word is still held back
        return streamer, True
    return streamer, False


@contextmanager
def _prefill_hooks(model: PreTrainedModel, on_prefill: PrefillCallback) -> Iterator[None]:
    """Reports every decoder layer of the model's first pass."""
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = next(
        (
            module
            for module in model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
        ),
        torch.nn.ModuleList(),
    )
    num_done = 0

    def report(*_: object) -> None:
        nonlocal num_done
        num_done += 1
        if num_done <= num_layers:
            on_prefill(num_done, num_layers)

    handles = [layer.register_forward_hook(report) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dynamic_cache_bytes(cache: DynamicCache) -> int:
    tensors = [
        tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None
    ]
    return sum(tensor.nbytes for tensor in tensors)
