"""Slots of resident chunks with random contents, and candidates and places among them."""

from collections.abc import Sequence

import torch

from tests.engine.ops.batches import Batch


class RandomSlots:
    """Slots of a batch that hold random keys and values where a candidate is, and NaN elsewhere.

    Attributes:
        keys, values: [B, H, S, c, D] and [B, H, S, c, V].
        slots: int32 [B, H, M], of the candidates, in random order, then -1.
    """

    def __init__(self, batch: Batch, *, num_slots: int, num_candidates: Sequence[int], seed: int = 50) -> None:
        """`num_candidates`: of each sequence."""
        self._generator = torch.Generator().manual_seed(seed)
        self._batch, self._num_candidates = batch, num_candidates
        shape = (len(num_candidates), batch.num_kv_heads, num_slots)
        order = torch.rand(*shape, generator=self._generator).argsort(-1)[:, :, : max(num_candidates)]
        for own, count in zip(order, num_candidates, strict=True):
            own[:, count:] = -1
        self.slots = order.to(batch.device, torch.int32)
        self.keys, self.values = (self._fill(shape, width) for width in (batch.key_dim, batch.value_dim))

    def _fill(self, shape: tuple[int, int, int], width: int) -> torch.Tensor:
        batch = self._batch
        filled = torch.randn(*shape, batch.chunk_size, width, generator=self._generator)
        used = torch.zeros(*shape[:2], shape[2] + 1, dtype=torch.bool)
        used.scatter_(2, self.slots.cpu().long() % (shape[2] + 1), True)
        return filled.masked_fill_(~used[:, :, :-1, None, None], torch.nan).to(batch.device, batch.dtype)

    def places(self, num_tokens: Sequence[int]) -> torch.Tensor:
        """int32 [B, H, T]: so many of each sequence's candidates' tokens, in random order, then -1."""
        chunk_size, pairs = self._batch.chunk_size, self.slots.shape[:2]
        places = torch.full((*pairs, max(num_tokens)), -1, dtype=torch.int32)
        for own, slots, count, candidates in zip(
            places, self.slots.cpu(), num_tokens, self._num_candidates, strict=True
        ):
            for head in range(pairs[1]):
                tokens = slots[head, :candidates].unsqueeze(1) * chunk_size + torch.arange(chunk_size)
                own[head, :count] = tokens.flatten()[torch.randperm(tokens.numel(), generator=self._generator)[:count]]
        return places.to(self._batch.device)
