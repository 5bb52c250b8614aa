"""Which implementation of the operators runs: chosen once, when a cache is built.

An explicit argument comes before the environment's LONGSHADOW_BACKEND, and that before "auto".

| name      | operators                                                             | needs                               |
|-----------|-----------------------------------------------------------------------|-------------------------------------|
| cuda      | in CUDA C++ where there is a kernel, others as the next possible      | the extension, a CUDA device        |
| triton    | in Triton                                                             | triton, compute capability 8.0      |
| reference | in PyTorch, the specification                                         | nothing                             |
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from longshadow import env

logger = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "reference"
# In order of preference, with the module of an operator's folder that holds the implementation.
BACKENDS = {"cuda": "cuda_kernel", "triton": "triton_kernel", REFERENCE: "reference"}
MINIMUM_CAPABILITY = (8, 0)

Implementation = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Operators:
    """One implementation of each operator; `torch.ops.longshadow` and the folders of this package describe them."""

    append_tokens: Implementation
    score_chunks: Implementation
    top_chunks: Implementation
    plan_chunks: Implementation
    rebuild_keys: Implementation
    score_tokens: Implementation
    fetch_values: Implementation
    sparse_attention: Implementation
    summarize_keys: Implementation


def operators(device: torch.device, backend: str | None = None) -> Operators:
    """The operators for tensors on `device`. `backend` is a name of the module's table, "auto" or None.

    Raises ValueError for an unknown name, and with the reason where the chosen backend cannot run.
    """
    chosen = choose_backend(device, backend)
    return Operators(**{field.name: implementation(field.name, chosen, device) for field in fields(Operators)})


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The name of the backend that `operators` would use; "auto" says once why it is not the best one."""
    chosen = backend or env.backend() or AUTO
    if chosen == AUTO:
        return _best_backend(device)
    if chosen not in BACKENDS:
        raise ValueError(f"backend must be one of {AUTO}, {', '.join(BACKENDS)}, got {chosen!r}")
    reason = why_not(chosen, device)
    if reason is not None:
        raise ValueError(f"backend {chosen!r} cannot run on {device}: {reason}")
    return chosen


@functools.cache
def _best_backend(device: torch.device) -> str:
    # On a CPU the reference is what is meant to run; the interpreter is for tests, which ask for it by name.
    if device.type != "cuda":
        return REFERENCE
    for backend in BACKENDS:
        reason = why_not(backend, device)
        if reason is None:
            return backend
        logger.warning("operators on %s do without %s: %s", device, backend, reason)
    raise AssertionError("the reference runs everywhere")


def why_not(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`, None where it can."""
    if backend == REFERENCE:
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'longshadow[triton]')"
        if _is_interpreted():
            return None
    if device.type != "cuda":
        return "it needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return _why_no_extension() if backend == "cuda" else None


@functools.cache
def implementation(operator: str, backend: str, device: torch.device) -> Implementation:
    """One operator by a backend that can run on `device`; without a CUDA C++ kernel, by the next that can."""
    for name in list(BACKENDS)[list(BACKENDS).index(backend) :]:
        module = f"longshadow.engine.ops.{operator}.{BACKENDS[name]}"
        if why_not(name, device) is None and importlib.util.find_spec(module) is not None:
            found: Implementation = getattr(importlib.import_module(module), operator)
            return found
    raise AssertionError("every operator has a reference")


@functools.cache
def _why_no_extension() -> str | None:
    try:
        importlib.import_module("longshadow._C")
    except ImportError as error:
        return f"the extension longshadow._C cannot be imported ({error})"
    return None


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
