"""The base model of an adapter, as far as its configuration tells: the architecture, and how its weights are stored."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from longshadow.model_sources import DEMO_NAME, GGUF_SUFFIX, demo_folder, quantization_method, read_config

GGUF = "gguf"


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """A model that an adapter is for.

    Attributes:
        name: a hub id, a folder, or a `.gguf` file.
        method: `dense`, `gguf`, or what transformers calls the quantisation, such as `bitsandbytes` or `gptq`.
        config: of its text model.
    """

    name: str
    method: str
    config: PreTrainedConfig


def read_base(name: str, *, only_here: bool = False) -> Base:
    """Of a model by any of its names; the arguments and errors are those of `read_config`."""
    config = read_config(name, only_here=only_here)
    return Base(
        name=str(demo_folder()) if name == DEMO_NAME else name,
        method=GGUF if Path(name).suffix.lower() == GGUF_SUFFIX else quantization_method(config),
        config=config.get_text_config(decoder=True),
    )
