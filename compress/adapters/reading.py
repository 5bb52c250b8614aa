"""An adapter folder as PEFT writes it, read: its configuration, its layers, and their factors when they are asked for.

Legend: n inputs of a layer, m outputs, r rank.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from longshadow.compress.adapters.files import CONFIG, WEIGHTS
from longshadow.compress.adapters.oddities import Oddity, oddities_of
from longshadow.compress.adapters.scales import folded, layer_rank, layer_scale
from longshadow.compress.solver import Factors

PREFIX = "base_model.model."
FACTOR_KEY = re.compile(re.escape(PREFIX) + r"(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class AdapterLayer:
    """What is known of one linear layer's factors without reading them.

    Attributes:
        num_outputs, num_inputs, rank: m, n and r; B is [m, r] and A [r, n].
        scale: what B A is multiplied by.
        dtype: the wider one of B's and A's.
        num_bytes: of both.
    """

    num_outputs: int
    num_inputs: int
    rank: int
    scale: float
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """An adapter folder.

    Attributes:
        config: `adapter_config.json`.
        layers: by the names of the modules in the base model.
        oddities: what it does beside adding B A x to linear layers.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: Mapping[str, AdapterLayer]
    oddities: tuple[Oddity, ...]

    @property
    def base_model(self) -> str:
        """What the configuration names as the base; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """The largest of all layers."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds the factors of all layers."""
        return reduce(torch.promote_types, (layer.dtype for layer in self.layers.values()))

    @property
    def num_bytes(self) -> int:
        """Of all factors."""
        return sum(layer.num_bytes for layer in self.layers.values())

    def factors(self, name: str) -> Factors:
        """B and A of a layer as the file has them, not yet scaled."""
        with _opened(self.folder / WEIGHTS) as file:
            b, a = (file.get_tensor(f"{PREFIX}{name}.lora_{factor}.weight") for factor in "BA")
        return Factors(lora_b=b, lora_a=a)

    def folded(self, name: str, dtype: torch.dtype) -> Factors:
        """B and A of a layer in `dtype`, with the scale in B."""
        try:
            return folded(self.factors(name), self.layers[name].scale, dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def require_plain(self) -> None:
        """Raises ValueError where adding B A x to linear layers is not all that the adapter does."""
        if self.oddities:
            raise ValueError(
                f"{self.folder} is no plain LoRA adapter: {self.oddities[0].meaning}; only PEFT knows how to do that"
            )


def read_adapter(folder: Path) -> Adapter:
    """Reads the configuration and the header of the weights.

    Raises ValueError in one line: a file is missing, damaged or no LoRA adapter's, a key has an unknown form, or the
    shapes of a layer's factors do not fit each other or the rank in the configuration.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give an adapter's folder")
    config = _read_config(folder)
    with _opened(folder / WEIGHTS) as file:
        headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        shapes = {key: list(header.get_shape()) for key, header in headers.items()}
        dtypes = {key: str(header.get_dtype()) for key, header in headers.items()}
    pairs: dict[str, dict[str, str]] = {}
    others = []
    for key in shapes:
        if match := FACTOR_KEY.fullmatch(key):
            pairs.setdefault(match["name"], {})[match["factor"]] = key
        elif key.startswith(PREFIX) and not re.search(r"\.lora_[AB]\.(?!bias$)", key):
            others.append(key)
        else:
            raise ValueError(
                f"{folder / WEIGHTS} has a tensor {key}, which is in none of PEFT's forms such as "
                f"{PREFIX}NAME.lora_A.weight"
            )
    layers = {name: _layer(config, name, pair, shapes, dtypes) for name, pair in pairs.items()}
    if not layers:
        raise ValueError(f"{folder / WEIGHTS} has no factors of linear layers")
    return Adapter(folder=folder, config=config, layers=layers, oddities=oddities_of(config, others))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no adapter: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder} is no LoRA adapter: its peft_type is {kind}")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise ValueError(f"{folder} has no {WEIGHTS}{' but a pickle: save it as safetensors' if pickled else ''}")
    return config


def _layer(
    config: Mapping[str, Any],
    name: str,
    pair: Mapping[str, str],
    shapes: Mapping[str, list[int]],
    dtypes: Mapping[str, str],
) -> AdapterLayer:
    for factor in "AB":
        if factor not in pair:
            raise ValueError(f"the adapter's layer {name} has no lora_{factor}.weight")
        if dtypes[pair[factor]] not in DTYPES:
            raise ValueError(f"the adapter's layer {name} has factors of type {dtypes[pair[factor]]}")
    a, b = shapes[pair["A"]], shapes[pair["B"]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
        raise ValueError(f"the adapter's layer {name} has A {a} and B {b}, which are not [r, n] and [m, r]")
    rank = layer_rank(config, name)
    if rank != a[0]:
        raise ValueError(f"the adapter's layer {name} has rank {a[0]} in its weights and {rank} in {CONFIG}")
    a_dtype, b_dtype = DTYPES[dtypes[pair["A"]]], DTYPES[dtypes[pair["B"]]]
    return AdapterLayer(
        num_outputs=b[0],
        num_inputs=a[1],
        rank=rank,
        scale=layer_scale(config, name),
        dtype=torch.promote_types(a_dtype, b_dtype),
        num_bytes=rank * (a[1] * a_dtype.itemsize + b[0] * b_dtype.itemsize),
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): get it again") from error
