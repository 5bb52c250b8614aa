"""The token ids that forwards brought into a cache, for comparison with a text."""

import torch


class TokenLog:
    """Ids of a batch's tokens, padding included, as far as every forward brought ids."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []  # [B, T] each
        self._num_tokens = 0

    def append(self, ids: torch.Tensor) -> None:
        """Notes the ids [B, T] of one forward."""
        self._pieces.append(ids.detach().to(torch.int32, copy=True))
        self._num_tokens += ids.shape[1]

    def ids(self, num_tokens: int) -> torch.Tensor | None:
        """Ids [B, tokens] of the `num_tokens` cached ones; None where a forward brought none, as with embeddings."""
        if not self._pieces or num_tokens != self._num_tokens:
            return None
        return self._joined().long()

    def _joined(self) -> torch.Tensor:
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, 1)]
        return self._pieces[0]

    def drop_last(self, num_tokens: int) -> None:
        """Forgets the newest tokens."""
        if self._pieces:
            self._num_tokens = max(0, self._num_tokens - num_tokens)
            self._pieces = [self._joined()[:, : self._num_tokens]]

    def select(self, sequences: torch.Tensor) -> None:
        """Keeps these sequences, in this order."""
        if self._pieces:
            self._pieces = [self._joined()[sequences.to(self._pieces[0].device)]]

    def copy(self) -> "TokenLog":
        """An independent copy."""
        copied = TokenLog()
        copied._pieces, copied._num_tokens = [*self._pieces], self._num_tokens
        return copied

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        return self._pieces
