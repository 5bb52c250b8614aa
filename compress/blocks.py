"""A model's decoder, block by block: what goes into the first one, and what a block makes of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

LinearHook = Callable[[str, nn.Module, torch.Tensor], None]
# Layers by name, each with the factors B [m, r] and A [r, n] of what it adds to its output.
LowRankTerms = dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]


@dataclass(eq=False, kw_only=True)
class HiddenStates:
    """Inputs of a block for every sample, and the arguments that all blocks are called with beside them.

    `from_tuple`: the block before gave them as the first of several things.
    """

    samples: list[torch.Tensor]
    arguments: dict[str, Any]
    from_tuple: bool = False


@dataclass(frozen=True, kw_only=True)
class InputGroup:
    """Layers that are given one and the same tensor, and the norm that made it, if one did; names in the block."""

    layers: tuple[str, ...]
    norm: str | None


class Head(nn.Module):
    """The model's end, the last norm and the head, as one more block."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model that keeps its last norm elsewhere than `model.norm`."""
        super().__init__()
        norm, head = getattr(getattr(model, "base_model", None), "norm", None), model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(norm, nn.Module) or not isinstance(head, nn.Module):
            raise ValueError(f"{type(model).__name__} keeps no last norm in model.norm: its head cannot be compensated")
        self.norm, self.head = norm, head

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


class _Reached(Exception):
    """The first block was called."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks. Raises ValueError for a model that keeps them elsewhere than `model.layers`."""
    blocks = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} keeps no decoder blocks in model.layers: it cannot be compensated yet"
        )
    return blocks


def compensated_blocks(model: nn.Module, *, head: bool) -> list[nn.Module]:
    """The blocks, and the head as one more where it is to be compensated, too. Raises ValueError as either does."""
    return [*decoder_blocks(model), *([Head(model)] if head else [])]


@torch.no_grad()
def first_inputs(model: nn.Module, samples: torch.Tensor) -> HiddenStates:
    """What the first block is given for token blocks [samples, length]; nothing after it runs."""
    captured: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        captured.append((positional[0] if positional else named["hidden_states"], named))
        raise _Reached

    hook = decoder_blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for sample in samples:
            try:
                model(input_ids=sample.unsqueeze(0), use_cache=False)
            except _Reached:
                continue
    finally:
        hook.remove()
    arguments = {name: given for name, given in captured[0][1].items() if name != "hidden_states"}
    return HiddenStates(samples=[hidden for hidden, _ in captured], arguments=arguments)


@torch.no_grad()
def run_block(block: nn.Module, hidden: HiddenStates, on_linear: LinearHook | None = None) -> HiddenStates:
    """The block's outputs; `on_linear(name, layer, inputs)` sees what each linear layer in it is given."""
    with _watched(block, on_linear):
        outputs = [block(sample, **hidden.arguments) for sample in hidden.samples]
    return HiddenStates(
        samples=[output[0] if isinstance(output, tuple) else output for output in outputs],
        arguments=hidden.arguments,
        from_tuple=isinstance(outputs[0], tuple),
    )


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Layers of the block that multiply by a weight, by their names in it; what such a layer is made of is its own."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(getattr(module, "in_features", None), int) and not inside:
            found[name] = module
    return found


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(m, n), the numbers of a linear layer's outputs and inputs."""
    known: Any = layer
    return int(known.out_features), int(known.in_features)


def input_groups(block: nn.Module, hidden: HiddenStates) -> list[InputGroup]:
    """What the block's linear layers are given, found on the first sample."""
    given: dict[int, list[str]] = {}
    norms: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def note(name: str, module: nn.Module, inputs: torch.Tensor) -> None:
        kept.append(inputs)
        given.setdefault(inputs.data_ptr(), []).append(name)

    def noter(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], Any], None]:
        def note_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor):
                kept.append(output)
                norms[output.data_ptr()] = name

        return note_norm

    hooks = [module.register_forward_hook(noter(name)) for name, module in block.named_modules() if _is_norm(module)]
    try:
        run_block(block, HiddenStates(samples=hidden.samples[:1], arguments=hidden.arguments), note)
    finally:
        for hook in hooks:
            hook.remove()
    return [InputGroup(layers=tuple(names), norm=norms.get(address)) for address, names in given.items()]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    vector = isinstance(weight, torch.Tensor) and weight.dim() == 1
    return vector and not hasattr(module, "in_features") and not list(module.children())


def add_low_rank(layer: nn.Module, b: torch.Tensor, a: torch.Tensor) -> RemovableHandle:
    """The layer adds B A x to its output, for B [m, r] and A [r, n], until the handle is removed."""

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return layer.register_forward_hook(add)


@contextmanager
def compensated(layers: LowRankTerms) -> Iterator[None]:
    """Within, each layer adds B A x to its output."""
    hooks = [add_low_rank(layer, b, a) for layer, b, a in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched(block: nn.Module, on_linear: LinearHook | None) -> Iterator[None]:
    def watcher(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            assert on_linear is not None
            on_linear(name, module, inputs[0])

        return watch

    layers = linear_layers(block) if on_linear is not None else {}
    hooks = [layer.register_forward_pre_hook(watcher(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
