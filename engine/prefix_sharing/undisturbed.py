"""Forwards that leave a model as it was: those that only compare."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What a plain module has by itself: hooks, parameters, children, its mode.
_OWN = frozenset(vars(nn.Module()))
# Larger buffers are the weights of quantised layers, which no forward writes to.
_LARGEST_BUFFER = 1 << 22
# Modules that keep the state of their own passes over several processes.
_SHARDING = ("torch.distributed", "deepspeed")
_CONTAINERS = (list, dict, set, deque)
_PLAIN = (*_CONTAINERS, bool, int, float, str, tuple, torch.Tensor, torch.Size, torch.dtype, type(None))


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, no gradients and no dropout; afterwards modes, buffers, attributes and random numbers are as before.

    Models keep more than weights: frequencies of a dynamic RoPE, position offsets, counters of a router.
    """
    devices = [] if device.type == "cpu" else [device]
    modules = list(module.modules())
    modes = [(part, part.training) for part in modules]
    states = [_State(part) for part in modules if not type(part).__module__.startswith(_SHARDING)]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        for part in modules:
            part.training = False
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
            for state in states:
                state.restore()


class _State:
    """Buffers and plain attributes of one module, children aside."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module._buffers)
        self.not_saved = set(module._non_persistent_buffers_set)
        self.attributes = {
            name: value for name, value in vars(module).items() if name not in _OWN and isinstance(value, _PLAIN)
        }
        containers = {name: value for name, value in self.attributes.items() if isinstance(value, _CONTAINERS)}
        self.contents: dict[str, Any] = {name: value.copy() for name, value in containers.items()}
        tensors = [*self.buffers.values(), *self.attributes.values()]
        for content in containers.values():
            tensors.extend(content.values() if isinstance(content, dict) else content)
        self.values = [
            (tensor, tensor._version, tensor.detach().clone())
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and not tensor.is_inference() and tensor.numel() <= _LARGEST_BUFFER
        ]

    def restore(self) -> None:
        own: dict[str, Any] = vars(self.module)
        for name in [name for name, value in own.items() if name not in _OWN and isinstance(value, _PLAIN)]:
            if name not in self.attributes:
                del own[name]
        own.update(self.attributes)
        for name, content in self.contents.items():
            value: Any = self.attributes[name]
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.not_saved)
        for tensor, version, values in self.values:
            if tensor._version != version:
                tensor.copy_(values)
