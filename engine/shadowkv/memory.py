"""Bytes of a cache by part and place."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

HOST_PARTS = ("values", "keys", "parked")


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes held, by part, on the device and in host memory.

    On a machine without an accelerator `host` holds what would be in host memory beside one.
    """

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """Sum over the device's parts."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Sum over the host's parts."""
        return sum(self.host.values())

    @property
    def total_bytes(self) -> int:
        """Device and host together."""
        return self.device_bytes + self.host_bytes


def report(parts: Iterable[tuple[str, torch.Tensor]], *, values_on_host: bool) -> MemoryReport:
    """Adds up tensors by part; a tensor that several owners share counts once."""
    device: dict[str, int] = defaultdict(int)
    host: dict[str, int] = defaultdict(int)
    seen: set[tuple[int, int]] = set()
    for part, tensor in parts:
        place = (tensor.data_ptr(), tensor.nbytes)
        if tensor.nbytes and place not in seen:
            seen.add(place)
            (host if values_on_host and part in HOST_PARTS else device)[part] += tensor.nbytes
    return MemoryReport(device=dict(device), host=dict(host))


class PeakMemory:
    """Remembers the report at the moment of the largest total."""

    def __init__(self, current: Callable[[], MemoryReport]) -> None:
        """`current`: a bound method, held weakly so that its owner can be freed at once."""
        self._current = weakref.WeakMethod(current)
        self.largest = MemoryReport()

    def observe(self, *, transient: int = 0) -> MemoryReport:
        """Compares now with the peak; `transient` bytes on the device belong to a layer being compressed."""
        current = self._current()
        assert current is not None
        now = current()
        if transient:
            now = MemoryReport(device={**now.device, "exact layer": transient}, host=now.host)
        if now.total_bytes > self.largest.total_bytes:
            self.largest = now
        return self.largest

    def reset(self) -> None:
        """Forgets the peak."""
        self.largest = MemoryReport()
