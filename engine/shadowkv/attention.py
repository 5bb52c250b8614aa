"""The hand-off to transformers: from a cache layer's `update`, through the model's own code, to its `attend`.

A model calls `cache.update(keys, values)` and then the attention function registered under its
implementation's name, with the keys that `update` returned. These carry their layer. No module is patched;
several caches and models can be alive at once. A layer whose keys never arrive raises.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from longshadow.engine.shadowkv.exact import AttentionParameters, attend_causal

IMPLEMENTATION = "longshadow"
_LAYER = "_longshadow_layer"


class AttendingLayer(Protocol):
    """The cache layer's side of the hand-off; `is_sliding`: it sees to the attention's sliding window."""

    is_sliding: bool

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        parameters: AttentionParameters,
    ) -> torch.Tensor:
        """See `ShadowKVLayer.attend`."""


_expected: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def mark(keys: torch.Tensor, layer: AttendingLayer) -> torch.Tensor:
    """A view of `keys` that carries `layer` to the attention function."""
    marked = keys.view_as(keys)
    setattr(marked, _LAYER, layer)
    return marked


def expect_handoff(module: nn.Module, layer: AttendingLayer) -> None:
    """Notes that the next attention of `module` belongs to `layer`."""
    _expected[module] = weakref.ref(layer)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, Hq, T, D] -> ([B, T, Hq, Dv], None).

    Keys of a ShadowKV layer go to that layer; any other keys (stock sliding layers, no cache) are attended
    exactly. attention_mask is None or [B, keys].
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention masks are [batch, tokens] here, got shape {list(attention_mask.shape)}")
    if module.training and torch.is_grad_enabled():
        raise RuntimeError("longshadow's attention is for inference: call model.eval() or leave the cache first")
    expected = _expected.pop(module, None)
    layer: AttendingLayer | None = getattr(key, _LAYER, None)
    parameters = AttentionParameters(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap, sinks=s_aux
    )
    with torch.no_grad():
        if layer is not None:
            if sliding_window is not None and not layer.is_sliding:
                raise RuntimeError(f"{type(module).__name__} has a sliding window, its cache layer does not")
            out = layer.attend(query, key, value, attention_mask, position_ids, parameters)
        elif expected is not None and expected() is not None:
            raise RuntimeError(
                f"{type(module).__name__} copies its keys between cache and attention, so the history "
                "would be lost: this model is not supported by ShadowKV"
            )
        else:
            out = _attend_batch(query, key, value, attention_mask, parameters, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def _attend_batch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    parameters: AttentionParameters,
    sliding_window: int | None,
) -> torch.Tensor:
    """Exact causal attention [B, Hq, T, D] over keys [B, H, n, D], row by row without the padding."""
    num_new, num_keys = query.shape[2], keys.shape[2]
    out = query.new_zeros(*query.shape[:3], values.shape[3])
    for index in range(query.shape[0]):
        real: slice | torch.Tensor = slice(None)
        new: slice | torch.Tensor = slice(None)
        if mask is not None:
            visible = mask[index].bool()
            real = visible.nonzero().squeeze(1)
            new = visible[num_keys - num_new :].nonzero().squeeze(1)
        row = query[index][:, new]
        if row.shape[1]:
            out[index][:, new] = attend_causal(
                row, keys[index][:, real], values[index][:, real], parameters, sliding_window=sliding_window
            )
    return out


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)


@dataclass(kw_only=True)
class _Activation:
    num_caches: int
    previous: str


_activations: "weakref.WeakKeyDictionary[PreTrainedModel, _Activation]" = weakref.WeakKeyDictionary()


def activate(model: PreTrainedModel) -> None:
    """Switches the model to longshadow's attention for one more cache."""
    activation = _activations.get(model)
    if activation is None:
        previous = model.config.get_text_config(decoder=True)._attn_implementation
        model.set_attn_implementation(IMPLEMENTATION)
        _activations[model] = _Activation(num_caches=1, previous=previous)
    else:
        activation.num_caches += 1


def deactivate(model: PreTrainedModel) -> None:
    """One cache less; the last one restores the implementation the model had before."""
    activation = _activations[model]
    activation.num_caches -= 1
    if activation.num_caches == 0:
        del _activations[model]
        model.set_attn_implementation(activation.previous)
