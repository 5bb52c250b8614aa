"""The solver against the textbook solution in fp64, and what must hold for any activations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.compress import krylov
from longshadow.compress.criterion import METHODS, Criterion, Method
from longshadow.compress.solver import (
    cast_factors,
    factors_of,
    leading_directions,
    remaining_error,
    solve,
    spectrum_of,
)
from longshadow.compress.statistics import ErrorMoments, InputMoments, RefitMoments, input_moments_are_cheaper

SHAPES = [(12, 20), (20, 12), (16, 16)]


def layer(shape: tuple[int, int], *, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual and inputs with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(shape, generator=generator, dtype=torch.float64)
    mixing = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 1, shape[1], dtype=torch.float64)
    return residual, torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64) @ mixing * scales


def moments_of(inputs: torch.Tensor) -> InputMoments:
    moments = InputMoments(inputs.shape[1])
    moments.add(inputs)
    return moments


def exact_moments(inputs: torch.Tensor) -> InputMoments:
    """As `moments_of`, but with products in fp64: for comparisons to the last digits."""
    return InputMoments.of(inputs.T @ inputs / len(inputs))


def textbook(residual: torch.Tensor, covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """[R T]_r T^-1 with T the Cholesky factor of C."""
    root = torch.linalg.cholesky(covariance)
    left, values, right = torch.linalg.svd(residual @ root, full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ torch.linalg.solve(root.T, right[:rank].T).T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_solution_is_the_textbooks(shape: tuple[int, int], rank: int) -> None:
    residual, inputs = layer(shape)
    moments = exact_moments(inputs)
    expected = textbook(residual, moments.matrix, rank)
    torch.testing.assert_close(solve(residual, moments, rank).product, expected, rtol=0, atol=1e-8)
    spectrum = spectrum_of(residual, moments)
    left = remaining_error(residual, factors_of(residual, spectrum.directions[:, :rank]), moments.matrix)
    # The eigenvalues say in advance what is left.
    assert left == pytest.approx(
        spectrum.total_error - float(spectrum.gains[:rank].sum()), abs=1e-9 * spectrum.total_error
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_error_moments_give_the_same_directions(shape: tuple[int, int]) -> None:
    residual, inputs = layer(shape)
    errors = ErrorMoments(residual)
    for part in inputs.split(37):
        errors.add(part)
    actual = factors_of(residual, spectrum_of(residual, errors).directions[:, :4]).product
    torch.testing.assert_close(actual, textbook(residual, exact_moments(inputs).matrix, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(200, 500), (500, 200)])
@pytest.mark.parametrize("case", ["as they are", "one massive token", "fewer tokens than channels"])
@pytest.mark.parametrize("counted", ["inputs", "errors"])
def test_large_layers_lose_nothing_by_iterating(shape: tuple[int, int], case: str, counted: str) -> None:
    """Where only the leading directions are made, they take away what the whole spectrum says they can."""
    rank = 4
    assert krylov.is_worthwhile(min(shape), rank)
    residual, inputs = layer(shape, tokens=1000)
    inputs = ODD_INPUTS.get(case, lambda inputs: inputs)(inputs)
    covariance = inputs.T @ inputs / len(inputs)
    moments: InputMoments | ErrorMoments = InputMoments.of(covariance)
    spectrum = spectrum_of(residual, moments)
    if counted == "errors":
        moments = ErrorMoments(residual)
        moments.add(inputs)
    left = remaining_error(residual, factors_of(residual, leading_directions(residual, moments, rank)), covariance)
    assert left == pytest.approx(
        spectrum.total_error - float(spectrum.gains[:rank].sum()), abs=2e-6 * spectrum.total_error
    )


ODD_INPUTS: dict[str, Any] = {
    "fewer tokens than channels": lambda inputs: inputs[:5],
    "channels without activity": lambda inputs: inputs * (torch.arange(inputs.shape[1]) % 3 > 0),
    "one massive token": lambda inputs: torch.cat([inputs, 3000 * inputs[:1]]),
    "one token": lambda inputs: inputs[:1],
    "no activity": lambda inputs: inputs * 0,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ODD_INPUTS)
def test_odd_inputs(shape: tuple[int, int], case: str) -> None:
    """No rank does harm, more ranks do no less, and the full rank gives the weight itself."""
    residual, inputs = layer(shape)
    moments = moments_of(ODD_INPUTS[case](inputs))
    covariance = moments.matrix
    before = float(((residual @ covariance) * residual).sum())
    errors = [
        remaining_error(residual, solve(residual, moments, rank), covariance) for rank in range(1, min(shape) + 1)
    ]
    slack = 1e-6 * max(before, 1e-12)  # moments come from products in fp32
    for worse, better in zip([before, *errors], errors, strict=False):
        assert better <= worse + slack
    full = factors_of(residual, spectrum_of(residual, moments).directions[:, : min(shape)]).product
    torch.testing.assert_close(full, residual, rtol=0, atol=1e-9)


def test_the_order_of_samples_does_not_matter() -> None:
    residual, inputs = layer((12, 20))
    forward, backward = InputMoments(20), InputMoments(20)
    for part in inputs.split(10):
        forward.add(part)
    for part in reversed(inputs.split(10)):
        backward.add(part)
    torch.testing.assert_close(forward.matrix, backward.matrix, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        solve(residual, forward, 4).product, solve(residual, backward, 4).product, rtol=0, atol=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.integers(1, 8))
def test_no_method_beats_eora_on_its_own_measure(seed: int, shape: tuple[int, int], rank: int) -> None:
    residual, inputs = layer(shape, seed=seed)
    moments = moments_of(inputs)
    output_weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    errors = {
        method: remaining_error(
            residual,
            solve(residual, moments, rank, criterion=Criterion(method=method), output_weights=output_weights),
            moments.matrix,
        )
        for method in METHODS
    }
    assert min(errors, key=errors.__getitem__) == "eora" or errors["eora"] <= 1.000001 * min(errors.values())


def test_fisher_weighs_outputs() -> None:
    """Best among the methods where errors count by output; with equal weights it is EoRA."""
    residual, inputs = layer((12, 20))
    moments = exact_moments(inputs)
    weights = torch.logspace(-3, 1, 12, dtype=torch.float64)
    root = weights.sqrt().unsqueeze(1)

    def weighted_error(**options: Any) -> float:
        remainder = root * (residual - solve(residual, moments, 3, **options).product)
        return float(((remainder @ moments.matrix) * remainder).sum())

    by_fisher = Criterion(method="fisher")
    fisher = weighted_error(criterion=by_fisher, output_weights=weights)
    assert fisher < 0.999 * weighted_error()
    expected = textbook(root * residual, moments.matrix, 3) / root
    actual = solve(residual, moments, 3, criterion=by_fisher, output_weights=weights).product
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)
    alike = solve(residual, moments, 3, criterion=by_fisher, output_weights=torch.ones(12)).product
    torch.testing.assert_close(alike, solve(residual, moments, 3).product, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="12 output weights"):
        solve(residual, moments, 3, criterion=by_fisher)


def test_outputs_that_the_loss_does_not_mind() -> None:
    """They get what the directions chosen for others allow; where it minds none, fisher is EoRA."""
    residual, inputs = layer((12, 20))
    moments = exact_moments(inputs)
    criterion, weights = Criterion(method="fisher"), torch.arange(12) % 2
    factors = solve(residual, moments, 3, criterion=criterion, output_weights=weights)
    seen = factors.lora_a @ moments.matrix
    best = residual @ seen.T @ torch.linalg.inv(seen @ factors.lora_a.T)
    torch.testing.assert_close(factors.lora_b, best, rtol=0, atol=1e-8)
    none = solve(residual, moments, 3, criterion=criterion, output_weights=torch.zeros(12))
    torch.testing.assert_close(none.product, solve(residual, moments, 3).product, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_a_criterion_is_what_the_textbook_minimises(shape: tuple[int, int], method: Method, shrinkage: float) -> None:
    """[D^½ R T]_r T⁻¹ / D^½ with T T^T = (1 - s) C + s diag(C), whether inputs were counted or errors."""
    residual, inputs = layer(shape)
    moments, errors = exact_moments(inputs), ErrorMoments(residual)
    errors.add(inputs)
    weights = torch.logspace(-3, 1, shape[0], dtype=torch.float64)
    covariance, share = moments.matrix, 1.0 if method == "diagonal" else shrinkage
    used = (1 - share) * covariance + share * torch.diag(covariance.diagonal())
    if method == "svd":
        used = torch.eye(shape[1], dtype=torch.float64)
    root = weights.sqrt().unsqueeze(1) if method == "fisher" else torch.ones(shape[0], 1, dtype=torch.float64)
    expected = textbook(root * residual, used, 4) / root
    for known, tolerance in ((moments, 1e-7), (errors, 2e-3)):  # errors are counted by products in fp32
        criterion = Criterion(method=method, shrinkage=shrinkage)
        actual = solve(residual, known, 4, criterion=criterion, output_weights=weights).product
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_a_refit_after_a_second_pass_is_that_from_the_moments() -> None:
    residual, inputs = layer((12, 20))
    lora_a = residual[:4].contiguous()
    counted, moments = RefitMoments(residual, lora_a), exact_moments(inputs)
    counted.add(inputs)
    shrunk = RefitMoments.of(residual, lora_a, moments.shrunk(0.3).matrix)
    actual = counted.shrunk(0.3, moments.energies)
    torch.testing.assert_close(actual.cross, shrunk.cross, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.inner, shrunk.inner, rtol=1e-4, atol=1e-4)


def test_a_criterion_out_of_range() -> None:
    with pytest.raises(ValueError, match="shrinkage must be from 0 to 1"):
        Criterion(shrinkage=1.5)
    with pytest.raises(ValueError, match="method must be one of eora, diagonal"):
        Criterion(method="lqer")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_makes_b_anew(dtype: torch.dtype) -> None:
    residual, inputs = layer((20, 32))
    moments = exact_moments(inputs)
    exact = factors_of(residual, spectrum_of(residual, moments).directions[:, :8])
    cast = cast_factors(exact, residual, moments, dtype)
    assert cast.lora_a.dtype == cast.lora_b.dtype == dtype
    torch.testing.assert_close(
        cast.lora_a.float().norm(dim=1).sum(), cast.lora_b.float().norm(dim=0).sum(), rtol=0.1, atol=0
    )
    plain = type(exact)(lora_b=exact.lora_b.to(dtype), lora_a=exact.lora_a.to(dtype))
    best = remaining_error(residual, exact, moments.matrix)
    lost, plainly_lost = (remaining_error(residual, factors, moments.matrix) - best for factors in (cast, plain))
    assert 0 <= lost < plainly_lost
    with pytest.raises(ValueError, match="range of float16"):
        cast_factors(exact, 1e12 * residual, moments, torch.float16)


def test_small_residuals_stay_in_range() -> None:
    residual, inputs = layer((20, 32))
    moments = exact_moments(inputs)
    cast = solve(1e-6 * residual, moments, 8, dtype=torch.float16)
    error = remaining_error(1e-6 * residual, cast, moments.matrix)
    assert error <= 1.01 * remaining_error(1e-6 * residual, solve(1e-6 * residual, moments, 8), moments.matrix)


def test_the_cheaper_moments() -> None:
    assert input_moments_are_cheaper(576, [576, 192, 192])  # q, k and v of SmolLM2
    assert not input_moments_are_cheaper(1536, [576])  # down_proj
    with pytest.raises(ValueError, match="calibration text is empty"):
        _ = InputMoments(3).matrix
    residual, inputs = layer((12, 20))
    with pytest.raises(ValueError, match="at least 1"):
        solve(residual, moments_of(inputs), 0)
