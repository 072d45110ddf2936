"""Dense symmetric matrices with known spectra, and what eigenpairs of them have to satisfy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hesskern import KroneckerOperator
from hesskern.solvers.result import EigenResult


class Counting:
    """A dense symmetric matrix that shows only its products, and counts them."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = tuple(matrix.shape)
        self.dtype, self.device = matrix.dtype, matrix.device
        self.count = 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.count += 1 if v.dim() == 1 else v.shape[1]
        return self.matrix @ v


def symmetric(spectrum: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense matrix [P, P] with the eigenvalues ``spectrum`` [P] and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = (q * spectrum.double()) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def wanted(matrix: Tensor, k: int, which: str) -> tuple[Tensor, float]:
    values = torch.linalg.eigvalsh(matrix.double())
    key = {"LA": -values, "SA": values, "LM": -values.abs()}[which]
    return values[key.argsort(stable=True)[:k]], float(values.abs().max())


def check(matrix: Tensor, result: EigenResult, k: int, which: str, tol: float) -> None:
    """Values, true residuals, orthonormality; all in float64 from the dense matrix."""
    exact, scale = wanted(matrix, k, which)
    epsilon = torch.finfo(matrix.dtype).eps
    values, vectors = result.values.double(), result.vectors.double()
    assert result.converged
    assert result.values.dtype == result.vectors.dtype == result.residuals.dtype == matrix.dtype
    assert vectors.shape == (len(matrix), k)
    # eigenvalues of equal magnitude and opposite sign may come in either order
    compared = (values.abs(), exact.abs()) if which == "LM" else (values, exact)
    torch.testing.assert_close(*compared, rtol=0, atol=(tol + 20 * epsilon) * scale)
    gram = vectors.T @ vectors
    torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=50 * epsilon)
    fresh = (matrix.double() @ vectors - vectors * values).norm(dim=0)
    assert float(fresh.max()) <= (1.01 * tol + 50 * epsilon) * scale
    if scale > 0:
        # |λ_1| is the solver's own largest Ritz value: exact only where that pair is wanted
        ratio = fresh / scale
        reported = result.residuals.double()
        if which != "SA" and float(exact[0].abs()) == pytest.approx(scale):
            torch.testing.assert_close(reported, ratio, rtol=1e-3, atol=50 * epsilon)
        else:
            assert bool((reported >= ratio - 50 * epsilon).all())


def spectra(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def uniform(n: int) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    def ones(n: int) -> Tensor:
        return torch.ones(n, dtype=torch.float64)

    return {
        "uniform": uniform(size),
        "decaying": 0.9 ** torch.arange(size, dtype=torch.float64),
        "indefinite": 2 * uniform(size) - 1,
        "negative definite": -0.1 - uniform(size),
        "repeated": torch.cat([2 * ones(6), 1.5 * ones(3), uniform(size - 9)]),
        "clustered": torch.cat([1 + 1e-7 * uniform(6), 0.5 * uniform(size - 6)]),
        "rank 3": torch.cat([torch.tensor([3.0, 2.0, 1.0]).double(), 0 * uniform(size - 3)]),
        "rank 1, negative": torch.cat([-ones(1), 0 * uniform(size - 1)]),
        "identity": ones(size),
        "two values": torch.cat([ones(size // 2), -2 * ones(size - size // 2)]),
        "zero": 0 * ones(size),
        "huge": 1e12 * uniform(size),
        "tiny": 1e-12 * uniform(size),
    }


def layer(distance: float) -> tuple[Tensor, KroneckerOperator]:
    """K + distance (H - K) and K = E[M] (x) E[x x^T]; H = E[M (x) x x^T], M and x correlated."""
    generator = torch.Generator().manual_seed(0)
    count, rank, m, d = 600, 4, 16, 40

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(count, d) * 0.8 ** torch.arange(d) + 0.5
    roots = normal(count, rank, m) * 0.8 ** torch.arange(m)
    roots = roots * (1 + x[:, :1, None]) + 0.3 * (x @ normal(d, m))[:, None]
    A = torch.einsum("nci,ncj->ij", roots, roots) / count
    B = x.T @ x / count
    J = torch.einsum("ncm,nd->ncmd", roots, x).flatten(0, 1).flatten(1)
    K = torch.kron(A, B)
    return K + distance * (J.T @ J / count - K), KroneckerOperator(A, B)
