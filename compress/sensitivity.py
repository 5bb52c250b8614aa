"""How much an error in each output of a layer matters to the model's loss: the diagonal of the Fisher information.

Gradients are carried back block by block, and each block is run again for its own, so that no more than one block's
activations are kept, and an original that stays on disk is read one block at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from longshadow.compress.blocks import HiddenStates, decoder_blocks, first_inputs, linear_layers, run_block


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
        inputs = [first_inputs(model, samples)]
        for block in blocks:
            inputs.append(run_block(block, inputs[-1]))
        watched = {names[layer]: layer for layer in [model.get_output_embeddings()] if head}  # type: ignore[operator]
        with squares.counted(watched):
            gradients = _gradients_of_last_hidden(model, blocks, inputs.pop(), samples)
        for block in reversed(blocks):
            hidden = inputs.pop()
            with squares.counted({names[layer]: layer for layer in linear_layers(block).values()}):
                gradients = _carried_back(block, hidden, gradients)
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

        def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.register_hook(count)

        return watch


def _gradients_of_last_hidden(
    model: nn.Module, blocks: list[nn.Module], last: HiddenStates, samples: torch.Tensor
) -> list[torch.Tensor]:
    """Of each sample's loss, a sum over tokens, so that it does not shrink with their number.

    The model's own forward makes it, with blocks that pass on what they would have computed: whatever a family does
    to logits is done.
    """
    found: list[torch.Tensor] = []
    for sample, hidden in zip(samples, last.samples, strict=True):
        leaf = hidden.detach().requires_grad_()
        with _answering(blocks, (leaf,) if last.from_tuple else leaf), torch.enable_grad():
            logits = model(input_ids=sample.unsqueeze(0), use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, sample[1:], reduction="sum")
        found += torch.autograd.grad(loss, leaf)
    return found


def _carried_back(block: nn.Module, hidden: HiddenStates, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each sample's gradient by the block's inputs, from that by its outputs."""
    carried: list[torch.Tensor] = []
    for sample, gradient in zip(hidden.samples, gradients, strict=True):
        leaf = sample.detach().requires_grad_()
        with torch.enable_grad():
            output = block(leaf, **hidden.arguments)
        carried += torch.autograd.grad(output[0] if isinstance(output, tuple) else output, leaf, gradient)
    return carried


@contextmanager
def _answering(blocks: list[nn.Module], output: torch.Tensor | tuple[torch.Tensor]) -> Iterator[None]:
    """Within, every block answers with the output, at once."""
    kept = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *given, **named: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


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
