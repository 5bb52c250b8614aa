"""Memory that this process has freed, but not given back to the system."""

import ctypes
import functools
from collections.abc import Callable


def give_back_memory() -> None:
    """Gives back what the C library keeps for later; nothing where it is not glibc.

    Tokenising a long text takes hundreds of bytes for each of its tokens. glibc keeps them for the thread that freed
    them, and its other threads take new ones.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> "Callable[[int], int] | None":
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # not on Windows
        return None
