"""`longshadow adapter export --to padded`: every layer of one rank, for runtimes that know no patterns of ranks."""

from pathlib import Path

import torch
from torch.nn.functional import pad

from longshadow.compress.adapters.exported import Exported
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.adapters.runtimes import VLLM_RANKS, vllm_rank
from longshadow.compress.solver import Factors


def export_padded(adapter: Adapter, output: Path, dtype: torch.dtype | None = None) -> Exported:
    """Writes [s B, 0] and [A; 0] of the largest rank, rounded up to one of vLLM's sizes.

    Args:
        dtype: default: the adapter's.

    Raises ValueError for an adapter that is no plain one, or has a rank above vLLM's largest.
    """
    adapter.require_plain()
    rank, dtype = vllm_rank(adapter.rank), dtype or adapter.dtype
    if rank is None:
        raise ValueError(
            f"{adapter.folder} has rank {adapter.rank}, above the largest size to pad to, {VLLM_RANKS[-1]}"
        )
    layers = {name: _padded(adapter.folded(name, dtype), rank) for name in adapter.layers}
    save_adapter(output, layers, base_model=adapter.base_model)
    return Exported(
        format="padded",
        output=str(output),
        layers=len(layers),
        dtype=str(dtype).removeprefix("torch."),
        num_bytes=sum(factors.lora_a.nbytes + factors.lora_b.nbytes for factors in layers.values()),
        detail=f"every layer of rank {rank}",
    )


def _padded(factors: Factors, rank: int) -> Factors:
    missing = rank - factors.rank
    return Factors(lora_b=pad(factors.lora_b, (0, missing)), lora_a=pad(factors.lora_a, (0, 0, 0, missing)))
