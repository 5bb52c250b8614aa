"""The tables of compensation at toy sizes, and the methods and quantisers that they compare with."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.eora_candidates import (
    DEFAULT,
    METHODS,
    WAYS,
    RecentMoments,
    candidates,
    gptqmodel_factors,
    measure,
)
from bench.quantisers import NormalFloat, TwoOfFour, normal_float_levels, quantised
from bench.tables import eora_quality, eora_time
from longshadow.compress.blocks import linear_layers
from longshadow.compress.pipeline import compensate
from longshadow.compress.rounding import RoundToNearest
from longshadow.compress.solver import remaining_error, solve
from longshadow.compress.statistics import InputMoments
from tests.bench.test_methods import SHAPE
from tests.bench.test_tables import run
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_eora_quality(monkeypatch):
    monkeypatch.setattr(
        eora_quality, "load_model", lambda *_, **__: SimpleNamespace(model=tiny_model(), tokenizer=tiny_tokenizer())
    )
    config = eora_quality.Config(
        roundings=((2, 32),),
        normal_float=False,
        pruned=False,
        ranks=(8,),
        samples=6,
        length=128,
        judged=64,
        judged_samples=4,
        selected_samples=2,
    )
    rows = run("eora_quality", config)
    by_method = {row["method"]: row for row in rows if row["quantiser"] not in ("none", "all")}
    assert by_method.keys() == {"none", *METHODS}
    assert by_method[DEFAULT]["divergence"] < by_method["none"]["divergence"]
    assert 0 < by_method[DEFAULT]["recovered"] < 1 and by_method[DEFAULT]["low"] <= by_method[DEFAULT]["recovered"]
    assert by_method["none"]["bits"] == 3 < by_method[DEFAULT]["bits"]
    # 8 of 32 x 32 are many bits, which buy a lot as bits.
    assert by_method[DEFAULT]["bits_instead"] < by_method["none"]["divergence"]
    left = {row["method"]: row["left"] for row in rows if row["quantiser"] == "all"}
    assert left["SVD"] == pytest.approx(by_method["SVD"]["selection"] / by_method["none"]["selection"])
    assert by_method["SVD"]["behind_low"] <= by_method["SVD"]["behind"] <= by_method["SVD"]["behind_high"]


def test_the_models_own_grid_is_left_out():
    judges = SimpleNamespace(of_report=[], report=[])
    named = []

    def unit(name, measure):
        named.append(name)
        return {"divergence": 1.0}

    for bits in (4.9, 5.0, 6.0):
        eora_quality._of_bits(tiny_model(), bits, judges, SimpleNamespace(unit=unit))
    assert named == ["3 bits, groups of 32, alone", "3 bits, groups of 32, alone", "5 bits, groups of 32, alone"]


def test_eora_time(monkeypatch):
    monkeypatch.setitem(eora_time.SHAPES, "smollm2-135m", replace(SHAPE, num_layers=3))
    config = eora_time.Config(layers=2, samples=2, length=64, rank=4, solver_shapes=((48, 96), (96, 48)))
    model, *layers = run("eora_time", config)
    assert model["whole"] == 1.5 * model["median"]
    assert [row["way"] for row in layers] == 2 * [eora_time.TEXTBOOK, eora_time.OURS]
    assert all(row["ratio"] == 1 for row in layers if row["way"] == eora_time.TEXTBOOK)


def test_a_wrong_solution_turns_the_check_red(monkeypatch):
    monkeypatch.setitem(eora_time.SHAPES, "smollm2-135m", SHAPE)
    monkeypatch.setattr(eora_time, "solve", lambda *given: solve(*given[:2], 1))
    config = eora_time.Config(layers=1, samples=1, length=32, rank=4, solver_shapes=((48, 96),))
    outcome = eora_time.run(config, eora_time.Session())
    assert not outcome.check.passed


@pytest.mark.parametrize("method", WAYS)
def test_candidates_are_what_compensate_finds(samples, method):
    model = tiny_model()
    smaller = quantised(model, RoundToNearest(bits=2, group=32))
    way = WAYS[method]
    found = candidates(measure(model, smaller, samples), method, (8,), torch.float32)[8]
    layers = [layer for name, layer in model.named_modules() if name in compensated_layers(model)]
    budget = 8 * sum(sum(layer.weight.shape) for layer in layers)
    size = {"budget": budget, "rank": None} if way.spread else {"rank": 8}
    plain = compensate(
        model,
        smaller,
        samples,
        **size,
        method=way.criterion.method,
        shrinkage=way.criterion.shrinkage,
        propagate="quantized",
        dtype=torch.float32,
    )
    assert found.keys() == plain.factors.keys()
    for name, pair in found.items():
        torch.testing.assert_close(pair.product, plain.factors[name].product, rtol=0, atol=1e-3)


def compensated_layers(model):
    return {
        f"model.layers.{number}.{name}"
        for number, block in enumerate(model.model.layers)
        for name in linear_layers(block)
    }


def test_gptqmodels_arithmetic_is_exact_for_plain_activations():
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(12, 20, generator=generator)
    tokens = torch.randn(200, 20, generator=generator)
    covariance = tokens.T @ tokens / len(tokens)
    b, a = gptqmodel_factors(residual, covariance)
    expected = solve(residual, InputMoments.of(covariance.double()), 4).product
    torch.testing.assert_close((b[:, :4] @ a[:4]).double(), expected, rtol=0, atol=1e-4)


def test_gptqmodels_arithmetic_drops_what_massive_tokens_hide(samples):
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(12, 20, generator=generator)
    tokens = torch.randn(200, 20, generator=generator)
    tokens[0] *= 30_000
    covariance = tokens.T @ tokens / len(tokens)
    b, a = gptqmodel_factors(residual, covariance)
    assert len(a) < 20
    plain = (tokens[1:].T @ tokens[1:]).double()
    ours = solve(residual, InputMoments.of(covariance.double()), 10)
    theirs = type(ours)(lora_b=b[:, :10].double(), lora_a=a[:10].double())
    assert remaining_error(residual, ours, plain) < remaining_error(residual, theirs, plain)


def test_recent_samples_weigh_more():
    moments = RecentMoments(2, 4)
    for number in range(4):
        moments.add(torch.full((1, 3, 2), float(10**number)))
    weights = [0.8**3, 0.8**2, 0.8, 1]
    assert moments.matrix[0, 0] == pytest.approx(sum(w * 100**n for n, w in enumerate(weights)))


def test_quantisers():
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    pruned = TwoOfFour()(weight).view(-1, 4)
    assert (pruned != 0).sum(1).tolist() == [2] * len(pruned)
    # Published in QLoRA's table, to their digits.
    assert normal_float_levels().tolist() == pytest.approx(
        [
            *(-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
        ],
        abs=1e-5,
    )
    rounded = NormalFloat()(weight)
    blocks, given = rounded.view(-1, 64), weight.view(-1, 64)
    assert all(len(block.unique()) <= 16 for block in blocks)
    assert (blocks.abs().amax(1) == given.abs().amax(1)).all()
    assert (rounded - weight).abs().max() < 0.16 * weight.abs().max()


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    """Token ids [6, 64]."""
    tokens = tiny_tokenizer()("A tall ship and a star to steer her by. " * 20)["input_ids"]
    return torch.tensor(tokens[: 6 * 64]).view(6, 64)
