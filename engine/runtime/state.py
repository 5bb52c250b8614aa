"""One sequence in all layers of a model, and the sums that let a prompt's head be taken up later.

Legend: Hq query heads, H KV heads, G = Hq / H, T tokens, D head_dim.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch

from longshadow.engine.runtime.seats import Seats
from longshadow.engine.runtime.shapes import Start
from longshadow.engine.runtime.windows import WindowSequence
from longshadow.engine.shadowkv.memory import MemoryReport, report
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.sequence import Sequence

# Heads of prompts are shared up to multiples of this many tokens.
BLOCK_TOKENS = 64
SHARED_BY_ALL = "rotation"

LayerSequence = Sequence | WindowSequence


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """A sequence as the engine keeps it.

    Attributes:
        layers: its tokens in each layer.
        num_tokens: tokens so far, those of an unfinished prompt included; the position of the next one.
        seats: where it has a place while it decodes in a batch.
    """

    layers: list[LayerSequence]
    num_tokens: int = 0
    seats: Seats | None = None

    def release(self) -> None:
        """Nothing more is asked of it: the batch that it decodes in lets it go, too."""
        if self.seats is not None:
            self.seats.leave(self)

    def rewind(self) -> bool:
        """Forgets the token that a failed step has left in some layers; False where that cannot be undone.

        What appending it has compressed or overwritten had to go anyway: the same token comes again.
        """
        for layer in self.layers:
            held = layer.tail if isinstance(layer, Sequence) else layer
            num_left = layer.num_tokens - self.num_tokens
            if num_left not in (0, 1) or held.num_tokens < num_left:
                return False
            held.num_tokens -= num_left
        self.release()
        return True

    def fork(self, max_tokens: int) -> "SequenceState":
        """A sequence of at most `max_tokens` that goes on independently; segments are shared, not copied."""
        return SequenceState(
            layers=[
                layer.copy(min(layer.window, max_tokens)) if isinstance(layer, WindowSequence) else layer.copy()
                for layer in self.layers
            ],
            num_tokens=self.num_tokens,
        )

    def forget_blocks(self) -> None:
        """The prompt has been read: of its query energy only the sum is still needed."""
        for layer in self.layers:
            if isinstance(layer, Sequence):
                layer.query_energy = layer.query_energy.copy()

    @property
    def start(self) -> Start:
        """What the memory of a fork depends on."""
        layer = next(layer for layer in self.layers if isinstance(layer, Sequence))
        return Start(segments=tuple(segment.num_tokens for segment in layer.segments), tail=layer.tail.num_tokens)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is held in memory, by part; the rotation belongs to the engine."""
        for layer in self.layers:
            if isinstance(layer, WindowSequence):
                yield from (("window", held) for held in layer.tensors)
                continue
            for part, tensors in layer.tensors().items():
                if part != SHARED_BY_ALL:
                    yield from ((part, held) for held in tensors)

    def memory(self, *, values_on_host: bool) -> MemoryReport:
        """Bytes by part and place."""
        return report(self.tensors(), values_on_host=values_on_host)


class BlockedEnergy(QueryEnergy):
    """Query energy that is added block by block, so that it does not depend on how a prompt was cut into chunks.

    It remembers the sums at each block's end.
    """

    def __init__(self, sums: Sequence_[torch.Tensor] = ()) -> None:
        """`sums` [H, D] at the ends of the blocks that were counted."""
        self.sums = list(sums)
        super().__init__(self.sums[-1] if self.sums else None)
        self._num_tokens = len(self.sums) * BLOCK_TOKENS

    def add(self, query: torch.Tensor, num_kv_heads: int) -> None:
        """Counts the queries [Hq, T, D] of the prompt's next tokens."""
        start, num_new = 0, query.shape[1]
        while start < num_new:
            count = min(BLOCK_TOKENS - self._num_tokens % BLOCK_TOKENS, num_new - start)
            super().add(query[:, start : start + count], num_kv_heads)
            start += count
            self._num_tokens += count
            if self._num_tokens % BLOCK_TOKENS == 0:
                assert self._energy_HD is not None
                self.sums.append(self._energy_HD)
