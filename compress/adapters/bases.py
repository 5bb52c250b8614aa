"""The base model of an adapter, as far as its configuration tells: the architecture, and how its weights are stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from longshadow.models import DEMO_NAME, demo_folder

DENSE, GGUF = "dense", "gguf"


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
    """Reads the configuration, no weights.

    Args:
        name: a hub id, a folder, a `.gguf` file, or `demo`.
        only_here: look for a hub id in the cache only, not on the network.

    Raises ValueError where there is none, or it cannot be read.
    """
    path = demo_folder() if name == DEMO_NAME else Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_file():
        raise ValueError(f"there is no file {name}")
    try:
        if path.suffix.lower() == ".gguf":
            config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(path if path.is_dir() else name, local_files_only=only_here)
    # Damaged files make the readers raise whatever a byte leads them to.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"the configuration of {name} cannot be read ({reason})") from error
    return Base(
        name=str(path) if name == DEMO_NAME else name,
        method=GGUF if path.suffix.lower() == ".gguf" else quantization_method(config),
        config=config.get_text_config(decoder=True),
    )


def quantization_method(config: PreTrainedConfig) -> str:
    """How the weights of a model folder are stored."""
    stored: Any = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not stored:
        return DENSE
    fields = stored if isinstance(stored, Mapping) else vars(stored)
    method = fields.get("quant_method") or "bitsandbytes"  # the oldest folders of bitsandbytes do not say
    return str(getattr(method, "value", method))
