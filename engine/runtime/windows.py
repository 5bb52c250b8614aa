"""One sequence in one sliding-window layer: the window's exact tokens in a ring.

Legend: Hq query heads, H KV heads, T tokens of a prompt, n tokens, D head_dim.
"""

from dataclasses import dataclass

import torch

from longshadow.engine.shadowkv.exact import AttentionParameters, attend_causal, attend_parts
from longshadow.engine.shadowkv.sequence import RotationTable
from longshadow.engine.shadowkv.storage import ExactTokens


@dataclass(eq=False, kw_only=True)
class WindowSequence:
    """The cached tokens of one sequence in one layer that sees `window` tokens, the newest included.

    Attributes:
        capacity: tokens the ring has room for: the window, or all the sequence will get if that is less.
        num_tokens: tokens the ring has seen.
        parked: exact tokens of a prompt whose last chunk has not come yet.
    """

    window: int
    capacity: int
    num_tokens: int = 0
    parked: ExactTokens | None = None
    device: torch.device | None = None
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None

    def attend_prompt(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parameters: AttentionParameters
    ) -> torch.Tensor:
        """Exact attention of a prompt's tokens [Hq, T, D] to their windows; keys and values [H, T, D] are theirs."""
        history = self.recent()
        if self.parked is not None and self.parked.num_tokens:
            newest = slice(max(0, self.parked.num_tokens - self.window), None)
            history.append((self.parked.keys[:, newest].to(keys.device), self.parked.values[:, newest].to(keys.device)))
        joined_keys = torch.cat([*(piece[0] for piece in history), keys], 1)
        joined_values = torch.cat([*(piece[1] for piece in history), values], 1)
        visible = slice(max(0, joined_keys.shape[1] - keys.shape[1] - self.window + 1), None)
        return attend_causal(
            query, joined_keys[:, visible], joined_values[:, visible], parameters, sliding_window=self.window
        )

    def recent(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The ring's keys and values [H, n, D] in their order, if there are any."""
        if self._keys is None or self._values is None:
            return []
        first = max(0, self.num_tokens - self.capacity)
        places = torch.arange(first, self.num_tokens, device=self._keys.device) % self.capacity
        return [(self._keys[:, places], self._values[:, places])]

    def park(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps a chunk of an unfinished prompt."""
        assert self.parked is not None
        self.parked.append(keys, values)

    def finish_prompt(self, keys: torch.Tensor, values: torch.Tensor, rotations: RotationTable) -> None:
        """Takes parked tokens and the last tokens of a prompt into the ring."""
        if self.parked is not None:
            self._write(self.parked.keys.to(keys.device), self.parked.values.to(keys.device))
            self.parked = None
        self._write(keys, values)

    def append(self, keys: torch.Tensor, values: torch.Tensor, rotations: RotationTable) -> None:
        """Caches generated tokens [H, n, D]."""
        self._write(keys, values)

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys = keys.new_zeros(keys.shape[0], self.capacity, keys.shape[2])
            self._values = values.new_zeros(values.shape[0], self.capacity, values.shape[2])
        stop = self.num_tokens + keys.shape[1]
        num_kept = min(keys.shape[1], self.capacity)
        places = torch.arange(stop - num_kept, stop, device=keys.device) % self.capacity
        self._keys[:, places] = keys[:, keys.shape[1] - num_kept :]
        self._values[:, places] = values[:, values.shape[1] - num_kept :]
        self.num_tokens = stop

    def attend_token(self, query: torch.Tensor, parameters: AttentionParameters) -> torch.Tensor:
        """Attention of the newest cached token, query [Hq, D], to its window: [Hq, D]."""
        assert self._keys is not None and self._values is not None
        filled = slice(0, min(self.num_tokens, self.capacity))
        grouped = query.view(self._keys.shape[0], -1, query.shape[1])
        # In a softmax the order of the ring does not matter.
        return attend_parts(grouped, [(self._keys[:, filled], self._values[:, filled])], parameters).flatten(0, 1)

    def copy(self, capacity: int) -> "WindowSequence":
        """A sequence that goes on independently, in a ring of its own."""
        copied = WindowSequence(window=self.window, capacity=capacity, device=self.device)
        for keys, values in self.recent():
            copied.restore(keys, values, self.num_tokens)
        return copied

    def restore(self, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
        """Fills an empty ring with the newest of `num_tokens` tokens, as `recent` gives them."""
        self.num_tokens = num_tokens - keys.shape[1]
        self._write(keys, values)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        ring = [] if self._keys is None or self._values is None else [self._keys, self._values]
        return ring + (self.parked.tensors if self.parked is not None else [])
