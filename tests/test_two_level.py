"""A Hessian split into its heavy samples and the rest, and eigenpairs by way of the split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk
from hesskern.layer_hessian import LayerHessian
from hesskern.split import Split
from hesskern.two_level import two_level

CE = nn.CrossEntropyLoss()


def heavy_tailed(n: int, d: int, seed: int, spread: float = 2.5) -> list[tuple[Tensor, Tensor]]:
    """Three batches whose samples have very different norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = x * (spread * torch.randn(n, 1, generator=generator, dtype=torch.float64)).exp()
    x = x / x.norm(dim=1).max()
    y = torch.randint(5, (n,), generator=generator)
    return [(x[i::3], y[i::3]) for i in range(3)]


def layer(
    n: int = 600,
    d: int = 60,
    seed: int = 0,
    spread: float = 2.5,
    dtype: torch.dtype = torch.float64,
) -> LayerHessian:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(d, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)
    data = [(x.to(dtype), y) for x, y in heavy_tailed(n, d, seed, spread)]
    return hk.layer_hessians(model, data, CE)["0"]


def test_parts_sum_to_the_whole() -> None:
    H = layer()
    before = H.to_dense()
    split = H.split()
    assert split is not None
    heavy, light = split.heavy.to_dense(), split.light.to_dense()
    torch.testing.assert_close(heavy + light, before, rtol=1e-12, atol=1e-15)
    # The order of the samples changed, nothing else.
    torch.testing.assert_close(H.to_dense(), before, rtol=1e-12, atol=1e-15)
    assert 0 < split.share <= 0.25
    values = torch.linalg.eigvalsh(light)
    assert float(values[0]) >= -1e-15
    assert float(values[-1]) <= split.bound
    assert float(light.trace()) <= 3.0001e-3 * float(before.trace())
    again = H.split()
    assert again is not None
    torch.testing.assert_close(again.heavy.to_dense(), heavy, rtol=1e-12, atol=1e-15)


def test_no_split_where_all_samples_count() -> None:
    assert layer(spread=0.0).split() is None


def test_no_split_where_samples_are_not_stored() -> None:
    model = nn.Sequential(nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 5)).double()
    H = hk.layer_hessians(model, heavy_tailed(600, 60, 0), CE, memory_budget=0)["0"]
    assert H.split() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_those_of_the_dense_matrix(seed: int, k: int, dtype: torch.dtype) -> None:
    H = layer(seed=seed, dtype=dtype)
    dense = H.to_dense().double()
    result = hk.eigsh(H, k, method="split")
    expected = torch.linalg.eigvalsh(dense).flip(0)[:k]
    scale = float(expected[0])
    assert result.converged
    assert float((result.values.double() - expected).abs().max()) <= 1e-4 * scale
    vectors = result.vectors.double()
    true = (dense @ vectors - vectors * result.values.double()).norm(dim=0) / scale
    rounding = 1e-12 if dtype == torch.float64 else 2e-6
    assert bool((true <= result.residuals.double() + rounding).all())
    assert float(result.residuals.max()) <= 1e-4
    torch.testing.assert_close(
        vectors.T @ vectors, torch.eye(k).double(), rtol=0, atol=1e-10 if rounding < 1e-8 else 1e-4
    )


def test_fewer_products_than_lanczos() -> None:
    H = layer(n=3000, spread=3.0)
    split_first, plain = hk.eigsh(H, 8, method="split"), hk.eigsh(H, 8)
    assert split_first.matvecs < plain.matvecs
    torch.testing.assert_close(split_first.values, plain.values, rtol=0, atol=1e-4)


def solve(operator: object, k: int, tol: float) -> hk.EigenResult:
    return hk.eigsh(operator, k, tol=tol)


def dense_split(decay: float, light: float, seed: int = 0, size: int = 300) -> tuple[Tensor, Split]:
    """H with eigenvalues decay^i, of which a random positive semi-definite part is light."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    heavy = (q * decay ** torch.arange(size)) @ q.T
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rest = root @ root.T
    rest = rest * (light / torch.linalg.eigvalsh(rest)[-1])
    return heavy + rest, Split(heavy, rest, 0.1, light)


@pytest.mark.parametrize("light", [1e-6, 1e-4, 3e-3])
@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_rounds_until_the_bound_suffices(light: float, tol: float) -> None:
    H, split = dense_split(0.6, light)
    result = two_level(split, 5, tol, solve)
    assert result is not None
    residuals = (H @ result.vectors - result.vectors * result.values).norm(dim=0)
    residuals = residuals / result.values[0]
    assert float(result.residuals.max()) <= tol
    assert bool((residuals <= result.residuals + 1e-12).all())
    expected = torch.linalg.eigvalsh(H).flip(0)[:5]
    assert float((result.values - expected).abs().max()) <= tol


def test_rest_as_large_as_the_gaps_is_refused() -> None:
    # The rest could bring up eigenvalues from behind the wanted ones.
    _, split = dense_split(0.97, 0.3)
    assert two_level(split, 10, 1e-4, solve) is None


def test_repeated_eigenvalues() -> None:
    size = 400
    values = torch.full((size,), 1e-3, dtype=torch.float64)
    values[:6] = 1.0
    values[6:9] = 0.5
    q = torch.linalg.qr(
        torch.randn(size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    )[0]
    heavy = (q * values) @ q.T
    split = Split(heavy, 1e-5 * torch.eye(size, dtype=torch.float64), 0.1, 1e-5)
    result = two_level(split, 9, 1e-6, solve)
    assert result is not None
    torch.testing.assert_close(result.values, values[:9] + 1e-5, rtol=0, atol=1e-6)


def test_method_is_checked() -> None:
    with pytest.raises(ValueError, match="method must be 'lanczos' or 'split', got 'fast'"):
        hk.eigsh(torch.eye(4), 1, method="fast")
