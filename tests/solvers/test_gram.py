"""Eigenpairs by R R^T where H = R^T R has few rows."""

from __future__ import annotations

import pytest
import torch
from networks import CE, classes, randn, seeded
from tensors import assert_near
from torch import Tensor, nn

import hesskern as hk
from hesskern.operators.layer_hessian import LayerHessian
from hesskern.solvers.gram import gram_eigenpairs


def hessians(dtype: torch.dtype, samples: int = 12, tolerance: float = 0.0) -> list[LayerHessian]:
    """Of a convolution in groups and of a linear layer, 2 root rows a sample."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 20), nn.ReLU(), nn.Linear(20, 3),
    )  # fmt: skip
    data = [(randn(samples, 4, 6, 6, dtype=dtype), classes(samples, c=3))]
    found = hk.layer_hessians(seeded(model).to(dtype), data, CE, tolerance=tolerance)
    return [found[name] for name in ("0", "3")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["LA", "LM"])
@pytest.mark.parametrize("k", [1, 7, 24, 50])
def test_layer_with_few_samples(dtype: torch.dtype, which: str, k: int) -> None:
    for H in hessians(dtype):
        result = hk.eigsh(H, k, which)
        assert result.matvecs == 24
        assert result.converged
        assert result.vectors.dtype == result.values.dtype == dtype
        dense = H.to_dense().double()
        exact = torch.linalg.eigvalsh(dense).flip(0)[:k]
        small = 1e-12 if dtype == torch.float64 else 1e-6
        scale = float(exact[0])
        torch.testing.assert_close(result.values.double(), exact, rtol=0, atol=small * scale)
        vectors = result.vectors.double()
        assert_near(vectors.T @ vectors, torch.eye(k).double(), tolerance=10 * small)
        fresh = (dense @ vectors - vectors * result.values.double()).norm(dim=0) / scale
        assert float(fresh.max()) <= 3 * small


def test_many_samples_and_smallest_values_go_another_way() -> None:
    H = hessians(torch.float64, samples=100)[1]
    assert H.few_rows(199) is None
    assert hk.eigsh(H, 5).matvecs < 200
    few = hessians(torch.float64)[1]
    assert float(hk.eigsh(few, 2, "SA").values.abs().max()) < 1e-6


def test_pruned_part_counts() -> None:
    H = hessians(torch.float64, tolerance=0.05)[1]
    assert H.pruning_error > 0
    rows = H.few_rows(128)
    assert rows is not None
    assert len(rows) < 24
    result = hk.eigsh(H, 3)
    assert float(result.residuals.min()) >= H.pruning_error / float(result.values[0])


def test_limit_of_products() -> None:
    H = hessians(torch.float64)[1]
    assert hk.eigsh(H, 2, max_matvecs=24).matvecs == 24
    with pytest.warns(RuntimeWarning, match="limit of 3 products"):
        assert hk.eigsh(H, 3, max_matvecs=3).matvecs == 3


def test_repeated_and_zero_eigenvalues() -> None:
    rows = torch.zeros(6, 200, dtype=torch.float64)
    rows[0, 3] = rows[1, 8] = rows[2, 9] = 2.0
    values, vectors, residuals = gram_eigenpairs(rows, 8, torch.Generator().manual_seed(0))
    assert values[:3].tolist() == [4.0, 4.0, 4.0]
    assert float(values[3:].abs().max()) < 1e-20
    assert_near(vectors.T @ vectors, torch.eye(8).double())
    assert float(residuals.max()) < 1e-12
    values, vectors, _ = gram_eigenpairs(0 * rows, 3, torch.Generator().manual_seed(0))
    assert float(values.abs().max()) == 0.0
    assert_near(vectors.T @ vectors, torch.eye(3).double())


def test_columns_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = randn(6, 200)
    whole = gram_eigenpairs(rows, 8, torch.Generator().manual_seed(0))
    monkeypatch.setattr("hesskern.solvers.gram._COLUMNS", 37)
    for part, expected in zip(
        gram_eigenpairs(rows, 6, torch.Generator().manual_seed(0)), whole, strict=True
    ):
        torch.testing.assert_close(part.abs(), expected[..., :6].abs(), rtol=1e-8, atol=1e-10)


class Rows:
    """R^T R of five rows."""

    shape, dtype, device = (200, 200), torch.float64, torch.device("cpu")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def few_rows(self, limit: int) -> Tensor | None:
        return self.rows if len(self.rows) <= limit else None

    def __matmul__(self, block: Tensor) -> Tensor:
        return self.rows.T @ (self.rows @ block)


def test_not_finite() -> None:
    rows = randn(5, 200)
    assert hk.eigsh(Rows(rows), 2).matvecs == 5
    rows[2, 4] = float("nan")
    with pytest.raises(ValueError, match="H: H @ v must be finite"):
        hk.eigsh(Rows(rows), 2)
