"""Every environment variable of the package, and the report for a bug report: `python -m longshadow.env`.

Only the standard library is imported here; the report loads torch when it is asked for, and never raises.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from longshadow import __version__

CACHE_VARIABLE = "LONGSHADOW_CACHE"
BACKEND_VARIABLE = "LONGSHADOW_BACKEND"
API_KEY_VARIABLE = "LONGSHADOW_API_KEY"
# The first three are the package's own; the others change what it does through the libraries it stands on.
VARIABLES = (
    CACHE_VARIABLE,
    BACKEND_VARIABLE,
    API_KEY_VARIABLE,
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "safetensors", "accelerate", "gguf", "numpy")
UNKNOWN = "unknown"


def cache_folder() -> Path:
    """Where converted models are kept; it need not exist yet.

    `LONGSHADOW_CACHE` when set, otherwise `longshadow` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "longshadow"


def backend() -> str | None:
    """The backend of the operators that `LONGSHADOW_BACKEND` asks for, None where it is not set."""
    return os.environ.get(BACKEND_VARIABLE) or None


def facts() -> dict[str, str]:
    """What a bug report needs, by name. Never raises: what cannot be found out is `unknown`, and why."""
    probes: dict[str, Callable[[], str]] = {
        "longshadow": lambda: __version__,
        "commit": _commit,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform,
        "cpu": _cpu,
        "memory": lambda: _gibibytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        **{name: _version_of(name) for name in PACKAGES},
        "cuda": _cuda,
        "driver": _driver,
        "cache folder": lambda: str(cache_folder()),
        **{name: _variable_of(name) for name in VARIABLES},
    }
    return {name: _probe(probe) for name, probe in probes.items()}


def report() -> str:
    """`facts`, one `name: value` a line."""
    return "\n".join(f"{name}: {value}" for name, value in facts().items())


def _probe(probe: Callable[[], str]) -> str:
    # A broken driver or package is what the report is for: it must not end it.
    try:
        return probe()
    except Exception as error:
        return f"{UNKNOWN} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def _version_of(package: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return version


def _variable_of(name: str) -> Callable[[], str]:
    # A report is shown to others; a key is not.
    shown = "set" if name == API_KEY_VARIABLE and os.environ.get(name) else os.environ.get(name, "not set")
    return lambda: shown


def _commit() -> str:
    """The checkout's commit, `+ changes` when its files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").is_file() or not (root / ".git").exists():
        return "not a checkout"
    git = ["git", "-C", str(root)]
    changes = _run([*git, "status", "--porcelain"])
    return _run([*git, "rev-parse", "HEAD"]) + (" + changes" if changes else "")


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores usable of {os.cpu_count()}"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"no device (torch built for CUDA {torch.version.cuda})" if torch.version.cuda else "CPU build of torch"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(
        f"{device.name} ({_gibibytes(device.total_memory)}, sm_{device.major}{device.minor})" for device in devices
    )
    return f"{names}; CUDA {torch.version.cuda}"


def _driver() -> str:
    try:
        return _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()[0]
    except FileNotFoundError:
        return "no nvidia-smi"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


if __name__ == "__main__":
    print(report())
