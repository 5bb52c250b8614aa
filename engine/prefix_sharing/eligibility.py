"""Reasons why a model cannot share prefixes, and why a batch runs the ordinary way."""

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longshadow.engine.switching.text_model import text_model

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
_SINGLE_VALUES = (bool, int, float, str, type(None))


def why_model_cannot(model: nn.Module, language_model: PreTrainedModel) -> str | None:
    """Why a model, PEFT's wrapper around it or not, cannot share; None where nothing is known against it."""
    config = language_model.config.get_text_config(decoder=True)
    others = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if language_model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if text_model(language_model) is None:
        return "its attention does not go through transformers' attention interface"
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        return "prompt-learning adapters put their own tokens before each row"
    return None


def is_generation(kwargs: dict[str, Any]) -> bool:
    """The forward fills or continues a cache, transformers' own or the one of continuous batching."""
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
        return True
    return bool(kwargs.get("use_cache")) and not torch.is_grad_enabled()


def why_ordinary(
    model: PreTrainedModel,
    backbone: nn.Module,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a batch cannot be a tree, whatever its tokens are; None where it can."""
    if input_ids is None or kwargs.get("inputs_embeds") is not None:
        return "it comes as embeddings"
    if kwargs.get("position_ids") is not None:
        return "it brings its own position_ids"
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name, getattr(model.config, name, False)):
            return f"{name} is asked for"
    given = [name for name, value in kwargs.items() if _is_of_rows(value)]
    if any(name.startswith(("pixel", "image", "video", "audio")) for name in given):
        return "it has images, video or audio"
    if given:
        return f"it brings {', '.join(sorted(given))}, which the rows of a tree do not have"
    hooked = _hooked_arguments(backbone, len(input_ids))
    if hooked:
        return f"it brings {', '.join(sorted(hooked))}, one for each row"
    embedding = model.get_input_embeddings()
    if embedding.training and getattr(embedding, "neftune_noise_alpha", None):
        return "NEFTune scales its noise by the columns of the batch"
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        return "its mask is not [rows, columns]"
    return None


def _is_of_rows(value: Any) -> bool:
    """Anything but a single value belongs to the rows or columns of the padded batch."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0
    return not isinstance(value, _SINGLE_VALUES) and not isinstance(value, torch.dtype)


def _hooked_arguments(backbone: nn.Module, num_rows: int) -> set[str]:
    """Arguments of one entry per row that hooks give to layers, past the backbone: PEFT's adapter_names, say."""
    return {
        name
        for module in backbone.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, functools.partial)
        for name, value in hook.keywords.items()
        if isinstance(value, (list, tuple, torch.Tensor)) and _length(value) == num_rows
    }


def _length(value: Any) -> int:
    return 0 if isinstance(value, torch.Tensor) and value.dim() == 0 else len(value)
