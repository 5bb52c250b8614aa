"""Where a record was measured: what `longshadow.env` reports, and what matters to a measurement beside it."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

from longshadow.env import PACKAGES
from longshadow.env import report as package_report

# Paths and variables of the person who measured stay out of a committed record.
REPORTED = ("longshadow", "platform", "cpu", "memory", *PACKAGES, "cuda", "driver")
NOT_INSTALLED = "not installed"
GPU_QUERY = {
    "power_limit_watts": "power.limit",
    "max_sm_clock_mhz": "clocks.max.sm",
    "max_memory_clock_mhz": "clocks.max.memory",
}


def describe_environment(device: str) -> dict[str, Any]:
    """Machine, versions, threads and (for a CUDA `device`) GPU as JSON values. Never raises."""
    reported = dict(line.split(": ", 1) for line in package_report().splitlines() if ": " in line)
    return {
        "python": platform.python_version(),
        **{name: reported.get(name) for name in REPORTED},
        "threads": _probe(_num_threads),
        "gpu": _probe(lambda: _describe_gpu(device)) if device.startswith("cuda") else None,
    }


def installed_packages(environment: dict[str, Any]) -> dict[str, str]:
    """The packages of a described environment that are there, with their versions."""
    versions = {name: environment.get(name) for name in PACKAGES}
    return {name: version for name, version in versions.items() if version and version != NOT_INSTALLED}


def device_slug(device: str) -> str:
    """The folder name of a device's records: `cpu`, or the GPU's name in lower case with dashes."""
    if not device.startswith("cuda"):
        return "cpu"
    name = _probe(lambda: _gpu_properties(device).name) or "cuda"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _probe(probe: Callable[[], Any]) -> Any:
    # Whatever is missing or broken on a machine is a fact about it, not a reason to lose its measurements.
    try:
        return probe()
    except Exception:
        return None


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpu_properties(device: str) -> Any:
    import torch

    return torch.cuda.get_device_properties(device)


def _describe_gpu(device: str) -> dict[str, Any]:
    properties = _gpu_properties(device)
    gpu: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }
    for key, field in GPU_QUERY.items():
        gpu[key] = _probe(partial(_nvidia_smi, field))
    return gpu


def _nvidia_smi(field: str) -> str:
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.splitlines()[0].strip()
