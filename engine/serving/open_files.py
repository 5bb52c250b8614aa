"""The limit of open files: raised as far as the system lets us, and what it leaves for connections."""

import os
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows, where there is no such limit
    resource = None  # type: ignore[assignment]

OPEN_FILES = Path("/proc/self/fd")
# Some systems allow a billion, which programs that loop over all of them do not like.
MOST_OPEN_FILES = 65_536
# For connections that are accepted before others have been closed, and for files: documents, the model's, sockets.
SPARE_FILES = 48
LEAST_CONNECTIONS = 8


def raise_limit() -> None:
    """Raises the process's own limit of open files to what it may have without being asked for."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int | None:
    """Files that the process may have open; None without a limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def room_for_connections(wanted: int) -> int:
    """As many of the wanted connections as open files are left for."""
    most = limit()
    if most is None:
        return wanted
    num_open = sum(int(number) < most for number in os.listdir(OPEN_FILES)) if OPEN_FILES.is_dir() else 0
    return min(wanted, max(LEAST_CONNECTIONS, most - num_open - SPARE_FILES))
