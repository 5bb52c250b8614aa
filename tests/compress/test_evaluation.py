"""Divergences and perplexities against plain arithmetic on whole batches of logits."""

import pytest
import torch
from torch import nn

from longshadow.compress.blocks import decoder_blocks
from longshadow.compress.evaluation import ORIGINAL, Quality, Variant, difference, mean_and_interval, qualities
from longshadow.compress.report import perplexity_text
from tests.compress.test_pipeline import divergence, round_to_nearest
from tests.tiny_models import tiny_model


def test_variants_side_by_side(samples: torch.Tensor) -> None:
    original, rounded = tiny_model(), round_to_nearest(tiny_model())
    layer = rounded.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, nn.Linear)
    change = original.model.layers[1].mlp.down_proj.weight.detach() - layer.weight.detach()
    terms = {"down": (layer, torch.eye(len(change)), change)}
    counted: list[tuple[int, int]] = []
    runs: list[int] = []
    decoder_blocks(original)[0].register_forward_hook(lambda *_: runs.append(1))
    variants = {"rounded": Variant(model=rounded), "repaired": Variant(model=rounded, added=terms)}
    found = qualities(original, variants, samples[:3], lambda *count: counted.append(count))
    assert list(found) == [ORIGINAL, "rounded", "repaired"] and counted == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert len(runs) == 3, "the original runs once for all"
    assert found[ORIGINAL].divergence == (0.0,) * 3
    # The last position has no next token to be judged by.
    expected = [divergence(original, rounded, sample[None, :-1]) for sample in samples[:3]]
    assert found["rounded"].divergence == pytest.approx(expected, rel=1e-3)
    assert not layer._forward_hooks
    layer.weight.data += change
    alone = qualities(original, {"repaired": Variant(model=rounded)}, samples[:3])["repaired"]
    assert found["repaired"].divergence == pytest.approx(alone.divergence, rel=1e-3)
    assert found["repaired"].perplexity == pytest.approx(alone.perplexity, rel=1e-4)


def test_perplexity(samples: torch.Tensor) -> None:
    with torch.no_grad():
        losses = [float(tiny_model()(sample[None], labels=sample[None]).loss) for sample in samples]
    found = qualities(tiny_model(), {}, samples)[ORIGINAL]
    assert found.perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


def test_a_perplexity_that_no_number_holds() -> None:
    quality = Quality(divergence=(0.0,), loss=(800.0,))
    assert quality.perplexity is None and quality.mean_loss == 800
    assert [perplexity_text(it) for it in (None, 12.34567, 1.5e13)] == ["above 1e308", "12.346", "1.500e+13"]


def test_differences_are_paired() -> None:
    worse = Quality(divergence=(1.0, 2.0, 9.0), loss=(0.0,) * 3)
    better = Quality(divergence=(0.5, 1.5, 8.5), loss=(0.0,) * 3)
    assert difference(worse, better) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_one_sample_has_no_interval() -> None:
    worse, better = Quality(divergence=(1.0,), loss=(0.0,)), Quality(divergence=(0.25,), loss=(0.0,))
    assert difference(worse, better) == {"mean": 0.75}


def test_intervals() -> None:
    assert mean_and_interval([2.0] * 5) == (2.0, 2.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    mean, low, high = mean_and_interval(torch.randn(400, generator=generator).tolist())
    # The standard error of 400 draws is 0.05.
    assert low < mean < high and 0.15 < high - low < 0.25
