"""Linear layers through oneDNN against PyTorch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.shadowkv import ShadowKVConfig
from longshadow.linears import on_onednn, run_on_onednn
from tests.tiny_models import tiny_model

OPERATOR = "mkldnn::_linear_pointwise"

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def operators(compute: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute()
    return [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8, 1), (1, 63), (1, 1), (1, 0)])
@torch.inference_mode()
def test_gives_what_pytorch_gives(shape: tuple[int, int], bias: bool) -> None:
    layer = nn.Linear(48, 40, bias=bias)
    inputs = torch.randn(*shape, 96)[..., ::2]
    exact = nn.functional.linear(
        inputs.double(), layer.weight.double(), layer.bias.double() if layer.bias is not None else None
    )
    stock = layer(inputs)
    undo = run_on_onednn(nn.Sequential(layer))
    ours = layer(inputs)
    used = operators(lambda: layer(inputs))
    undo()
    assert OPERATOR in used
    assert ours.shape == stock.shape
    if inputs.numel():
        assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


def test_leaves_other_layers_alone_and_can_be_undone() -> None:
    def own_forward(inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    class Other(nn.Linear):
        pass

    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double(), Other(4, 4), nn.Linear(4, 4))
    layers[3].forward = own_forward  # type: ignore[method-assign]
    undo = run_on_onednn(layers)
    assert ["forward" in vars(layer) for layer in layers] == [True, False, False, True]
    undo()
    assert ["forward" in vars(layer) for layer in layers] == [False, False, False, True]
    assert layers[3].forward is own_forward


def test_gradients_and_other_dtypes_still_flow() -> None:
    layer = nn.Linear(4, 4)
    undo = run_on_onednn(nn.Sequential(layer))
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    layer.double()
    with torch.no_grad():
        assert layer(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    undo()


def test_a_runner_gives_the_layers_back() -> None:
    model = tiny_model()
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    runner = ModelRunner(model, ShadowKVConfig(rank=8), 64)
    assert linears and all("forward" in vars(module) for module in linears)
    runner.close()
    assert not any("forward" in vars(module) for module in linears)


def test_models_run_so_within() -> None:
    models = [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))]
    with on_onednn(*models):
        assert all("forward" in vars(model[0]) for model in models)
    assert not any("forward" in vars(model[0]) for model in models)


class Packed(torch.Tensor):
    """A weight that knows by itself how it is multiplied with, as those of torchao do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, cls) else arg for arg in args]
        if function is torch.nn.functional.linear:
            return torch.nn.functional.linear(plain[0], 2 * plain[1], *plain[2:])
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("part", ["weight", "bias", "input"])
@torch.inference_mode()
def test_subclasses_of_tensors_multiply_by_themselves(part: str) -> None:
    layer, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    if part == "input":
        inputs = inputs.as_subclass(Packed)
    else:
        setattr(layer, part, nn.Parameter(layer.get_parameter(part).detach().as_subclass(Packed), requires_grad=False))
    expected = layer(inputs)
    with on_onednn(nn.Sequential(layer)):
        assert operators(lambda: layer(inputs)).count(OPERATOR) == 0
        assert torch.equal(layer(inputs), expected)
