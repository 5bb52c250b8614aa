"""The accumulated eigendecomposition against an SVD of the keys."""

import pytest
import torch

from longshadow.engine.shadowkv.basis import GramAccumulator, LowRankBasis


def solve(
    keys: torch.Tensor,
    *,
    blocks: int = 1,
    center: bool = False,
    weights: torch.Tensor | None = None,
    **how: object,
) -> LowRankBasis:
    gram = GramAccumulator(keys.shape[1], keys.device, weights)
    for block in keys.chunk(blocks):
        gram.add(block)
    arguments = {"rank": None, "rank_energy": None, **how}
    return gram.solve(center=center, dtype=keys.dtype, **arguments)  # type: ignore[arg-type]


def decaying_keys(num_tokens: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -3, width)
    return torch.randn(num_tokens, width, generator=generator) @ mixing.T + 0.5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_error_equals_the_truncated_svds(rank: int, blocks: int, center: bool, weighted: bool) -> None:
    keys = decaying_keys(701, 24)
    weights = torch.linspace(2, 0.1, 24) if weighted else torch.ones(24)
    basis = solve(keys, blocks=blocks, center=center, weights=weights if weighted else None, rank=rank)
    offset = keys.double().mean(0) if center else torch.zeros(24, dtype=torch.float64)
    spectrum = torch.linalg.svdvals((keys.double() - offset) * weights)
    difference = basis.coefficients(keys) @ basis.rows + basis.mean - keys
    error = (difference * weights).double().square().sum()
    assert float(error) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-3, abs=1e-6)
    kept = 1 - float(spectrum[rank:].square().sum() / (keys * weights).double().square().sum())
    assert basis.energy_kept == pytest.approx(kept, abs=1e-6)


def test_coefficients_have_unit_mean_square() -> None:
    keys = decaying_keys(500, 24)
    mean_square = solve(keys, rank=12).coefficients(keys).square().mean(0)
    torch.testing.assert_close(mean_square, torch.ones(12), rtol=1e-3, atol=0)


def test_rank_by_energy_is_the_smallest_that_keeps_it() -> None:
    keys = decaying_keys(500, 24)
    basis = solve(keys, rank_energy=0.99)
    rank = basis.rows.shape[0]
    assert basis.energy_kept >= 0.99 > solve(keys, rank=rank - 1).energy_kept


def test_constant_and_zero_keys_are_kept_exactly() -> None:
    for keys in (torch.zeros(64, 8), torch.full((64, 8), 3.0)):
        basis = solve(keys, center=True, rank=4)
        torch.testing.assert_close(basis.coefficients(keys) @ basis.rows + basis.mean, keys)
        assert basis.energy_kept == pytest.approx(1.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_iteration_keeps_the_eigendecompositions_energy(rank: int, center: bool, weighted: bool) -> None:
    keys = decaying_keys(701, 24).double()
    weights = torch.linspace(2, 0.1, 24) if weighted else None
    exact = solve(keys, center=center, weights=weights, rank=rank)
    basis = solve(keys, center=center, weights=weights, rank=rank, iterative=True)
    assert basis.energy_kept == pytest.approx(exact.energy_kept, rel=1e-3)
    difference = (basis.coefficients(keys) @ basis.rows + basis.mean - keys) * (1 if weights is None else weights)
    energy = (keys * (1 if weights is None else weights)).double().square().sum()
    assert float(1 - difference.double().square().sum() / energy) == pytest.approx(basis.energy_kept, abs=1e-6)
    if center:
        moments = basis.coefficients(keys).T @ basis.coefficients(keys) / len(keys)
        torch.testing.assert_close(moments, torch.eye(rank, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("keys", [torch.zeros(64, 8), torch.full((64, 8), 3.0), decaying_keys(5, 24)])
def test_without_energy_in_all_directions_coefficients_stay_small(keys: torch.Tensor, iterative: bool) -> None:
    """Fewer tokens than the rank, or all the same: what is rounded to half precision must not overflow."""
    basis = solve(keys, center=True, rank=8, iterative=iterative)
    coefficients = basis.coefficients(keys)
    assert coefficients.abs().max() < 10
    torch.testing.assert_close(coefficients @ basis.rows + basis.mean, keys, rtol=1e-4, atol=1e-4)
    assert basis.energy_kept == pytest.approx(1.0, abs=1e-6)


def test_sums_made_elsewhere_count_like_keys() -> None:
    keys = decaying_keys(500, 24).double()
    gram = GramAccumulator(24, keys.device)
    gram.add(keys[:200])
    gram.add_sums(keys[200:].T @ keys[200:], keys[200:].sum(0), 300)
    arguments = dict(rank=7, rank_energy=None, center=True, dtype=torch.float64)
    assert gram.solve(**arguments).energy_kept == pytest.approx(solve(keys, center=True, rank=7).energy_kept, abs=1e-9)


def test_a_mean_that_rounding_made_too_large_takes_no_place_in_the_basis() -> None:
    keys = decaying_keys(2000, 24).double() + 300 * torch.linspace(-1, 1, 24)
    gram = GramAccumulator(24, keys.device)
    gram.add_sums(keys.T @ keys * (1 - 1e-5), keys.sum(0), len(keys))
    basis = gram.solve(rank=7, rank_energy=None, center=True, dtype=torch.float64, iterative=True)
    exact = solve(keys, center=True, rank=7)
    errors = [(b.coefficients(keys) @ b.rows + b.mean - keys).square().sum() for b in (basis, exact)]
    # The direction of the mean itself cannot be told from rounding any more.
    mean = keys.mean(0) / keys.mean(0).norm()
    along_mean = ((keys - keys.mean(0)) @ mean).square().sum()
    assert errors[0] <= 1.01 * errors[1] + along_mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_coefficients_are_as_exact_as_their_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU multiplies, with its product of half-precision matrices in fp32 stood in for."""
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype)))
    keys = decaying_keys(500, 24).add(5).to(dtype)
    basis = solve(keys.float(), center=True, rank=12)
    exact = (keys.double() - basis.mean.double()) @ basis.projection.double()
    coefficients = basis._coefficients_of_half(keys)
    assert coefficients.dtype == torch.float32
    # Relative to the keys' spread: the mean, 5 times as large, cancels exactly.
    error = ((coefficients.double() - exact) @ basis.rows.double()).square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps * float((keys.double() - basis.mean).square().mean().sqrt())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_the_basis_keeps_the_same_energy(dtype: torch.dtype) -> None:
    keys = decaying_keys(3000, 96).cuda().to(dtype)
    exact = solve(keys.float().cpu(), center=True, rank=32)
    basis = solve(keys.float(), center=True, rank=32)
    assert basis.energy_kept == pytest.approx(exact.energy_kept, rel=1e-3)
    rebuilt = basis.coefficients(keys) @ basis.rows + basis.mean
    energy = 1 - float((rebuilt - keys).double().square().sum() / keys.double().square().sum())
    assert energy == pytest.approx(basis.energy_kept, abs=1e-3)
