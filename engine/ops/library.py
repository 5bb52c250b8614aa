"""The operators as `torch.ops.longshadow.*`, for torch.compile and for whoever wants one alone.

An operator `<op>` is a folder of this package that exposes

    <op>/__init__.py        `define("<op>", schema, <reference>)`, and `<op>_workspace(...)` where it needs one
    <op>/reference.py       `<op>(...)` in PyTorch: the specification, on any device
    <op>/triton_kernel.py   `<op>(...)` in Triton, and `CONFIGURATIONS`
    <op>/cuda_kernel.py     `<op>(...)` in CUDA C++, where there is one: a call of `torch.ops.longshadow.<op>_cuda`

All `<op>(...)` take the schema's arguments in its order and return None: they write into arguments.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("longshadow", "DEF")


def define(name: str, schema: str, reference: Callable[..., None], *, cuda: bool = False) -> None:
    """Registers `torch.ops.longshadow.<name>`: the reference on any device, the best kernel on CUDA.

    `schema` is "(arguments) -> ()". `cuda` also defines `<name>_cuda` with it, which the extension implements.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _best_on_cuda(name), "CUDA")
    torch.library.register_fake(f"longshadow::{name}", _no_result, lib=LIBRARY)
    if cuda:
        LIBRARY.define(f"{name}_cuda{schema}")
        torch.library.register_fake(f"longshadow::{name}_cuda", _no_result, lib=LIBRARY)


def _best_on_cuda(name: str) -> Callable[..., None]:
    def call(first: torch.Tensor, *args: Any) -> None:
        from longshadow.engine.ops.backend import choose_backend, implementation

        implementation(name, choose_backend(first.device), first.device)(first, *args)

    return call


def _no_result(*args: Any) -> None:
    """Operators return nothing."""
