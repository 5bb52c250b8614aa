"""`longshadow adapter merge`: two adapters for one base as a single one that computes the sum of both.

s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]: ranks add up, and the result needs no scale.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.solver import Factors
from longshadow.model_sources import lasting_name


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written.

    Attributes:
        layers: of either adapter, and `shared`, of both.
        rank: the largest.
        dtype: the narrowest that holds the factors of both.
        other_base: what the second adapter names as its base where that is not the first one's; None where it is.
    """

    output: str
    layers: int
    shared: int
    rank: int
    dtype: str
    num_bytes: int
    base_model: str
    other_base: str | None


def merge_adapters(first: Adapter, second: Adapter, output: Path) -> Merged:
    """Writes the adapter to `output`, for the first one's base.

    Raises ValueError where one of them is more than a plain LoRA adapter, a layer of both has different shapes in
    them, the scaled factors leave the range of the dtype, and where the output folder holds something.
    """
    for adapter in (first, second):
        adapter.require_plain()
    for name in first.layers.keys() & second.layers.keys():
        shapes = [[a.layers[name].num_outputs, a.layers[name].num_inputs] for a in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the adapters are for different models: {name} is {shapes[0]} in {first.folder} and {shapes[1]} in "
                f"{second.folder}"
            )
    dtype = torch.promote_types(first.dtype, second.dtype)
    names = dict.fromkeys([*first.layers, *second.layers])
    layers = {name: _sum(name, [a for a in (first, second) if name in a.layers], dtype) for name in names}
    base_model = lasting_name(first.base_model or second.base_model)
    save_adapter(output, layers, base_model=base_model)
    return Merged(
        output=str(output),
        layers=len(layers),
        shared=len(first.layers.keys() & second.layers.keys()),
        rank=max(factors.rank for factors in layers.values()),
        dtype=str(dtype).removeprefix("torch."),
        num_bytes=sum(f.lora_a.nbytes + f.lora_b.nbytes for f in layers.values()),
        base_model=base_model,
        other_base=second.base_model if first.base_model and second.base_model != first.base_model else None,
    )


def _sum(name: str, adapters: list[Adapter], dtype: torch.dtype) -> Factors:
    parts = [adapter.folded(name, dtype) for adapter in adapters]
    return Factors(
        lora_b=torch.cat([part.lora_b for part in parts], dim=1), lora_a=torch.cat([part.lora_a for part in parts])
    )
