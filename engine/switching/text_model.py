"""The part of a model that attends to text, whatever it is wrapped in or part of."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, kw_only=True)
class TextModel:
    """The modules whose forwards make a text model's masks, and attend.

    Attributes:
        module: the smallest transformers model that holds all of the attention; it makes the masks.
        attention: its attention modules, in the model's order.
    """

    module: PreTrainedModel
    attention: tuple[nn.Module, ...]


def unwrapped(model: Any) -> Any:
    """The transformers model in torch.compile's, PEFT's and the data-parallel wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif callable(unwrap := getattr(model, "get_base_model", None)):
            model = unwrap()
        elif not isinstance(model, PreTrainedModel) and isinstance(inner := getattr(model, "module", None), nn.Module):
            model = inner
        else:
            return model


def text_model(model: nn.Module) -> TextModel | None:
    """The text model of a (wrapped) transformers model; None where it has attention functions of its own."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        return None
    kind = type(model.config.get_text_config(decoder=True))
    attention = tuple(module for module in model.modules() if _looks_its_function_up(module, kind))
    if not attention:
        return None
    holders = [held for held in model.modules() if isinstance(held, PreTrainedModel)]
    module = [held for held in holders if set(attention) <= set(held.modules())][-1]
    return TextModel(module=module, attention=attention)


def _looks_its_function_up(module: nn.Module, kind: type) -> bool:
    config = vars(module).get("config")
    if config is None or isinstance(module, PreTrainedModel) or config.__class__ is not kind:
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
