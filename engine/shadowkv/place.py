"""A sequence at its place of a batch, and whether it still consists of what the batch's tables say."""

from dataclasses import dataclass

from longshadow.engine.shadowkv.sequence import Sequence

# A sequence's parts in all layers.
Column = tuple[Sequence, ...]


@dataclass(eq=False)
class Place:
    """A place of the batch that a sequence has: its parts in all layers, and what they were when last looked at.

    All layers hold the same tokens, so they are counted in the first.
    """

    sequences: Column
    storage: tuple[object, ...] = ()
    num_compressed: int = 0
    num_chunks: int = 0
    num_exact_chunks: int = 0

    def holds(self, column: Column) -> bool:
        """Whether the sequence is the same."""
        return bool(column) and self.sequences[0] is column[0]

    def look(self) -> bool:
        """Takes note of what the sequence consists of; whether that has changed."""
        first = self.sequences[0]
        now = (*first.segments, *first.tail.tensors)
        if len(now) == len(self.storage) and all(new is old for new, old in zip(now, self.storage, strict=True)):
            return False
        self.storage = now
        self.num_compressed = first.num_compressed
        self.num_chunks = sum(segment.num_chunks for segment in first.segments)
        self.num_exact_chunks = sum(segment.exact_chunks.shape[1] for segment in first.segments)
        return True
