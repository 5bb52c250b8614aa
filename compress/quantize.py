"""`--quantize`: a quantised model for those who have none yet, made by the library whose format it is."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow.compress.adapters.atomic import whole_folder
from longshadow.compress.blocks import decoder_blocks, linear_layers
from longshadow.compress.fingerprint import model_fingerprint
from longshadow.compress.planning import num_layer_weights, require_room
from longshadow.model_sources import lasting_name
from longshadow.models import empty_model, load_model

MADE = "longshadow_quantize.json"
SCHEMES = "nf4, int8:gGROUP, int4:gGROUP, int3:gGROUP, int2:gGROUP (such as int4:g64) and 2:4"


def quantize_model(original: str, scheme: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the quantised model and its tokenizer to `folder`: whole or not at all; once, for the same arguments.

    Args:
        original: a hub id, a folder, or `demo`.
        scheme: "nf4" (bitsandbytes), "int4:g64" and the like (torchao, weights only), or "2:4" (pruned by magnitude,
            by torch.ao; stored dense).
        folder: must not exist, or be empty.
        dtype: of what is not quantised.

    Raises ValueError for an unknown scheme, a missing library, a model that cannot be loaded, a folder that holds
    something, such as a model made before the original changed, and a disk without room for the model.
    """
    if (folder / MADE).is_file():
        if (folder / MADE).read_text(encoding="utf-8") == _made(original, scheme, dtype):
            return  # by an earlier run, which may have been stopped later on
        raise ValueError(
            f"{folder} holds something already, quantised otherwise or before the original changed: remove it, or "
            "choose another folder"
        )
    config = quantization_config(scheme)
    require_room(folder, _num_bytes(original, scheme, dtype))
    with whole_folder(folder) as partial:
        loaded = load_model(original, dtype=dtype, device="cpu", quantization_config=config)
        if scheme == "2:4":
            prune_two_of_four(loaded.model)
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        # Files from the hub are there by now.
        (partial / MADE).write_text(_made(original, scheme, dtype), encoding="utf-8")


def quantization_config(scheme: str) -> Any:
    """What transformers is told; None for "2:4".

    Raises ValueError for an unknown scheme or a library that is not installed.
    """
    if scheme == "2:4":
        return None
    found = re.fullmatch(r"int([2348]):g(\d+)", scheme)
    if scheme != "nf4" and not found:
        raise ValueError(f"--quantize takes {SCHEMES}, got {scheme!r}")
    try:
        if not found:
            import bitsandbytes  # noqa: F401
            from transformers import BitsAndBytesConfig

            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")  # type: ignore[no-untyped-call]
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        bits, group = int(found[1]), int(found[2])
        return TorchAoConfig(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(group)))
    except ImportError as error:
        library = "torchao" if found else "bitsandbytes"
        raise ValueError(f"--quantize {scheme} needs {library}: pip install 'longshadow[quant]'") from error


def prune_two_of_four(model: nn.Module) -> None:
    """Of every four weights in a row the two with the least magnitude become 0, in the linear layers of all blocks."""
    from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    names = {module: name for name, module in model.named_modules()}
    layers = [layer for block in decoder_blocks(model) for layer in linear_layers(block).values()]
    sparsifier.prepare(model, [{"tensor_fqn": f"{names[layer]}.weight"} for layer in layers])
    sparsifier.step()
    sparsifier.squash_mask()


def _made(original: str, scheme: str, dtype: torch.dtype) -> str:
    """Of everything that the quantised model depends on."""
    return json.dumps(
        {
            "original": lasting_name(original),
            "scheme": scheme,
            "dtype": str(dtype),
            "files": model_fingerprint(original),
        }
    )


def _num_bytes(original: str, scheme: str, dtype: torch.dtype) -> int:
    model = empty_model(original)
    in_layers = num_layer_weights(model)
    others = sum(parameter.numel() for parameter in model.parameters()) - in_layers
    return int(in_layers * _bytes_per_weight(scheme, dtype) + others * dtype.itemsize)


def _bytes_per_weight(scheme: str, dtype: torch.dtype) -> float:
    """On disk, with scales, rounded up."""
    if scheme == "nf4":
        return 0.6
    return dtype.itemsize if scheme == "2:4" else 1.25  # torchao keeps every integer in a byte
