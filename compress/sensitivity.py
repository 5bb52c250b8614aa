"""How much an error in each output of a layer matters to the model's loss: the diagonal of the Fisher information."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def output_sensitivity(model: nn.Module, names: list[str], samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squared gradient of the next token's loss, per output of each named layer, [m] in fp64.

    Args:
        model: the original, whole and with gradients possible; its parameters get none.
        names: of linear layers in the model.
        samples: token ids [samples, length].
    """
    sums: dict[str, torch.Tensor] = {}
    num_tokens = 0

    def counter(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def count(gradient: torch.Tensor) -> None:
            squares = gradient.detach().flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.register_hook(count)

        return watch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [model.get_submodule(name).register_forward_hook(counter(name)) for name in names]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            for sample in samples:
                ids = sample.unsqueeze(0)
                # Nothing but the embedded tokens asks for gradients, so none are kept for parameters.
                embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
                # The sum, so that the mean over tokens does not shrink with their number.
                F.cross_entropy(logits, sample[1:], reduction="sum").backward()
                num_tokens += len(sample)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {name: total / num_tokens for name, total in sums.items()}
