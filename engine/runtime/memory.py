"""How much memory an engine may use, and what is taken of it."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from longshadow.sizes import parse_share_or_bytes

HOST_SHARE = "90%"
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """An amount of memory on the device and in host memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(device=self.device + other.device, host=self.host + other.host)

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(device=self.device - other.device, host=self.host - other.host)

    def __mul__(self, count: int) -> "Bytes":
        return Bytes(device=self.device * count, host=self.host * count)

    def at_least(self, other: "Bytes") -> "Bytes":
        """The larger amount in each place."""
        return Bytes(device=max(self.device, other.device), host=max(self.host, other.host))


class MemoryBudget:
    """What is reserved of an engine's memory. On a CPU both places are main memory and share the device's limit."""

    def __init__(self, *, device_limit: int, host_limit: int, shared: bool) -> None:
        self.device_limit = device_limit
        self.host_limit = host_limit
        self._shared = shared
        self.reserved = Bytes()

    @classmethod
    def of(cls, device: torch.device, device_memory: str | int, host_memory: str | int | None) -> "MemoryBudget":
        """The user's limits, percentages being those of what is free now. Raises ValueError for a malformed one."""
        shared = device.type == "cpu"
        free = available_main_memory() if shared else torch.cuda.mem_get_info(device)[0]
        device_limit = parse_share_or_bytes(device_memory, free, "device_memory")
        if host_memory is not None or not shared:
            wanted = HOST_SHARE if host_memory is None else host_memory
            host_limit = parse_share_or_bytes(wanted, available_main_memory(), "host_memory")
        else:
            host_limit = device_limit
        return cls(device_limit=device_limit, host_limit=host_limit, shared=shared)

    @property
    def limits(self) -> Bytes:
        """Both limits."""
        return Bytes(device=self.device_limit, host=self.host_limit)

    def fits(self, need: Bytes) -> bool:
        """Whether `need` can be reserved now."""
        return self._is_within(self.reserved + need)

    def could_fit(self, need: Bytes, *, beside: Bytes) -> bool:
        """Whether `need` could be reserved if nothing but `beside` were."""
        return self._is_within(need + beside)

    def _is_within(self, total: Bytes) -> bool:
        device = total.device + total.host if self._shared else total.device
        return device <= self.device_limit and total.host <= self.host_limit

    def reserve(self, need: Bytes) -> None:
        """Takes memory that fits."""
        assert self.fits(need), "memory is reserved only after asking whether it fits"
        self.reserved += need

    def release(self, freed: Bytes) -> None:
        """Gives memory back."""
        self.reserved -= freed
        assert self.reserved.device >= 0 and self.reserved.host >= 0, "more memory was given back than taken"


def available_main_memory() -> int:
    """Bytes of main memory that can be had now, within the limit of the control group if there is one."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        # Pages of files that were read count as used, and are given back when memory is wanted.
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        used -= int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):  # no control group, or one without a limit
        return available
    return max(0, min(available, limit - used))
