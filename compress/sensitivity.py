"""How much an error in each output of a layer matters to the model's loss: the diagonal of the Fisher information.

Gradients are carried back block by block, and each block is run again for its own, so that no more than one block's
activations are kept, and an original that stays on disk is read one block at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from longshadow.compress.blocks import (
    HiddenStates,
    decoder_blocks,
    first_inputs,
    linear_layers,
    logits_after,
    run_block,
)
from longshadow.compress.calls import Before, Call, Forward, at_block

Gradient = torch.Tensor | None


def output_sensitivity(model: nn.Module, samples: torch.Tensor, *, head: bool = False) -> dict[str, torch.Tensor]:
    """Mean squared gradient of the next token's loss, per output of each linear layer, [m] in fp64, by its name.

    Args:
        model: the original; its parameters get no gradients.
        samples: token ids [samples, length].
        head: whether the language-model head is among the layers, beside those in the blocks.

    Raises ValueError for a model whose layers have no gradients, or whose gradients its dtype does not hold.
    """
    try:
        sums = _squared_gradients(model, samples, head=head)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the original gives no gradients for its outputs to be weighed by ({str(error).splitlines()[0]}): use "
            "--method eora"
        ) from error
    if not all(total.isfinite().all() for total in sums.values()):
        raise ValueError(
            "the original's gradients are not finite: use --method eora, or give the original in bfloat16 or float32"
        )
    return {name: total / samples.numel() for name, total in sums.items()}


def _squared_gradients(model: nn.Module, samples: torch.Tensor, *, head: bool) -> dict[str, torch.Tensor]:
    """Summed over tokens."""
    names = {module: name for name, module in model.named_modules()}
    blocks = list(decoder_blocks(model))
    squares = _SquaredGradients()
    with _no_gradients_for_parameters(model):
        hidden = first_inputs(model, samples)
        inputs = []
        for block in blocks:
            inputs.append(hidden.without_calls())
            hidden = run_block(block, hidden)
        watched = {names[layer]: layer for layer in [model.get_output_embeddings()] if head}  # type: ignore[operator]
        with squares.counted(watched):
            gradients = [
                _of_last_output(model, known, sample) for known, sample in zip(hidden.before, samples, strict=True)
            ]
        for block in reversed(blocks):
            before = inputs.pop()
            with squares.counted({names[layer]: layer for layer in linear_layers(block).values()}):
                gradients = [_carried_back(before, index, gradient) for index, gradient in enumerate(gradients)]
    return squares.sums


class _SquaredGradients:
    """Sums over tokens, of the outputs of layers, by their names."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def counted(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Within, gradients of these layers' outputs are."""
        hooks = [layer.register_forward_hook(self._counter(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, name: str) -> Callable[..., None]:
        def count(gradient: torch.Tensor) -> None:
            squares = gradient.detach().flatten(0, -2).double().square().sum(0)
            self.sums[name] = self.sums[name] + squares if name in self.sums else squares

        def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor):
                # What does not follow from the block's inputs matters to the loss, too.
                (output if output.requires_grad else output.requires_grad_()).register_hook(count)

        return watch


def _of_last_output(model: nn.Module, before: Before, sample: torch.Tensor) -> list[Gradient]:
    """Of a sample's loss, a sum over tokens, so that it does not shrink with their number; by what the last block made.

    The model's own forward makes it, so whatever a family does to logits is done.
    """
    apart, leaves = _apart(before)
    with torch.enable_grad():
        logits = logits_after(model, apart.output, sample.unsqueeze(0))[0, :-1].float()
        loss = F.cross_entropy(logits, sample[1:], reduction="sum")
    torch.autograd.backward(loss)
    return [leaf.grad for leaf in leaves]


def _carried_back(inputs: HiddenStates, index: int, gradients: list[Gradient]) -> list[Gradient]:
    """A sample's gradients by what blocks before have made, from those by what this one does.

    The model's own forward runs as far as the block, since it may do something between two of them.
    """
    apart, leaves = _apart(inputs.before[index])

    def act(forward: Forward, call: Call) -> Before:
        if not leaves:  # the first block
            call = call.with_hidden(call.hidden.detach().requires_grad_())
            leaves.append(call.hidden)
        return call.of(forward, apart)

    tokens = inputs.tokens[index].unsqueeze(0)
    with torch.enable_grad():
        made = at_block(inputs.model, list(decoder_blocks(inputs.model)), inputs.number, tokens, apart, act)
    pairs = [pair for pair in zip(_floating(made), gradients, strict=True) if pair[1] is not None]
    outputs, weights = zip(*pairs, strict=True)
    torch.autograd.backward(outputs, weights)
    return [leaf.grad for leaf in leaves]


def _apart(before: Before) -> tuple[Before, list[torch.Tensor]]:
    """The same, apart from what made it, and its tensors that have gradients."""
    parts, shape = tree_flatten((before.output, before.left))
    parts = [part.detach().requires_grad_() if _has_gradient(part) else part for part in parts]
    output, left = tree_unflatten(parts, shape)
    return Before(output=output, left=left), list(filter(_has_gradient, parts))


def _floating(before: Before) -> list[torch.Tensor]:
    return list(filter(_has_gradient, tree_leaves((before.output, before.left))))


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@contextmanager
def _no_gradients_for_parameters(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
