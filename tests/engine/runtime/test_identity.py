"""Fingerprints of models, whose weights may be tensors of libraries' own kinds."""

from typing import Any

import torch
from torch import nn

from longshadow.engine.runtime.identity import model_fingerprint
from tests.engine.shadowkv.families import tiny_model


class Opaque(torch.Tensor):
    """A weight that cannot be flattened or sliced, as those that torchao quantised."""

    plain: torch.Tensor

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> "Opaque":
        opaque: Opaque = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)
        opaque.plain = plain
        return opaque

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["plain"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> "Opaque":
        return cls(inner["plain"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Opaque":
        if func is torch.ops.aten.detach.default:
            return cls(args[0].plain)
        raise NotImplementedError(f"{func}")


def test_weights_that_cannot_be_sliced_count() -> None:
    model = tiny_model("llama")
    ordinary = model_fingerprint(model)
    plain = model.lm_head.weight.detach()
    found = set()
    for weight in (plain, plain + 1):
        model.lm_head.weight = nn.Parameter(Opaque(weight), requires_grad=False)
        found.add(model_fingerprint(model))
    assert len(found | {ordinary}) == 3
    model.lm_head.weight = nn.Parameter(plain)
    assert model_fingerprint(model) == ordinary
