"""The base model of an adapter, as far as its configuration tells: the architecture, and how its weights are stored."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from longshadow.compress.adapters.reading import Adapter
from longshadow.model_sources import (
    GGUF_SUFFIX,
    has_4_bit_weights,
    lasting_name,
    quantization_method,
    read_config,
)

GGUF = "gguf"


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """A model that an adapter is for.

    Attributes:
        name: a hub id, a folder, or a `.gguf` file.
        method: `dense`, `gguf`, or what transformers calls the quantisation, such as `bitsandbytes` or `gptq`.
        config: of its text model.
        architecture: the class that its configuration names, as runtimes look it up; empty where it names none.
        is_wrapped: whether the text model is a part of it, as in a multimodal one.
        has_4_bit_weights: whether its linear layers have integers of 4 bits, and activations of 16.
    """

    name: str
    method: str
    config: PreTrainedConfig
    architecture: str = ""
    is_wrapped: bool = False
    has_4_bit_weights: bool = False


def base_of(adapter: Adapter, *, only_here: bool = False) -> Base:
    """The base that the adapter names.

    Raises ValueError where it names none, or one that cannot be had, such as a folder that was moved.
    """
    if not adapter.base_model:
        raise ValueError(f"{adapter.folder} does not name its base: give it with --base")
    try:
        return read_base(adapter.base_model, only_here=only_here)
    except ValueError as error:
        raise ValueError(
            f"{adapter.folder} is for {adapter.base_model}, which cannot be had here ({error}): give its base with "
            "--base"
        ) from error


def read_base(name: str, *, only_here: bool = False) -> Base:
    """Of a model by any of its names; the arguments and errors are those of `read_config`."""
    config = read_config(name, only_here=only_here)
    text_config = config.get_text_config(decoder=True)
    is_gguf = Path(name).suffix.lower() == GGUF_SUFFIX
    return Base(
        name=lasting_name(name),
        method=GGUF if is_gguf else quantization_method(config),
        config=text_config,
        architecture=next(iter(getattr(config, "architectures", None) or ()), ""),
        is_wrapped=text_config is not config,
        has_4_bit_weights=not is_gguf and has_4_bit_weights(config),
    )
