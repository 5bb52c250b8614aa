"""Arrays that C functions write into, with room around them that they must leave alone."""

import ctypes
from collections.abc import Sequence

import torch

GUARD = 8
POISON = -77


class Array:
    """A row of numbers in the middle of a poisoned buffer."""

    def __init__(self, numbers: Sequence[float], dtype: torch.dtype = torch.int32, *, shift: int = 0) -> None:
        """`shift` elements more stand before it, so that it begins at another remainder of 16 bytes."""
        self._start = GUARD + shift
        self._poison = POISON % 256 if dtype is torch.uint8 else POISON
        self._buffer = torch.full((len(numbers) + 2 * GUARD + shift,), self._poison, dtype=dtype)
        self.tensor = self._buffer[self._start : self._start + len(numbers)]
        self.tensor.copy_(torch.tensor(numbers, dtype=dtype))

    @classmethod
    def poisoned(cls, length: int) -> "Array":
        """An array to be written."""
        return cls([POISON] * length)

    @property
    def pointer(self) -> ctypes.c_void_p:
        """Its address, for ctypes."""
        return ctypes.c_void_p(self.tensor.data_ptr())

    def numbers(self) -> list[float]:
        """What it holds now. Fails if anything around it was written."""
        around = torch.cat([self._buffer[: self._start], self._buffer[self._start + len(self.tensor) :]])
        assert (around == self._poison).all(), "written out of bounds"
        return list(self.tensor.tolist())
