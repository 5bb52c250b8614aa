"""TRL's fused head on labelled cells only: every field of its output, values and gradients."""

import dataclasses
from typing import Any

import pytest
import torch

from longshadow import share_prefixes
from longshadow.engine.prefix_sharing.head import project_labelled_cells
from tests.engine.prefix_sharing.batches import pad, pairs
from tests.engine.prefix_sharing.trainers.runs import model_of

utils = pytest.importorskip("trl.trainer.utils", reason="needs the extra train")
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def labels_of(ids: torch.Tensor, mask: torch.Tensor, labelled: str) -> torch.Tensor:
    columns = torch.arange(ids.shape[1])
    answered = {"answers": columns >= 17, "one cell": columns == 18, "nothing": columns < 0}[labelled]
    return ids.masked_fill(~(answered & mask.bool()), -100)


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="TRL before 1.15 has no fused head")
@pytest.mark.parametrize("labelled", ["answers", "one cell", "nothing"])
@pytest.mark.parametrize("minimum_ratio", [1.0, 100.0], ids=["shared", "the ordinary way"])
def test_output_is_that_of_the_whole_head(labelled: str, minimum_ratio: float) -> None:
    torch.manual_seed(0)
    model = model_of("llama", torch.float64)
    utils.add_fused_lm_head(model, outputs=FIELDS)
    ids, mask = pad(pairs())
    labels = labels_of(ids, mask, labelled)

    def run() -> tuple[dict[str, Any], list[torch.Tensor]]:
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
        (output.log_probs.sum() + output.loss).backward()
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return fields, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, gradients = run()
    with share_prefixes(model, minimum_ratio=minimum_ratio), project_labelled_cells(model):
        actual, mine = run()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-6, msg=name)
        else:
            assert value is None and actual[name] is None
    for gradient, theirs in zip(mine, gradients, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="TRL before 1.15 has no fused head")
def test_only_labelled_cells_meet_the_vocabulary(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = model_of("llama", torch.float32)
    utils.add_fused_lm_head(model)
    ids, mask = pad(pairs())
    labels = labels_of(ids, mask, "answers")
    rows: list[int] = []
    apply = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda hidden, *rest: rows.append(len(hidden)) or apply(hidden, *rest)
    )
    with share_prefixes(model, verify_first_batch=False):
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        with project_labelled_cells(model):
            model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert rows == [ids.shape[0] * (ids.shape[1] - 1), int((labels[:, 1:] != -100).sum())]
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (*ids.shape, model.config.vocab_size)
    assert "forward" in vars(model), "TRL's own head is gone"
