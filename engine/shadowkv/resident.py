"""Rebuilt chunks that stay between decoding steps, least recently used first out.

Legend: H KV heads, S slots per head, k selected chunks, c chunk size, D head_dim.
"""

from collections.abc import Callable

import torch

EMPTY = -1
ChunkLoader = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def plan_slots(
    slot_chunks_HS: torch.Tensor, last_used_HS: torch.Tensor, selected_Hk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assigns a slot to every selected chunk: its own if it is resident, else the longest unused.

    A slot whose chunk is selected now is never given away (S >= k makes that possible).
    Returns slots [H, k] and hits [H, k] (bool).
    """
    matches = selected_Hk.unsqueeze(2) == slot_chunks_HS.unsqueeze(1)
    hits, found = matches.max(2)
    age = last_used_HS.masked_fill(matches.any(1), torch.iinfo(last_used_HS.dtype).max)
    victims = age.argsort(1)
    nth_miss = ((~hits).cumsum(1) - 1).clamp_(min=0)
    return torch.where(hits, found, victims.gather(1, nth_miss)), hits


class ResidentChunks:
    """Slots for keys and values of chunks of one sequence in one layer."""

    def __init__(self) -> None:
        self._step = 0
        self._chunks_HS: torch.Tensor | None = None
        self._last_used_HS: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def fetch(
        self, selected_Hk: torch.Tensor, num_slots: int, load: ChunkLoader
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keys and values [H, k, c, D] of the selected chunks, in no particular order, and how many missed.

        `load(chunks [H, m])` brings chunks that are not resident; `num_slots` >= k, growing over time.
        """
        num_heads, num_selected = selected_Hk.shape
        self._reserve(selected_Hk, max(num_slots, num_selected))
        assert self._chunks_HS is not None and self._last_used_HS is not None
        slots, hits = plan_slots(self._chunks_HS, self._last_used_HS, selected_Hk)
        num_misses = (~hits).sum(1)
        self._step += 1
        self._chunks_HS.scatter_(1, slots, selected_Hk)
        self._last_used_HS.scatter_(1, slots, self._step)
        heads = torch.arange(num_heads, device=selected_Hk.device).unsqueeze(1)
        width = int(num_misses.max())
        if width:
            # Misses first; heads with fewer misses load some resident chunks again into their own slots.
            columns = hits.int().argsort(dim=1, stable=True)[:, :width]
            keys, values = load(selected_Hk.gather(1, columns))
            if self._keys is None or self._values is None:
                self._keys = keys.new_zeros(num_heads, self._chunks_HS.shape[1], *keys.shape[2:])
                self._values = values.new_zeros(num_heads, self._chunks_HS.shape[1], *values.shape[2:])
            targets = slots.gather(1, columns)
            self._keys[heads, targets] = keys
            self._values[heads, targets] = values
        assert self._keys is not None and self._values is not None
        if num_selected == self._chunks_HS.shape[1]:
            return self._keys, self._values, int(num_misses.sum())
        return self._keys[heads, slots], self._values[heads, slots], int(num_misses.sum())

    def _reserve(self, like_Hk: torch.Tensor, num_slots: int) -> None:
        """Makes room for `num_slots` chunks per head; resident ones stay."""
        missing = num_slots if self._chunks_HS is None else num_slots - self._chunks_HS.shape[1]
        if missing <= 0:
            return
        empty = like_Hk.new_full((like_Hk.shape[0], missing), EMPTY)
        unused = torch.zeros_like(empty)
        if self._chunks_HS is None or self._last_used_HS is None:
            self._chunks_HS, self._last_used_HS = empty, unused
            return
        self._chunks_HS = torch.cat([self._chunks_HS, empty], 1)
        self._last_used_HS = torch.cat([self._last_used_HS, unused], 1)
        if self._keys is not None and self._values is not None:
            room = (like_Hk.shape[0], missing)
            self._keys = torch.cat([self._keys, self._keys.new_zeros(*room, *self._keys.shape[2:])], 1)
            self._values = torch.cat([self._values, self._values.new_zeros(*room, *self._values.shape[2:])], 1)

    def copy(self) -> "ResidentChunks":
        """An independent copy."""
        copied = ResidentChunks()
        copied._step = self._step
        for name in ("_chunks_HS", "_last_used_HS", "_keys", "_values"):
            tensor = getattr(self, name)
            setattr(copied, name, None if tensor is None else tensor.clone())
        return copied

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        held = (self._chunks_HS, self._last_used_HS, self._keys, self._values)
        return [tensor for tensor in held if tensor is not None]
