"""The most memory a piece of work takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path
from types import TracebackType

import torch

SAMPLE_SECONDS = 0.002


class PeakMemoryMeter:
    """`with PeakMemoryMeter(device) as meter: ...`, then `meter.bytes`.

    On CUDA what torch's allocator handed out; on a CPU resident memory of the process, sampled every 2 ms
    (None where the system does not tell).
    """

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = self._largest = 0
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemoryMeter:
        gc.collect()
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        _return_freed_memory()
        before = resident_bytes()
        if before is not None:
            self._before = self._largest = before
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.bytes = self._largest - self._before

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._largest = max(self._largest, resident_bytes() or 0)


def resident_bytes() -> int | None:
    """Resident memory of this process, where /proc tells it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _return_freed_memory() -> None:
    # What earlier work freed would otherwise be reused unseen. Only glibc has and needs this.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
