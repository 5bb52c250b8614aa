"""The hand-off to transformers: from a cache layer's `update`, through the model's own code, to its `attend`.

Forwards that carry an `AttendingCache` are lent longshadow's attention while the model is activated. A text model's
forward notes the mask and the positions it was given and lets the model make no mask of its own; in each attention
module's forward, the cache's layer announces its keys, which carry it to the attention function. Keys that never
arrive raise.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from longshadow.engine.shadowkv.exact import AttentionParameters, attend_causal
from longshadow.engine.shadowkv.masks import check_columns, row_mask
from longshadow.engine.switching.attention import lend_attention, offer_attention, outside_graphs
from longshadow.engine.switching.interception import intercept
from longshadow.engine.switching.text_model import text_model

IMPLEMENTATION = "longshadow"
_LAYER = "_longshadow_layer"


class AttendingCache(Cache):
    """A cache that sees to the attention of the forwards that carry it."""

    def check_forward(self, mask: torch.Tensor | None, batch_size: int, num_new: int) -> None:
        """Raises for a forward that its layers would refuse, before any of them has its tokens. mask: [B, tokens]."""


class AttendingLayer(CacheLayerMixin, ABC):  # type: ignore[no-untyped-call]
    """The cache layer's side of the hand-off; `is_sliding`: it sees to the attention's sliding window."""

    is_sliding: bool

    @abstractmethod
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

    @abstractmethod
    def forget_handoff(self) -> None:
        """A forward that was given up will not hand its keys over."""


@dataclass(eq=False, kw_only=True)
class _HandOff:
    """One forward of an attention module: the layer that announced keys, until they arrive."""

    module: nn.Module
    layer: AttendingLayer | None = None


class _Forward(threading.local):
    """Arguments of this thread's forward of a text model.

    Attributes:
        mask: [B, tokens] of real tokens; None: all.
        position_ids: [3, B, T], of each kind of token by itself (M-RoPE); None: those that layers get.
        given_position_ids: [B, T], for models that do not hand them on to their layers; None: not given.
        hand_off: of the attention module that is running.
    """

    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    given_position_ids: torch.Tensor | None = None
    hand_off: _HandOff | None = None


_forward = _Forward()


def announce(module: nn.Module, layer: AttendingLayer, keys: torch.Tensor) -> torch.Tensor:
    """A view of `keys` that carries `layer` from the running forward of `module` to the attention function.

    Raises RuntimeError where no attention function would take it, ValueError where another module is running.
    """
    hand_off = _forward.hand_off
    if hand_off is None:
        raise RuntimeError(
            f"{type(module).__name__} runs the model's own attention, but a cache needs longshadow's: use the cache "
            "inside `with ShadowKVCache.for_model(...)`, with the model it was made for"
        )
    if hand_off.module is not module:
        raise ValueError("the cache was made for another model: make one with ShadowKVCache.for_model(model)")
    hand_off.layer = layer
    marked = keys.view_as(keys)
    setattr(marked, _LAYER, layer)
    return marked


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

    Keys of an attending layer go to that layer; any other keys (stock sliding layers) are attended exactly. The mask
    is the text model's, not `attention_mask`.
    """
    layer: AttendingLayer | None = getattr(key, _LAYER, None)
    hand_off = _forward.hand_off
    if hand_off is not None and hand_off.layer is not layer:
        raise RuntimeError(
            f"{type(module).__name__} copies its keys between cache and attention, so the history "
            "would be lost: this model is not supported by ShadowKV"
        )
    parameters = AttentionParameters(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap, sinks=s_aux
    )
    if _forward.position_ids is not None:
        position_ids = _forward.position_ids
    elif position_ids is None:
        position_ids = _forward.given_position_ids
    mask = _forward.mask
    with torch.no_grad():
        if layer is not None:
            if sliding_window is not None and not layer.is_sliding:
                raise RuntimeError(f"{type(module).__name__} has a sliding window, its cache layer does not")
            out = layer.attend(query, key, value, mask, position_ids, parameters)
        else:
            out = _attend_batch(query, key, value, mask, parameters, sliding_window)
    if hand_off is not None:
        hand_off.layer = None
    out = out.transpose(1, 2).contiguous()
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out = _WithoutGradient.apply(out, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


class _WithoutGradient(torch.autograd.Function):
    """Keeps a backward through a cache from passing the attention over without a word."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> NoReturn:
        raise RuntimeError("a ShadowKVCache has no gradients: leave it out of calls whose loss is differentiated")


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
            visible = mask[index, -num_keys:]
            real = visible.nonzero().squeeze(1)
            new = visible[num_keys - num_new :].nonzero().squeeze(1)
        row = query[index][:, new]
        if row.shape[1]:
            out[index][:, new] = attend_causal(
                row, keys[index][:, real], values[index][:, real], parameters, sliding_window=sliding_window
            )
    return out


AttentionInterface.register(IMPLEMENTATION, attention_forward)


def activate(model: nn.Module) -> Callable[[], None]:
    """Lends forwards of `model` that carry an `AttendingCache` longshadow's attention, until the result is called.

    Raises ValueError for a model whose attention is not transformers' interface.
    """
    text = text_model(model)
    if text is None:
        raise ValueError(
            f"ShadowKV does not support {type(model).__name__}: its attention does not go through transformers' "
            "attention interface"
        )
    undo = offer_attention(text.attention, _around_attention), intercept(text.module, _around_text_model)

    def deactivate() -> None:
        for each in undo:
            each()

    return deactivate


def _around_attention(module: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    if not isinstance(kwargs.get("past_key_values"), AttendingCache):
        return forward(**kwargs)
    return _hand_over(module, forward, **kwargs)


@outside_graphs
def _hand_over(module: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    before = _forward.hand_off
    _forward.hand_off = hand_off = _HandOff(module=module)
    try:
        output = lend_attention(IMPLEMENTATION, forward, **kwargs)
    except BaseException:
        if hand_off.layer is not None:
            hand_off.layer.forget_handoff()
        raise
    finally:
        _forward.hand_off = before
    if hand_off.layer is not None:
        raise RuntimeError(
            f"{type(module).__name__} did not hand its keys to longshadow's attention: this model is not supported by "
            "ShadowKV"
        )
    return output


def _around_text_model(model: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    if not isinstance(kwargs.get("past_key_values"), AttendingCache):
        return forward(**kwargs)
    return _run_text_model(model, forward, **kwargs)


@outside_graphs
def _run_text_model(model: Any, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    if model.training and torch.is_grad_enabled():
        raise RuntimeError("longshadow's attention is for inference: call model.eval() or leave the cache first")
    wanted = kwargs.get("output_attentions")
    if getattr(model.config, "output_attentions", False) if wanted is None else wanted:
        raise ValueError(
            "a ShadowKVCache has no attention weights to return: leave out output_attentions, or the cache"
        )
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    new = ids if ids is not None else embeddings
    assert new is not None
    positions = kwargs.get("position_ids")
    if positions is None and "mrope_section" in (getattr(model.config, "rope_parameters", None) or {}):
        first = kwargs["past_key_values"].get_seq_length()
        positions = torch.arange(first, first + new.shape[1], device=new.device).expand(3, new.shape[0], -1)
        kwargs["position_ids"] = positions
    cache: AttendingCache = kwargs["past_key_values"]
    check_columns(kwargs.get("attention_mask"), len(new), cache.get_seq_length(), new.shape[1])
    mask = row_mask(kwargs.get("attention_mask"), new.shape[1], type(model).__name__)
    cache.check_forward(mask, len(new), new.shape[1])
    before = _forward.mask, _forward.position_ids, _forward.given_position_ids
    _forward.mask = mask
    _forward.position_ids = positions[-3:] if positions is not None and positions.dim() == 3 else None
    _forward.given_position_ids = positions if positions is not None and positions.dim() == 2 else None
    # A mask of four dimensions is handed on as it is, so none of T x T is ever made.
    kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=new.device)
    try:
        return forward(**kwargs)
    finally:
        _forward.mask, _forward.position_ids, _forward.given_position_ids = before
