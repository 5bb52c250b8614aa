"""Shapes of a decoding step of Llama-3.1-8B, and what every operator's module makes of them.

Legend: B sequences, H KV heads, G query heads per KV head, c chunk size, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.record import Check
from longshadow.engine.ops.backend import Operators
from longshadow.engine.ops.tables import RegionField, RowKind

BATCH_SIZES = (1, 8, 24)
# More than four times the largest L2 cache of the supported devices but one (50 MB on an H100, 126 MB on a B200).
WORKING_SET = 256 * 2**20
# Of candidates, whose keys are rebuilt, and of selected tokens, whose values are fetched (arXiv 2410.21465, figure 5).
MISS_RATE = 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One decoding step over `context_tokens` at the default budget of 1.56 %, three candidates per selected chunk.

    Attributes:
        kind: of landmarks and low-rank factors.
        tail_tokens: exact recent tokens; generated segments take them 2,048 at a time.
        working_set: bytes that a run reads at least, in as many layers as that takes, so that no cache holds them.
    """

    name: str
    batch_size: int
    context_tokens: int = 122 * 1024
    kind: RowKind = RowKind.MODEL
    dtype: torch.dtype = torch.bfloat16
    num_kv_heads: int = 8
    num_groups: int = 4
    head_dim: int = 128
    chunk_size: int = 8
    rank: int = 160
    num_exact_chunks: int = 9
    tail_tokens: int = 32 + 1024
    budget: float = 0.0156
    candidate_factor: float = 3.0
    working_set: int = WORKING_SET

    @property
    def num_chunks(self) -> int:
        """Chunks of a sequence, exact ones included."""
        return self.context_tokens // self.chunk_size

    @property
    def num_selected(self) -> int:
        """Chunks' worth of tokens that a head attends to."""
        return math.ceil(math.ceil(self.budget * self.context_tokens) / self.chunk_size)

    @property
    def num_candidates(self) -> int:
        """Chunks whose tokens are looked at, and slots."""
        return round(self.candidate_factor * self.num_selected)

    @property
    def scaling(self) -> float:
        """Of query . key."""
        return float(self.head_dim**-0.5)

    def num_layers(self, num_bytes: int) -> int:
        """Layers that a run goes over when one of them reads `num_bytes`."""
        return max(1, math.ceil(self.working_set / num_bytes))


class Work(Protocol):
    """One operator with its inputs, over `num_layers` layers.

    Attributes:
        num_bytes: what a run must read and write at least, counted once: the floor of a memory-bound operator.
        flops: multiplications and additions of a run.
    """

    num_layers: int
    num_bytes: int
    flops: int

    def run(self, operators: Operators) -> None:
        """One call per layer."""

    def check(self, operators: Operators) -> Check:
        """The first layer's results against the reference's."""


class Random:
    """Random tensors of one seed on one device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)

    def choose(self, rows: int, count: int, among: int) -> torch.Tensor:
        """int32 [rows, count], different numbers below `among` in each row."""
        keys = torch.rand(rows, among, generator=self._generator, device=self.device)
        return keys.topk(count, dim=1, sorted=False).indices.int()

    def packed(self, *shape: int, kind: RowKind, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of a kind and their scales; the numbers they stand for are about standard normal."""
        if kind == RowKind.MODEL:
            return self.normal(*shape, dtype=dtype), None
        rows = self.normal(*shape, dtype=torch.float32)
        scale = 1 / 32
        scales = torch.full(shape[:-1], scale, device=self.device)
        return rows.div_(scale).clamp_(-127, 127).to(kind.dtype(dtype)), scales


class Regions:
    """A region table of sequences with one segment's exact chunks and a tail each, and the tokens it points to."""

    def __init__(self, case: Case, random: Random) -> None:
        shape = (2, case.batch_size, case.num_kv_heads)
        lengths = (case.num_exact_chunks * case.chunk_size, case.tail_tokens)
        # The tail's buffer has room for more.
        capacities = (lengths[0], lengths[1] + lengths[1] // 4)
        self.tokens = [random.normal(*shape, capacity, case.head_dim, dtype=case.dtype) for capacity in capacities]
        self.table = torch.tensor(
            [
                [self._row(tokens[:, index], length) for tokens, length in zip(self.tokens, lengths, strict=True)]
                for index in range(case.batch_size)
            ],
            device=random.device,
        )
        self.num_tokens = sum(lengths)

    @staticmethod
    def _row(tokens: torch.Tensor, length: int) -> list[int]:
        keys, values = tokens.unbind(0)
        row = [0] * len(RegionField)
        row[RegionField.KEYS], row[RegionField.VALUES] = keys.data_ptr(), values.data_ptr()
        row[RegionField.KEY_HEAD_STRIDE], row[RegionField.VALUE_HEAD_STRIDE] = keys.stride(0), values.stride(0)
        row[RegionField.LENGTH] = length
        return row


def compare(result: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> Check:
    """A check that the largest difference is at most `tolerance` times the largest finite number expected."""
    infinite = expected.isinf()
    same = torch.equal(result.isinf(), infinite)
    difference = (result.float() - expected.float()).masked_fill(infinite, 0).abs().amax()
    error = float(difference / expected.float().masked_fill(infinite, 0).abs().amax())
    return Check(
        passed=same and error <= tolerance,
        max_error=error if math.isfinite(error) else None,
        text=f"{what} against the reference's, largest difference / largest = {error:.1e} (at most {tolerance:.0e})",
    )
