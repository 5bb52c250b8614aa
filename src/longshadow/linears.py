"""Linear layers on a CPU through oneDNN, which stock PyTorch takes for half precision only.

Its fp32 product uses the widest vectors of any CPU, where PyTorch's BLAS (MKL) holds back on some: twice as fast on
AMD's. The weights stay as they are.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def run_on_onednn(model: nn.Module) -> Callable[[], None]:
    """Lets the fp32 linear layers of a CPU's model compute with oneDNN; the result undoes it.

    Layers of another kind, on another device, or whose `forward` somebody else replaced are left alone.
    """
    if not torch.backends.mkldnn.is_available():
        return lambda: None
    changed = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and _applies(module.weight, module.bias)
    ]
    for module in changed:
        module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)

    return undo


@contextmanager
def on_onednn(*models: nn.Module) -> Iterator[None]:
    """Within, the models run so."""
    with ExitStack() as stack:
        for model in models:
            stack.callback(run_on_onednn(model))
        yield


def _linear(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """input [..., in] -> [..., out]."""
    weight, bias = module.weight, module.bias
    if torch.is_grad_enabled() or not _applies(input, weight, bias):
        return F.linear(input, weight, bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
    return out


def _applies(*tensors: torch.Tensor | None) -> bool:
    """To ordinary tensors: a subclass, such as those of torchao, says itself how it is multiplied with."""
    return all(
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for tensor in tensors
        if tensor is not None
    )
