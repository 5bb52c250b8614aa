"""The model and tokenizer of an engine, and the tokens at which its answers end."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longshadow.compress.adapters.installing import with_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.models import LoadedModel, load_model, max_positions


def load(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, adapter: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """By name or as it is, with its adapter. Raises ValueError for what cannot be loaded."""
    lora = None if adapter is None else read_adapter(Path(adapter))
    if isinstance(model, str):
        loaded = load_model(model)
    elif lora is None:
        nn.Module.eval(model)
        return model, tokenizer
    elif tokenizer is None:
        raise ValueError("an adapter for a model without its tokenizer is not supported: give the tokenizer, too")
    else:
        nn.Module.eval(model)
        loaded = LoadedModel(name="", model=model, tokenizer=tokenizer, max_positions=max_positions(model.config))
    if lora is not None:
        loaded = with_adapter(loaded, lora)
    return loaded.model, tokenizer or loaded.tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """End-of-sequence tokens that the generation settings, the configuration or the tokenizer name."""
    named: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            named |= {int(token) for token in (found if isinstance(found, list | tuple) else [found])}
    return tuple(sorted(named))
