"""What the operators of a batched decode step read about a batch: where everything lies, and how much of it counts."""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch

from longshadow.engine.ops.tables import RowKind, SegmentTable
from longshadow.engine.shadowkv.segment import Segment
from longshadow.engine.shadowkv.storage import ExactTokens

# A row of the numbers begins at a multiple of 16 bytes: kernels are compiled for such pointers.
NUMBERS_ALIGNMENT = 4


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """Of one sequence in one step: candidate chunks and selected tokens per KV head, tokens in the tail.

    The tail counts the new token; 0 is for a place in the batch that no sequence has.
    """

    num_candidates: int = 0
    num_tokens: int = 0
    tail_tokens: int = 0


class StepTables:
    """The tables of a batch of B sequences in all layers, on the device; addresses stay, contents change.

    Attributes:
        batch_size: B.
        layers: one table each.
        num_candidates, num_tokens, tail_tokens: int32 [B], see `StepNumbers`.
        step: int32 [1], number of the step.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        batch_size: int,
        num_segments: int,
        factors: RowKind,
        values: RowKind,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Tables of empty places; `factors` and `values` are how the cache packs its rows, `dtype` is the model's."""
        self.batch_size = batch_size
        self.layers = [
            SegmentTable(
                batch_size=batch_size,
                max_segments=num_segments,
                factors=factors,
                values=values,
                dtype=dtype,
                device=device,
            )
            for _ in range(num_layers)
        ]
        width = -(-batch_size // NUMBERS_ALIGNMENT) * NUMBERS_ALIGNMENT
        self._numbers = torch.zeros(4, width, dtype=torch.int32, device=device)
        self.num_candidates, self.num_tokens, self.tail_tokens = self._numbers[:3, :batch_size].unbind(0)
        self.step = self._numbers[3, :1]

    def assign(self, row: int, sequence_by_layer: Sequence_[tuple[Sequence_[Segment], ExactTokens]]) -> None:
        """Writes where one sequence lies in every layer, its tail with room for a token.

        Raises ValueError where operators could not read it.
        """
        for table, (segments, tail) in zip(self.layers, sequence_by_layer, strict=True):
            # With the token to come: an empty tail would have no address.
            keys, values = (buffer[:, : tail.num_tokens + 1] for buffer in tail.tensors)
            table.assign(row, segments, (keys, values))

    def clear(self, row: int) -> None:
        """Leaves a place of the batch empty: nothing to select from, nothing to attend to."""
        for table in self.layers:
            table.assign(row, ())

    def begin_step(self, step: int, numbers: Sequence_[StepNumbers]) -> None:
        """Writes what changes at every step, with one copy to the device that nobody waits for."""
        padding = [0] * (self._numbers.shape[1] - len(numbers))
        columns = (
            [row.num_candidates for row in numbers],
            [row.num_tokens for row in numbers],
            [row.tail_tokens for row in numbers],
            [step] * len(numbers),
        )
        rows = torch.tensor([[*column, *padding] for column in columns], dtype=torch.int32)
        self._numbers.copy_(rows, non_blocking=True)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        return [*(tensor for table in self.layers for tensor in (table.segments, table.regions)), self._numbers]
