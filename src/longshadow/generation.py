"""One measured generation: the prompt, the cache, the tokens as they come, the times and the bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from longshadow.engine.runtime import SamplingParams
from longshadow.engine.runtime.loading import end_tokens
from longshadow.engine.runtime.model_defaults import UNSUPPORTED, ModelDefaults
from longshadow.engine.shadowkv import MemoryReport, ShadowKVCache, ShadowKVConfig, graphed_decoding
from longshadow.models import LoadedModel
from longshadow.streaming import (
    MeasuringStreamer,
    PrefillCallback,
    TextCallback,
    prefill_hooks,
    remembered_interrupts,
)

# How this module runs a model, whatever its generation_config says: one sequence, a token at a time, in our cache.
ONE_STREAM: dict[str, Any] = {
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None: as the model's generation_config says, as for `SamplingParams`.

    Args:
        max_new_tokens: tokens to generate at most; at least 1.
        temperature: 0 takes the most likely token, above 0 samples.
        top_p: sample from the most likely tokens that together have this probability, 0 < top_p <= 1.
        seed: of the random numbers, when sampling.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        self.params()

    def params(self) -> SamplingParams:
        """As the engine takes them. Raises ValueError for values out of range."""
        return SamplingParams(
            max_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )

    def arguments(self, loaded: LoadedModel) -> dict[str, Any]:
        """For `model.generate`: the engine's rule for what is not said here."""
        ends = end_tokens(loaded.model, loaded.tokenizer)
        defaults = ModelDefaults.of(loaded.model, ends)
        defaults.warn()
        params = defaults.fill(self.params(), self.max_new_tokens)
        neutral = ONE_STREAM | {name: values[-1] for name, values in UNSUPPORTED.items()}
        chosen: dict[str, Any] = {
            **{name: value for name, value in neutral.items() if hasattr(defaults.source, name)},
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": params.repetition_penalty,
        }
        if ends:
            chosen["eos_token_id"] = list(ends)
        if params.stops:
            chosen |= {"stop_strings": list(params.stops), "tokenizer": loaded.tokenizer}
        if params.is_greedy:
            return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        # transformers' own top_k, where none is named, is neither the model's choice nor the user's.
        return chosen | {
            "do_sample": True,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": max(0, params.top_k or 0),
            "min_p": params.min_p or None,
        }


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one generation gave and took.

    Args:
        tokens: the generated ids, an end-of-sequence token included.
        first_token_seconds: from the call to the first token; None when there is no token.
        tokens_per_second: of the tokens after the first; None when there is none.
        full_cache_bytes: what an exact cache of the same tokens takes; the last token is in no cache.
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
    full_cache_bytes: int
    attended_fraction: float
    interrupted: bool


def full_cache_bytes(config: PreTrainedConfig, num_tokens: int, itemsize: int) -> int:
    """What an exact cache of that many tokens takes: 2 x layers x KV heads x head_dim x tokens x itemsize.

    Sliding-window layers hold at most their window, linear-attention layers no keys.
    """
    text_config = config.get_text_config(decoder=True)
    window = getattr(text_config, "sliding_window", None)
    usual_type = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(text_config, "layer_types", None) or [usual_type] * text_config.num_hidden_layers
    tokens_per_type = {
        "full_attention": num_tokens,
        "sliding_attention": min(num_tokens, window or num_tokens),
    }
    tokens = sum(tokens_per_type.get(layer_type, 0) for layer_type in layer_types)
    return 2 * key_width(config) * tokens * itemsize


def key_width(config: PreTrainedConfig) -> int:
    """Elements of one token's keys in one layer, KV heads x head_dim: the largest rank they can have."""
    text_config = config.get_text_config(decoder=True)
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
        full_cache = DynamicCache(config=loaded.model.config)
        streamer, interrupted = _stream(loaded, prompt_ids, sampling, full_cache, on_text, on_prefill)
        memory = peak = MemoryReport(device={"keys and values": _num_bytes(full_cache)})
        attended_fraction = 1.0
    else:
        with ShadowKVCache.for_model(loaded.model, shadow) as cache, graphed_decoding(loaded.model, cache):
            streamer, interrupted = _stream(loaded, prompt_ids, sampling, cache, on_text, on_prefill)
            memory, peak = cache.memory(), cache.memory(peak=True)
            attended_fraction = cache.statistics().attended_fraction
    cached_tokens = prompt_ids.shape[1] + max(0, len(streamer.tokens) - 1)
    return Generation(
        text="".join(streamer.pieces),
        tokens=streamer.tokens,
        first_token_seconds=streamer.first_token_seconds,
        tokens_per_second=streamer.tokens_per_second,
        device_bytes=memory.device_bytes,
        host_bytes=memory.host_bytes,
        peak_bytes=peak.total_bytes,
        full_cache_bytes=full_cache_bytes(loaded.model.config, cached_tokens, loaded.model.dtype.itemsize),
        attended_fraction=attended_fraction,
        interrupted=interrupted,
    )


def _stream(
    loaded: LoadedModel,
    prompt_ids: torch.Tensor,
    sampling: Sampling,
    cache: DynamicCache | ShadowKVCache,
    on_text: TextCallback,
    on_prefill: PrefillCallback,
) -> tuple[MeasuringStreamer, bool]:
    set_seed(sampling.seed)
    model: Any = loaded.model  # `generate` is a mixin's that PreTrainedModel's type does not tell
    prompt_ids = prompt_ids.to(model.device)
    with remembered_interrupts() as is_interrupted:
        streamer = MeasuringStreamer(loaded.tokenizer, on_text, is_interrupted)
        try:
            with prefill_hooks(model, on_prefill):
                model.generate(
                    prompt_ids,
                    attention_mask=torch.ones_like(prompt_ids),
                    past_key_values=cache,
                    streamer=streamer,
                    **sampling.arguments(loaded),
                )
        except KeyboardInterrupt:
            streamer.end()  # half a character may be held back
            return streamer, True
    return streamer, is_interrupted()


def _num_bytes(cache: DynamicCache) -> int:
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if tensor is not None)
