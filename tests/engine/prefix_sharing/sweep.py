"""Any causal-LM under `share_prefixes` against itself without: logits, and every gradient."""

from typing import Any

import torch
from transformers import PreTrainedModel

from longshadow.engine.prefix_sharing import share_prefixes
from tests.engine.prefix_sharing.batches import groups, pad, pairs

# Relative to the largest value; what a family computes in fp32 whatever its weights are ends there.
TOLERANCE = 2e-5


def try_sharing(model: PreTrainedModel) -> str | None:
    """Pairs padded on the right, groups on the left, forwards and backwards: why the model is refused; None if equal.

    What stock models cannot do themselves is refused, too, in their words.
    """
    batches = [pad(pairs()), pad(groups(), side="left")]
    model = most_precise(model, *batches[1])
    for ids, mask in batches:
        try:
            expected, gradients = _run(model, ids, mask)
        except Exception as error:
            return f"it does not train by itself: {error}"
        try:
            with share_prefixes(model) as report:
                actual, mine = _run(model, ids, mask)
        except ValueError as refusal:
            return str(refusal)
        assert report.shared_batches == 1, f"it ran the ordinary way, {report.reasons}"
        real = mask.bool()
        worst = float((actual[real] - expected[real]).abs().max() / expected[real].abs().max())
        assert worst <= TOLERANCE, f"logits are off by {worst:.1e} of the largest"
        assert mine.keys() == gradients.keys()
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, gradient in gradients.items():
            worst = float((mine[key] - gradient).abs().max()) / largest
            assert worst <= TOLERANCE, f"the gradient of {key} is off by {worst:.1e} of the largest"
    return None


def most_precise(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """In fp64 where it can: padding gives NaN in some attention there, eager or SDPA, forwards or backwards."""
    before = model.config._attn_implementation
    for attention, dtype in (("sdpa", torch.float64), (before, torch.float64)):
        try:
            model.set_attn_implementation(attention)
            _, gradients = _run(model.to(dtype), ids, mask)
            if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
                return model
        # What cannot be done in fp64 fails in many ways.
        except Exception:
            continue
    model.set_attn_implementation(before)
    return model.to(torch.float32)


def _run(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    weight = torch.linspace(-1, 1, len(ids), dtype=logps.dtype)[:, None] * (mask[:, 1:] * mask[:, :-1])
    (logps * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients
