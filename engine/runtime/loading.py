"""The model and tokenizer of an engine, and the tokens at which its answers end."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from longshadow.compress.adapters.installing import with_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.engine.shadowkv.families import full_attention_modules
from longshadow.models import LoadedModel, empty_model, load_model, max_positions

DEFAULT_MODEL_LEN = 32_768


def check_before_loading(name: str, max_model_len: int | None = None) -> PreTrainedConfig:
    """The configuration of a model that is still to be loaded; no weights are read.

    Raises ValueError, with the reason, where ShadowKV cannot support it, whatever its weights are, or where it is
    shorter than `max_model_len`.
    """
    model = empty_model(name)
    full_attention_modules(model)
    model_len(model.config, max_model_len)
    return model.config


def model_len(config: PreTrainedConfig, wanted: int | None) -> int:
    """Longest sequence of an engine in tokens. Raises ValueError for more than the model has."""
    limit = max_positions(config)
    if wanted is None:
        return limit or DEFAULT_MODEL_LEN
    if limit is not None and wanted > limit:
        raise ValueError(f"max_model_len must be at most {limit}, the model's positions in a batch, got {wanted}")
    return wanted


def load(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, adapter: str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """By name or as it is, with its adapter. Raises ValueError for what cannot be loaded."""
    if not isinstance(model, str | Path):
        _check_model(model)
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise ValueError(f"tokenizer must be one of transformers, got a {type(tokenizer).__name__}")
    lora = None if adapter is None else read_adapter(Path(adapter))
    if isinstance(model, str | Path):
        loaded = load_model(str(model))
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


def _check_model(model: object) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"model must be a hub id, a folder, a .gguf file or a model of transformers, got a {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder: only decoders, which go on from a text, can be run")
    head = getattr(model, "get_output_embeddings", None)
    if head is not None and head() is None:
        raise ValueError(f"{kind} has no head that gives tokens; load it with AutoModelForCausalLM")


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """End-of-sequence tokens that the generation settings, the configuration or the tokenizer name."""
    named: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            named |= {int(token) for token in (found if isinstance(found, list | tuple) else [found])}
    return tuple(sorted(named))
