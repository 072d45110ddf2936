"""Eigenpairs of R^T R from the Gram matrix R R^T, where R has few rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gram_eigenpairs"]

# Columns of R that are in float64 at a time.
_COLUMNS = 2**18


def gram_eigenpairs(
    rows: Tensor, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest eigenpairs of R^T R, all with their multiplicity.

    With R R^T u = λ u, R^T u / sqrt(λ) is an eigenvector of R^T R. Those of the eigenvalue zero
    are random directions orthogonal to the others.

    Args:
        rows: R [q, P], q < P.
        k: number of pairs, at most P.
        generator: of the random directions, on the CPU.

    Returns:
        values [k], float64; vectors [P, k], of R's dtype; and their ‖R^T R v - λ v‖ [k], float64.
    """
    pieces = rows.split(_COLUMNS, dim=1)
    values, axes = torch.linalg.eigh(_gram(pieces))
    values, axes = values.flip(0)[:k], axes.flip(1)[:, :k]
    rounding = torch.finfo(rows.dtype).eps * len(rows)
    kept = int((values > rounding * values[0].clamp_min(0)).sum())
    axes = axes[:, :kept] / values[:kept].sqrt()
    size = rows.shape[1]
    others = torch.randn(size, k - kept, generator=generator, dtype=torch.float64)
    vectors = torch.cat([_images(pieces, axes), others.to(rows.device)], 1)
    # Small eigenvalues leave their vectors less orthogonal; signs stay as they were.
    basis, triangle = torch.linalg.qr(vectors)
    vectors = (basis * triangle.diagonal().sign()).to(rows.dtype)
    products = rows.new_zeros(len(rows), k, dtype=torch.float64)
    for piece, part in zip(pieces, vectors.split(_COLUMNS), strict=True):
        products.addmm_(piece.double(), part.double())
    values = products.square().sum(0)
    residuals = (_images(pieces, products) - vectors.double() * values).norm(dim=0)
    return values, vectors, residuals


def _gram(pieces: Sequence[Tensor]) -> Tensor:
    """R R^T [q, q] in float64."""
    total = pieces[0].new_zeros(len(pieces[0]), len(pieces[0]), dtype=torch.float64)
    for piece in pieces:
        wide = piece.double()
        total.addmm_(wide, wide.T)
    return total


def _images(pieces: Sequence[Tensor], axes: Tensor) -> Tensor:
    """R^T axes [P, j] in float64, axes [q, j]."""
    return torch.cat([piece.T.double() @ axes for piece in pieces])
