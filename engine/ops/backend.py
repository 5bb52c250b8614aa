"""Which implementation of the operators runs: chosen once, when a cache is built.

An explicit argument comes before the environment's LONGSHADOW_BACKEND, and that before "auto".

| name      | operators                                                         | needs                          |
|-----------|-------------------------------------------------------------------|--------------------------------|
| cuda      | in CUDA C++ where there is a kernel, others as the next possible  | the extension, a CUDA device   |
| triton    | in Triton                                                         | triton, compute capability 8.0 |
| reference | in PyTorch, the specification                                     | nothing                        |

Kernels also need shapes that they are made for (`Shapes`).
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from longshadow import env
from longshadow.engine.ops import extension
from longshadow.engine.ops.checks import MAXIMUM_GROUPS
from longshadow.engine.ops.tables import RowKind

logger = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "reference"
# In order of preference, with the module of an operator's folder that holds the implementation.
BACKENDS = {"cuda": "cuda_kernel", "triton": "triton_kernel", REFERENCE: "reference"}
MINIMUM_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

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


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the operators of a cache are asked to work on: G query heads per KV head, head_dims of keys and values."""

    num_groups: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    factors: RowKind = RowKind.MODEL

    def why_no_kernel(self) -> str | None:
        """Why there is no kernel for these shapes, None where there is."""
        if not 1 <= self.num_groups <= MAXIMUM_GROUPS:
            return f"it takes 1 to {MAXIMUM_GROUPS} query heads per KV head, the model has {self.num_groups}"
        for head_dim in (self.key_dim, self.value_dim):
            if head_dim not in HEAD_DIMS:
                return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, the model has {head_dim}"
        if self.dtype not in DTYPES:
            return f"it takes float16, bfloat16 and float32, the model is in {str(self.dtype).removeprefix('torch.')}"
        return None


def operators(device: torch.device, backend: str | None = None, shapes: Shapes | None = None) -> Operators:
    """The operators for tensors on `device`. `backend` is a name of the module's table, "auto" or None.

    Raises ValueError for an unknown name, and with the reason where the chosen backend cannot run, or not with
    these `shapes`.
    """
    chosen = choose_backend(device, backend, shapes)
    return Operators(**{field.name: implementation(field.name, chosen, device) for field in fields(Operators)})


def choose_backend(device: torch.device, backend: str | None = None, shapes: Shapes | None = None) -> str:
    """The name of the backend that `operators` would use; "auto" says once why it is not the best one."""
    chosen = backend or env.backend() or AUTO
    if chosen == AUTO:
        return _best_backend(device, shapes)
    if chosen not in BACKENDS:
        raise ValueError(f"backend must be one of {AUTO}, {', '.join(BACKENDS)}, got {chosen!r}")
    _check_possible(chosen, device, shapes)
    return chosen


@functools.cache
def _best_backend(device: torch.device, shapes: Shapes | None) -> str:
    # On a CPU the reference is what is meant to run; the interpreter is for tests, which ask for it by name.
    if device.type != "cuda":
        return REFERENCE
    for backend in BACKENDS:
        reason = why_not(backend, device, shapes)
        if reason is None:
            return backend
        logger.warning("operators on %s do without %s: %s", device, backend, reason)
    raise AssertionError("the reference runs everywhere")


def why_not(backend: str, device: torch.device, shapes: Shapes | None = None) -> str | None:
    """Why `backend` cannot run on `device`, or not with these `shapes`; None where it can."""
    if backend == REFERENCE:
        return None
    if shapes is not None and shapes.why_no_kernel() is not None:
        return shapes.why_no_kernel()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'longshadow[triton]')"
        if _is_interpreted():
            return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets it on the CPU"
    if device.type != "cuda":
        return "it needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    if shapes is not None and shapes.factors == RowKind.FP8 and capability < FP8_CAPABILITY:
        return f"fp8 landmarks need compute capability 8.9, the device has {capability[0]}.{capability[1]}"
    return extension.why_not(device) if backend == "cuda" else None


@functools.cache
def implementation(operator: str, backend: str, device: torch.device) -> Implementation:
    """One operator by `backend`; where that has no kernel for it, by the next that can run on `device`.

    Raises ValueError, with the reason, where `backend` cannot run on `device`.
    """
    _check_possible(backend, device, None)
    return _find(operator, backend) or next_implementation(operator, backend, device)


@functools.cache
def next_implementation(operator: str, backend: str, device: torch.device) -> Implementation:
    """One operator by the first backend after `backend` that has it and can run on `device`."""
    for name in list(BACKENDS)[list(BACKENDS).index(backend) + 1 :]:
        found = _find(operator, name) if why_not(name, device) is None else None
        if found is not None:
            return found
    raise AssertionError("every operator has a reference")


def _find(operator: str, backend: str) -> Implementation | None:
    module = f"longshadow.engine.ops.{operator}.{BACKENDS[backend]}"
    if importlib.util.find_spec(module) is None:
        return None
    found: Implementation = getattr(importlib.import_module(module), operator)
    return found


def _check_possible(backend: str, device: torch.device, shapes: Shapes | None) -> None:
    reason = why_not(backend, device, shapes)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run on {device}: {reason}")


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
