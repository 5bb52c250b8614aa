"""What `longshadow compensate` is told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from longshadow.compress.criterion import METHODS, Method
from longshadow.compress.pipeline import SHRINKAGE, Propagate

Choice = Method | Literal["best"]
BYTES_PER_MB = 1_000_000
# Of the size that is spread over the layers where none is given.
DEFAULT_RANK = 32


@dataclass(frozen=True, kw_only=True)
class CompensationOptions:
    """At most one of `rank`, `budget_mb` (of the adapter) and `budget_bpw` (bits per weight of the layers).

    With none, the size of rank 32 everywhere is spread over the layers. Method, shrinkage and that spread are what
    left the least divergence on text for choosing (bench/tables/eora_quality.py).

    `calibration_column` is of the rows of a calibration text; `add_special_tokens` lets samples begin as the tokenizer
    begins a text. `max_memory` is in bytes, None for what is free.
    """

    rank: int | None = None
    budget_mb: float | None = None
    budget_bpw: float | None = None
    uniform_rank: bool = False
    method: Choice = "fisher"
    shrinkage: float = SHRINKAGE
    lm_head: bool = False
    calibration: str = "builtin"
    calibration_column: str | None = None
    add_special_tokens: bool = True
    sequence_length: int = 512
    num_samples: int = 64
    propagate: Propagate = "sequential"
    dtype: torch.dtype = torch.bfloat16
    max_memory: int | None = None

    def __post_init__(self) -> None:
        sizes = {"--rank": self.rank, "--budget-mb": self.budget_mb, "--budget-bpw": self.budget_bpw}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not both")
        limits = {"--rank": self.rank, "--num-samples": self.num_samples}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.sequence_length < 2:
            raise ValueError(f"--sequence-length must be at least 2, got {self.sequence_length}")
        for name, amount in given.items():
            if name != "--rank" and not 0 < amount < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {amount:g}")
        if self.uniform_rank and not self.has_budget:
            raise ValueError("--uniform-rank goes with --budget-mb or --budget-bpw: a --rank is uniform anyway")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"--shrinkage must be from 0 to 1, got {self.shrinkage:g}")
        if self.method not in (*METHODS, "best"):
            raise ValueError(f"--method must be one of {', '.join(METHODS)} and best, got {self.method!r}")

    @property
    def has_budget(self) -> bool:
        """Whether ranks follow from a size."""
        return self.budget_mb is not None or self.budget_bpw is not None

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods to try."""
        return METHODS if self.method == "best" else (self.method,)

    def rank_or_budget(self, shapes: Sequence[tuple[int, int]]) -> tuple[int | None, int | None]:
        """The rank of all layers, or the number of the adapter's weights, for layers of these shapes (m, n)."""
        bits = 8 * self.dtype.itemsize
        if self.budget_mb is not None:
            return None, int(self.budget_mb * BYTES_PER_MB * 8 / bits)
        if self.budget_bpw is not None:
            return None, int(self.budget_bpw * sum(m * n for m, n in shapes) / bits)
        if self.rank is not None:
            return self.rank, None
        return None, sum(min(DEFAULT_RANK, m, n) * (m + n) for m, n in shapes)
