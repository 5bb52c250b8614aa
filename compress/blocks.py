"""A model's decoder, block by block: what goes into the first one, and what a block makes of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longshadow.compress.calls import Before, Call, answering, recorded

LinearHook = Callable[[str, nn.Module, torch.Tensor], None]
# Layers by name, each with the factors B [m, r] and A [r, n] of what it adds to its output.
LowRankTerms = dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class HiddenStates:
    """Inputs of one of a model's blocks, or of its head, for every sample.

    Attributes:
        tokens: ids [samples, length].
        number: of the block; that of the head is the number of blocks.
        before: what blocks before it have made of each sample.
    """

    model: nn.Module
    tokens: torch.Tensor
    number: int
    before: list[Before]

    @cached_property
    def calls(self) -> list[Call]:
        """The model's calls of the block, one for each sample."""
        blocks = list(decoder_blocks(self.model))
        if self.number < len(blocks):
            return recorded(self.model, blocks, self.number, self.tokens, self.before)
        named = [{"tokens": sample.unsqueeze(0)} for sample in self.tokens]
        return [Call(positional=(known.output,), named=more) for known, more in zip(self.before, named, strict=True)]

    @property
    def samples(self) -> list[torch.Tensor]:
        """The hidden states alone."""
        return [main_output(call.hidden) for call in self.calls]

    def first(self, count: int) -> "HiddenStates":
        """Those of the first samples."""
        return replace(self, tokens=self.tokens[:count], before=self.before[:count])

    def without_calls(self) -> "HiddenStates":
        """The same, whose calls are recorded anew when they are asked for: their tensors need not be kept."""
        return replace(self)


@dataclass(frozen=True, eq=False, kw_only=True)
class NormCall:
    """A norm, by its name in the block, and what it was called with."""

    name: str
    call: Call


@dataclass(frozen=True, eq=False, kw_only=True)
class InputGroup:
    """Layers that are given one and the same tensor, by their names in the block, and the norm that made it, if any."""

    layers: tuple[str, ...]
    norm: NormCall | None


class Head(nn.Module):
    """The model's end, the last norm and the head, as one more block."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model that keeps its last norm elsewhere than beside its blocks, as `norm`."""
        super().__init__()
        norm, head = getattr(_decoder(model), "norm", None), model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(norm, nn.Module) or not isinstance(head, nn.Module):
            raise ValueError(f"{type(model).__name__} keeps no last norm in model.norm: its head cannot be compensated")
        self.norm, self.head = norm, head
        self._owner = (model,)  # in a tuple, since it is no part of its head

    def forward(self, output: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Logits for token ids [1, length], of which the last block has made `output`."""
        [model] = self._owner
        return logits_after(model, output, tokens)


def logits_after(model: nn.Module, output: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, length, vocabulary], by the model's own forward, where its last block has made `output`."""
    with answering(list(decoder_blocks(model)), output):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def main_output(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _decoder(model: nn.Module) -> nn.Module | None:
    """The part of the model that has the blocks, in `layers`: of one that sees or hears, within its language model."""
    find = getattr(model, "get_decoder", None)
    text = None if find is None else find()
    parts = (text, getattr(text, "model", None), getattr(model, "base_model", None))
    return next((part for part in parts if isinstance(getattr(part, "layers", None), nn.ModuleList)), None)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks. Raises ValueError for a model that keeps them elsewhere than in its decoder's `layers`."""
    blocks = getattr(_decoder(model), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} keeps no decoder blocks in model.layers: it cannot be compensated yet"
        )
    return blocks


def compensated_blocks(model: nn.Module, *, head: bool) -> list[nn.Module]:
    """The blocks, and the head as one more where it is to be compensated, too. Raises ValueError as either does."""
    return [*decoder_blocks(model), *([Head(model)] if head else [])]


def first_inputs(model: nn.Module, samples: torch.Tensor) -> HiddenStates:
    """Inputs of the first block for token ids [samples, length]."""
    return HiddenStates(model=model, tokens=samples, number=0, before=[Before() for _ in samples])


@torch.no_grad()
def run_block(block: nn.Module, hidden: HiddenStates, on_linear: LinearHook | None = None) -> HiddenStates:
    """The block's outputs; `on_linear(name, layer, inputs)` sees what each linear layer in it is given."""
    with _watched(block, on_linear):
        before = [call.of(block, known) for call, known in zip(hidden.calls, hidden.before, strict=True)]
    return replace(hidden, number=hidden.number + 1, before=before)


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
    """Inputs of the block's linear layers, found on the first sample.

    Left out are those that do more than multiply by their weight, such as routers that choose experts, and those
    whose weight the block uses without calling them.
    """
    given: dict[int, list[str]] = {}
    norms: dict[int, NormCall] = {}
    kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def note_layer(name: str, module: nn.Module, positional: Any, named: Any, output: Any) -> None:
        inputs = _inputs_of(positional, named)
        if isinstance(output, torch.Tensor) and output.shape == (*inputs.shape[:-1], layer_shape(module)[0]):
            kept.append(inputs)
            given.setdefault(inputs.data_ptr(), []).append(name)

    def note_norm(name: str, module: nn.Module, positional: Any, named: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kept.append(output)
            norms[output.data_ptr()] = NormCall(name=name, call=Call(positional=positional, named=named))

    notes = [(layer, partial(note_layer, name)) for name, layer in linear_layers(block).items()]
    notes += [(module, partial(note_norm, name)) for name, module in block.named_modules() if _is_norm(module)]
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module, note in notes]
    try:
        run_block(block, hidden.first(1))
    finally:
        for hook in hooks:
            hook.remove()
    return [InputGroup(layers=tuple(names), norm=norms.get(address)) for address, names in given.items()]


def _inputs_of(positional: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    inputs: torch.Tensor = positional[0] if positional else next(iter(named.values()))
    return inputs


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
    def watch(name: str, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert on_linear is not None
        on_linear(name, module, _inputs_of(positional, named))

    layers = linear_layers(block) if on_linear is not None else {}
    hooks = [layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
