"""Rebuilt chunks that stay between decoding steps, least recently used first out.

Legend: H KV heads, S slots per head, m candidate chunks, c chunk size, t tokens, D head_dim.
"""

from collections.abc import Callable

import torch

EMPTY = -1
Loader = Callable[[torch.Tensor], torch.Tensor]


def plan_slots(
    slot_chunks_HS: torch.Tensor, last_used_HS: torch.Tensor, selected_Hm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assigns a slot to every selected chunk: its own if it is resident, else the longest unused.

    A slot whose chunk is selected now is never given away (S >= m makes that possible).
    Returns slots [H, m] and hits [H, m] (bool).
    """
    matches = selected_Hm.unsqueeze(2) == slot_chunks_HS.unsqueeze(1)
    hits, found = matches.max(2)
    age = last_used_HS.masked_fill(matches.any(1), torch.iinfo(last_used_HS.dtype).max)
    victims = age.argsort(1)
    nth_miss = ((~hits).cumsum(1) - 1).clamp_(min=0)
    return torch.where(hits, found, victims.gather(1, nth_miss)), hits


class ResidentChunks:
    """Slots for chunks of one sequence in one layer: all their keys, and the values that were needed so far.

    A step first fetches keys of its candidate chunks, then values of tokens among them.
    """

    def __init__(self) -> None:
        self._step = 0
        self._chunks_HS: torch.Tensor | None = None
        self._last_used_HS: torch.Tensor | None = None
        self._has_values: torch.Tensor | None = None  # [H, S, c]
        self._keys: torch.Tensor | None = None  # [H, S, c, D]
        self._values: torch.Tensor | None = None
        self._slots_Hm: torch.Tensor | None = None  # of the candidates; None: all slots, in their order

    def fetch_keys(
        self, candidates_Hm: torch.Tensor, num_slots: int, load: Loader
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keys [H, m, c, D] of the candidates, the candidates in the order of these keys, and how many missed.

        `load(chunks [H, x])` brings chunks that are not resident; `num_slots` >= m, growing over time.
        """
        num_heads, num_candidates = candidates_Hm.shape
        self._reserve(candidates_Hm, max(num_slots, num_candidates))
        assert self._chunks_HS is not None and self._last_used_HS is not None
        slots, hits = plan_slots(self._chunks_HS, self._last_used_HS, candidates_Hm)
        num_misses = (~hits).sum(1)
        self._step += 1
        self._chunks_HS.scatter_(1, slots, candidates_Hm)
        self._last_used_HS.scatter_(1, slots, self._step)
        heads = torch.arange(num_heads, device=candidates_Hm.device).unsqueeze(1)
        width = int(num_misses.max())
        if width:
            # Misses first; heads with fewer misses load some resident chunks again into their own slots.
            columns = hits.int().argsort(dim=1, stable=True)[:, :width]
            keys = load(candidates_Hm.gather(1, columns))
            if self._keys is None:
                self._keys = keys.new_zeros(num_heads, self._chunks_HS.shape[1], *keys.shape[2:])
                self._has_values = torch.zeros(self._keys.shape[:3], dtype=torch.bool, device=keys.device)
            self._keys[heads, slots.gather(1, columns)] = keys
        assert self._keys is not None and self._has_values is not None
        self._has_values[heads, slots] &= hits.unsqueeze(2)
        if num_candidates == self._chunks_HS.shape[1]:
            self._slots_Hm = None
            return self._keys, self._chunks_HS.clone(), int(num_misses.sum())
        self._slots_Hm = slots
        return self._keys[heads, slots], candidates_Hm, int(num_misses.sum())

    def fetch_values(self, places_Ht: torch.Tensor | None, tokens_Ht: torch.Tensor, load: Loader) -> torch.Tensor:
        """Values [H, t, D] of tokens at some places among the candidates' m c tokens (None: all, in their order).

        `tokens_Ht` are the numbers that `load(tokens [H, x])` knows them by.
        """
        assert self._has_values is not None
        num_heads, num_slots, chunk_size = self._has_values.shape
        if places_Ht is None:
            places_Ht = torch.arange(tokens_Ht.shape[1], device=tokens_Ht.device).expand(num_heads, -1)
        if self._slots_Hm is not None:
            places_Ht = self._slots_Hm.gather(1, places_Ht // chunk_size) * chunk_size + places_Ht % chunk_size
        present = self._has_values.flatten(1).gather(1, places_Ht)
        width = int((~present).sum(1).max())
        heads = torch.arange(num_heads, device=tokens_Ht.device).unsqueeze(1)
        if width:
            columns = present.int().argsort(dim=1, stable=True)[:, :width]
            values = load(tokens_Ht.gather(1, columns))
            if self._values is None:
                self._values = values.new_zeros(num_heads, num_slots * chunk_size, values.shape[2])
            targets = places_Ht.gather(1, columns)
            self._values[heads, targets] = values
            self._has_values.view(num_heads, -1).scatter_(1, targets, True)
        assert self._values is not None
        return self._values[heads, places_Ht]

    def _reserve(self, like_Hm: torch.Tensor, num_slots: int) -> None:
        """Makes room for `num_slots` chunks per head; resident ones stay."""
        missing = num_slots if self._chunks_HS is None else num_slots - self._chunks_HS.shape[1]
        if missing <= 0:
            return
        empty = like_Hm.new_full((like_Hm.shape[0], missing), EMPTY)
        unused = torch.zeros_like(empty)
        if self._chunks_HS is None or self._last_used_HS is None:
            self._chunks_HS, self._last_used_HS = empty, unused
            return
        self._chunks_HS = torch.cat([self._chunks_HS, empty], 1)
        self._last_used_HS = torch.cat([self._last_used_HS, unused], 1)
        if self._keys is not None and self._has_values is not None:
            chunk_size = self._keys.shape[2]
            self._keys = _with_room(self._keys, missing)
            self._has_values = _with_room(self._has_values, missing)
            self._values = None if self._values is None else _with_room(self._values, missing * chunk_size)

    def copy(self) -> "ResidentChunks":
        """An independent copy."""
        copied = ResidentChunks()
        copied._step = self._step
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(copied, name, value.clone())
        return copied

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]


def _with_room(held: torch.Tensor, missing: int) -> torch.Tensor:
    return torch.cat([held, held.new_zeros(held.shape[0], missing, *held.shape[2:])], 1)
