"""Where cached tensors live: packed rows on the device or host, and a growing buffer of exact tokens.

Legend: R rows, g groups of a row that share a scale, w elements of a group, H KV heads, n tokens, D head_dim.
"""

import weakref
from contextlib import suppress
from typing import Literal

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MINIMUM_GROWTH = 64

RowDtype = Literal["int8", "fp8"]
# The element type and its largest finite number.
ROW_DTYPES: dict[RowDtype, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}


class RowStore:
    """An immutable table of rows [R, g, w], gathered by index; quantised rows carry an fp32 scale per group.

    x ~ q * scale with scale = max |x| / largest over the group and q rounded to nearest: "int8" (largest 127) or
    "fp8" (e4m3, largest 448).
    """

    def __init__(self, rows_Rgw: torch.Tensor, *, quantized: RowDtype | None = None, host: bool = False) -> None:
        """Copies `rows_Rgw`; `host` puts them into main memory, pinned when the source is on a GPU."""
        self.device = rows_Rgw.device
        self.dtype = rows_Rgw.dtype
        self._scales_Rg: torch.Tensor | None = None
        if quantized is not None:
            element, largest = ROW_DTYPES[quantized]
            scales = rows_Rgw.float().abs().amax(-1).div_(largest).clamp_(min=torch.finfo(torch.float32).tiny)
            rows_Rgw = rows_Rgw.float() / scales.unsqueeze(-1)
            rows_Rgw = (rows_Rgw if element.is_floating_point else rows_Rgw.round_()).to(element)
            self._scales_Rg = self._place(scales, host)
        self._rows_Rgw = self._place(rows_Rgw, host)

    @classmethod
    def restore(
        cls, tensors: list[torch.Tensor], *, dtype: torch.dtype, device: torch.device, host: bool = False
    ) -> "RowStore":
        """A copy of a store from its `tensors`, which may be elsewhere; rows come out in `dtype` on `device`."""
        store = cls.__new__(cls)
        store.device, store.dtype = device, dtype
        store._rows_Rgw = store._place(tensors[0], host)
        store._scales_Rg = store._place(tensors[1], host) if len(tensors) > 1 else None
        return store

    def _place(self, source: torch.Tensor, host: bool) -> torch.Tensor:
        if not host or self.device.type == "cpu":
            return source.to(self.device, copy=True, memory_format=torch.contiguous_format)
        target = torch.empty(source.shape, dtype=source.dtype)
        if self.device.type == "cuda":
            _pin(self, target)
        return target.copy_(source)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by index [m] -> [m, g, w], in the source's dtype and on its device."""
        rows = rows.to(self._rows_Rgw.device)
        scales = None if self._scales_Rg is None else self._scales_Rg.index_select(0, rows)
        return self._unpack(_select(self._rows_Rgw, rows), scales)

    def gather_groups(self, groups: torch.Tensor) -> torch.Tensor:
        """Single groups by flat index row * g + group [m] -> [m, w], in the source's dtype and on its device."""
        groups = groups.to(self._rows_Rgw.device)
        scales = None if self._scales_Rg is None else self._scales_Rg.flatten().index_select(0, groups)
        return self._unpack(_select(self._rows_Rgw.flatten(0, 1), groups), scales)

    def slice(self, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop of every leading block: the store as [stop - start, g, w]."""
        scales = None if self._scales_Rg is None else self._scales_Rg[start:stop]
        return self._unpack(self._rows_Rgw[start:stop], scales)

    def _unpack(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        rows = rows.to(self.device, non_blocking=True)
        if scales is None:
            return rows
        return (rows.to(torch.float32) * scales.to(self.device, non_blocking=True).unsqueeze(-1)).to(self.dtype)

    @property
    def rows(self) -> torch.Tensor:
        """What is stored, [R, g, w], contiguous: the rows themselves, int8, or float8_e4m3fn."""
        return self._rows_Rgw

    @property
    def scales(self) -> torch.Tensor | None:
        """fp32 scales of quantised rows, [R, g], contiguous."""
        return self._scales_Rg

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory: the rows, then their scales."""
        return [self._rows_Rgw] if self._scales_Rg is None else [self._rows_Rgw, self._scales_Rg]


def _select(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`index_select` of the first dimension; float8 rows are moved as bytes."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.view(torch.uint8).index_select(0, index).view(rows.dtype)
    return rows.index_select(0, index)


def _pin(owner: object, tensor: torch.Tensor) -> None:
    """Page-locks exactly `tensor` for as long as `owner` lives.

    torch's own pinned allocator rounds sizes up to a power of two, which can cost as much memory again.
    """
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
        # Holding the tensor keeps the memory alive until it has been unregistered.
        weakref.finalize(owner, _unpin, tensor)
    else:
        with suppress(RuntimeError):  # the failure is CUDA's last error, too, which the next launch would raise
            torch.zeros(1, device="cuda")
        logger.warning_once("host memory could not be pinned: values stay in pageable memory, and decoding is slower")


def _unpin(tensor: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


class ExactTokens:
    """Exact keys and values of consecutive tokens of one sequence, [H, n, D] each, in a buffer that grows."""

    def __init__(self, *, device: torch.device | None = None, capacity: int = 0) -> None:
        """`device`: where to hold them; None = where the first ones come from. `capacity`: tokens to make room for."""
        self.num_tokens = 0
        self._device = device
        self._capacity = capacity
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, keys_HnD: torch.Tensor, values_HnD: torch.Tensor) -> None:
        """Adds tokens at the end; amortised constant cost per token."""
        stop = self.num_tokens + keys_HnD.shape[1]
        self._keys = self._grown(self._keys, keys_HnD, stop)
        self._values = self._grown(self._values, values_HnD, stop)
        self._keys[:, self.num_tokens : stop] = keys_HnD
        self._values[:, self.num_tokens : stop] = values_HnD
        self.num_tokens = stop

    @property
    def has_room(self) -> bool:
        """Whether a token fits into the buffers as they are."""
        return self._keys is not None and self._keys.shape[1] > self.num_tokens

    def make_room(self, num_tokens: int) -> None:
        """Grows the buffers, where needed, so that as many more tokens fit; there are buffers already."""
        stop = self.num_tokens + num_tokens
        assert self._keys is not None and self._values is not None
        self._keys = self._grown(self._keys, self._keys, stop)
        self._values = self._grown(self._values, self._values, stop)

    def _grown(self, buffer: torch.Tensor | None, like: torch.Tensor, needed: int) -> torch.Tensor:
        if buffer is not None and buffer.shape[1] >= needed:
            return buffer
        grown_capacity = needed + max(MINIMUM_GROWTH, self.num_tokens // 4)
        capacity = self._capacity if needed <= self._capacity else grown_capacity
        grown = torch.empty(
            like.shape[0], capacity, like.shape[2], dtype=like.dtype, device=self._device or like.device
        )
        if buffer is not None:
            grown[:, : self.num_tokens] = buffer[:, : self.num_tokens]
        return grown

    @property
    def keys(self) -> torch.Tensor:
        """[H, n, D], a view that the next append may invalidate."""
        assert self._keys is not None
        return self._keys[:, : self.num_tokens]

    @property
    def values(self) -> torch.Tensor:
        """[H, n, D], a view that the next append may invalidate."""
        assert self._values is not None
        return self._values[:, : self.num_tokens]

    def take_front(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Removes and returns the first tokens' keys and values; the rest moves into a new, small buffer."""
        keys, values = self.keys, self.values
        self.num_tokens, self._keys, self._values = 0, None, None
        self.append(keys[:, num_tokens:], values[:, num_tokens:])
        return keys[:, :num_tokens], values[:, :num_tokens]

    def drop_last(self, num_tokens: int) -> None:
        """Forgets the newest tokens."""
        assert num_tokens <= self.num_tokens
        self.num_tokens -= num_tokens

    def copy(self) -> "ExactTokens":
        """An independent copy."""
        copied = ExactTokens(device=self._device)
        if self.num_tokens:
            copied.append(self.keys, self.values)
        return copied

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory, room for growth included."""
        return [] if self._keys is None or self._values is None else [self._keys, self._values]
