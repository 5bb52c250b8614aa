"""Whether PEFT makes of an adapter what its factors say: logits of both, on the same base in the same dtype."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from longshadow.compress.adapters.installing import device_of
from longshadow.compress.adapters.reading import PREFIX, Adapter
from longshadow.compress.blocks import compensated

NUM_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of `ids[1:]`, each after those before it, without and with the adapter."""

    ids: list[int]
    plain: list[float]
    adapted: list[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences of logits, each the largest, relative to the largest logit.

    Attributes:
        difference: between PEFT's and the base's with B A x added by hooks.
        effect: between the base's with and without B A x.
        tolerance: that `difference` must not exceed: of the dtype, or twice what its rounding makes of equal terms.
        dtype: of the base.
        tokens: PEFT's.
    """

    difference: float
    effect: float
    tolerance: float
    dtype: str
    tokens: TokenLogprobs

    @property
    def agrees(self) -> bool:
        """Whether PEFT computes what the factors say."""
        return self.difference <= self.tolerance


def require_peft() -> None:
    """Raises ValueError where PEFT is not installed."""
    if find_spec("peft") is None:
        raise ValueError("comparing with PEFT needs it: pip install 'longshadow[train]'")


@torch.no_grad()
def compare_with_peft(model: Any, adapter: Adapter) -> Comparison:
    """Runs a few tokens; the model is PEFT's afterwards.

    Args:
        model: the base from transformers, into which the adapter fits.

    Raises ValueError for an adapter that is more than B A x, and where PEFT cannot load it.
    """
    from peft import PeftModel

    adapter.require_plain()
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.linspace(0, vocabulary - 1, NUM_TOKENS, device=model.device).long()[None]
    modules = {name: model.get_submodule(name) for name in adapter.layers}
    try:
        # Otherwise PEFT turns 16-bit factors to fp32, and would be compared in another dtype.
        loaded = PeftModel.from_pretrained(model, str(adapter.folder), autocast_adapter_dtype=False).eval()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # What PEFT raises depends on what is wrong: KeyError, RuntimeError, TypeError, ...
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"PEFT cannot load {adapter.folder} ({reason})") from error
    # The base runs inside PEFT's model only: bitsandbytes repacks the weights of a layer that ran on a CPU, and a layer
    # that PEFT wraps after that computes something else.
    found = loaded(ids).logits.double()
    with loaded.disable_adapter():
        plain = loaded(ids).logits.double()

        def with_terms(dtype: torch.dtype | None) -> torch.Tensor:
            factors = {name: _factors(loaded, adapter, name, dtype) for name in modules}
            with compensated({name: (module, *factors[name]) for name, module in modules.items()}):
                logits: torch.Tensor = loaded(ids).logits.double()
            return logits

        expected = with_terms(None)
        # Rounding at every layer adds up, more in some models than in others; this is what it makes of equal terms.
        rounding = float((with_terms(model.dtype) - with_terms(torch.float32)).abs().max())
    largest = float(expected.abs().max())
    return Comparison(
        difference=float((found - expected).abs().max()) / largest,
        effect=float((expected - plain).abs().max()) / largest,
        tolerance=max(1e-4 if model.dtype in (torch.float32, torch.float64) else 1e-2, 2 * rounding / largest),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=TokenLogprobs(ids=ids[0].tolist(), plain=_of_tokens(plain, ids), adapted=_of_tokens(found, ids)),
    )


def _of_tokens(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    logprobs: list[float] = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return logprobs


def _factors(
    loaded: nn.Module, adapter: Adapter, name: str, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A where PEFT has its own, in `dtype` or PEFT's; of a layer that PEFT left out, where the layer is."""
    layer = loaded.get_submodule(f"{PREFIX}{name}")
    own = getattr(layer, "lora_A", None)
    place, peft_dtype = device_of(layer), torch.float32
    if isinstance(own, nn.ModuleDict):
        weight = next(own.parameters())
        place, peft_dtype = weight.device, weight.dtype
    factors = adapter.folded(name, dtype or peft_dtype)
    return factors.lora_b.to(place), factors.lora_a.to(place)
