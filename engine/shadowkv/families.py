"""What a model's attention layers do to their keys, found out by running them rather than by name.

Every attention module is run once on a few random hidden states, up to the point where it hands its keys to
the cache: once with the identity in place of RoPE and once with the model's own angles. The layout that
turns the first keys into the second is the layer's own.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, get_layer_types_and_kwargs

from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate
from longshadow.engine.switching.attention import lend_attention, offer_attention
from longshadow.engine.switching.text_model import text_model

FULL_ATTENTION = "full_attention"
STOCK_LAYER_TYPES = ("sliding_attention",)
PROBE_POSITIONS = (0, 1, 5, 11, 30)
# The attention function that modules are lent to see what they hand it, and what it may get beside keys and a mask.
TRIAL = "longshadow_trial"
KNOWN = ("scaling", "dropout", "softcap", "s_aux", "sliding_window", "position_ids", "is_causal")


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionLayer:
    """A full-attention layer of a model.

    Attributes:
        module: the attention module.
        layer_type: transformers' name for the kind of layer.
        layout: how its keys are rotated, None without RoPE (NoPE layers).
        key_width: KV heads x head_dim.
    """

    module: nn.Module
    layer_type: str
    layout: RotaryLayout | None
    key_width: int


class RotaryAngles:
    """The model's own rotary module as a function of positions; it knows dynamic and scaled RoPE."""

    def __init__(self, model: PreTrainedModel) -> None:
        text = text_model(model)  # a vision tower may have a module of the same name
        inside = (model if text is None else text.module).named_modules()
        modules = [module for name, module in inside if name.split(".")[-1] == "rotary_emb"]
        self._module: nn.Module | None = modules[0] if modules else None
        self._by_type = self._module is not None and "layer_type" in inspect.signature(self._module.forward).parameters
        self.dtype = model.dtype
        config = model.config.get_text_config(decoder=True)
        self._parameters: Any = getattr(config, "rope_parameters", None) or {}

    def cos_sin(self, layer_type: str, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin [B, T, .] as the model's layers get them, for positions [B, T]; None for layers without RoPE."""
        if self._module is None:
            raise ValueError("ShadowKV needs the model's rotary_emb module, and this model has none")
        if self._by_type and self._parameters.get(layer_type) is None:
            return None
        like = torch.empty(0, dtype=self.dtype, device=position_ids.device)
        arguments = (layer_type,) if self._by_type else ()
        cos, sin = self._module(like, position_ids, *arguments)
        return cos, sin

    def rotation(self, layer_type: str, position_ids: torch.Tensor, layout: RotaryLayout) -> Rotation:
        """One cos and sin per rotated pair [B, T, P]."""
        angles = self.cos_sin(layer_type, position_ids)
        assert angles is not None
        cos, sin = angles
        return Rotation(_per_pair(cos, layout), _per_pair(sin, layout))


def _per_pair(angles: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Drops the second copy of each pair's entry, where a family keeps two, side by side or by halves; contiguous."""
    num_pairs = layout.rotary_dim // 2
    if angles.shape[-1] == num_pairs:
        return angles.contiguous()
    by_halves = torch.equal(angles[..., :num_pairs], angles[..., num_pairs:])
    return (angles[..., :num_pairs] if by_halves else angles[..., 0::2]).contiguous()


def describe_attention(model: PreTrainedModel) -> tuple[list[AttentionLayer | None], RotaryAngles]:
    """The full-attention layers by layer index, None where transformers' own cache layer serves.

    Raises ValueError with the reason for models that ShadowKV does not support.
    """
    modules = full_attention_modules(model)
    config = model.config.get_text_config(decoder=True)
    layer_types, _ = get_layer_types_and_kwargs(config)
    angles = RotaryAngles(model)
    layers: list[AttentionLayer | None] = []
    for index, layer_type in enumerate(layer_types):
        if index not in modules:
            layers.append(None)
            continue
        layout, key_width = _probe(modules[index], layer_type, angles, config.hidden_size)
        layers.append(AttentionLayer(module=modules[index], layer_type=layer_type, layout=layout, key_width=key_width))
    return layers, angles


def full_attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The modules of full-attention layers by layer index; of a model without weights, too.

    Raises ValueError, with the reason, where ShadowKV cannot support the model, whatever its weights are.
    """
    name = type(model).__name__
    _check_configuration(model.config, name)
    layer_types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    modules = _attention_modules(model)
    full = [index for index, layer_type in enumerate(layer_types) if layer_type == FULL_ATTENTION]
    for index in full:
        if index not in modules:
            _refuse(name, f"no attention module with position_embeddings was found for layer {index}")
    return {index: modules[index] for index in full}


def _check_configuration(model_config: PreTrainedConfig, name: str) -> None:
    config = model_config.get_text_config(decoder=True)
    if model_config.is_encoder_decoder:
        _refuse(name, "it is an encoder-decoder")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        _refuse(name, "its tokens attend to later ones, too")
    if getattr(config, "kv_lora_rank", None):
        _refuse(name, "it caches latent vectors (multi-head latent attention), not keys")
    if getattr(config, "cross_attention_layers", None):
        _refuse(name, "some of its layers attend to images, whose keys are cached apart")
    if getattr(config, "num_kv_shared_layers", None):
        _refuse(name, "some of its layers share keys and values")
    if getattr(config, "is_heterogeneous", False):
        _refuse(name, f"its layers differ in {', '.join(sorted(config.per_layer_attributes or ()))}")
    layer_types, _ = get_layer_types_and_kwargs(config)
    for layer_type in layer_types:
        if layer_type not in (FULL_ATTENTION, *STOCK_LAYER_TYPES):
            _refuse(name, f"it has layers of type {layer_type!r}")
    if FULL_ATTENTION not in layer_types:
        _refuse(name, "it has no full-attention layer, so there is nothing to compress")


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(f"ShadowKV does not support {name}: {reason}")


def _attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    return {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "position_embeddings" in inspect.signature(module.forward).parameters
        and "past_key_values" in inspect.signature(module.forward).parameters
        and hasattr(module, "scaling")
    }


class _AttentionReached(Exception):
    """What a module hands to its attention function."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, mask: Any, others: dict[str, Any]) -> None:
        self.keys, self.values, self.mask, self.others = keys, values, mask, others


def _reach(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> NoReturn:
    raise _AttentionReached(key, value, attention_mask, others)


AttentionInterface.register(TRIAL, _reach)


def _lend_trial(module: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    return lend_attention(TRIAL, forward, **kwargs)


class _KeyProbe(DynamicCache):
    """Hands keys and values back as they came."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _keys_of(
    module: nn.Module,
    hidden: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """The keys that a module gives its cache, after a look at what it then gives its attention function."""
    cache = _KeyProbe()
    # What models hand their layers; `shared_kv_states` is what layers that share keys put into it.
    given: dict[str, Any] = dict(
        hidden_states=hidden,
        position_embeddings=angles,
        position_ids=position_ids,
        attention_mask=None,
        past_key_values=cache,
        shared_kv_states={},
    )
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [each for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    unknown = [each.name for each in needed if each.name not in given]
    if unknown:
        _refuse(type(module).__name__, f"it takes {', '.join(unknown)}")
    names = {each.name for each in parameters}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        names.add("position_ids")
    undo = offer_attention([module], _lend_trial)
    try:
        with torch.no_grad():
            module(**{name: value for name, value in given.items() if name in names})
    except _AttentionReached as reached:
        _check_attention(type(module).__name__, reached, cache)
        return cache.keys
    # A module is its family's program, and may fail outside of its model in ways of its own.
    except Exception as error:
        raise ValueError(
            f"ShadowKV does not support {type(module).__name__}: it cannot be tried by itself ({error})"
        ) from error
    finally:
        undo()
    _refuse(type(module).__name__, "its attention does not go through transformers' attention interface")


def _check_attention(name: str, reached: _AttentionReached, cache: Any) -> None:
    """Raises ValueError where longshadow's attention would not compute what the module's own does."""
    if reached.keys is not cache.keys:
        _refuse(name, "it copies its keys between cache and attention, so the history would be lost")
    if reached.values is not cache.values:
        _refuse(name, "it changes its values between cache and attention")
    if reached.mask is not None:
        _refuse(name, "it makes an attention mask of its own")
    unknown = sorted(key for key, value in reached.others.items() if key not in KNOWN and value is not None)
    if unknown:
        _refuse(name, f"its attention takes {', '.join(unknown)}")


def _probe(
    module: nn.Module, layer_type: str, angles: RotaryAngles, hidden_size: int
) -> tuple[RotaryLayout | None, int]:
    """The layer's rotary layout and key width."""
    # A quantised layer's weights are integers, and may be buffers.
    weight = next(chain(module.parameters(), module.buffers()))
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    position_ids = torch.tensor([PROBE_POSITIONS], device=device)
    rotated_by = angles.cos_sin(layer_type, position_ids)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(PROBE_POSITIONS), hidden_size, generator=generator).to(device, angles.dtype)
    if rotated_by is None:
        keys = _keys_of(module, hidden, None, position_ids)
        return None, keys.shape[1] * keys.shape[3]
    cos, sin = rotated_by
    plain = _keys_of(module, hidden, (torch.ones_like(cos), torch.zeros_like(sin)), position_ids).float()
    rotated = _keys_of(module, hidden, rotated_by, position_ids).float()
    key_width = plain.shape[1] * plain.shape[3]
    tolerance = 0.02 * float(rotated.norm())  # layouts that differ are off by a large part of the norm
    if float((rotated - plain).norm()) <= tolerance:
        return None, key_width
    for rotary_dim in {cos.shape[-1], 2 * cos.shape[-1]}:
        for style in ("half", "interleaved"):
            if rotary_dim > plain.shape[3]:
                continue
            layout = RotaryLayout(style=style, rotary_dim=rotary_dim)
            rotation = Rotation(_per_pair(cos[0], layout), _per_pair(sin[0], layout))
            if float((rotate(plain, rotation, layout) - rotated).norm()) <= tolerance:
                return layout, key_width
    raise ValueError(f"ShadowKV does not support {type(module).__name__}: its rotary embedding is of an unknown form")
