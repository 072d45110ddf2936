"""Eigenpairs of R^T R from the Gram matrix R R^T, where R has few rows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram_eigenpairs"]


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
    wide = rows.double()
    values, axes = torch.linalg.eigh(wide @ wide.T)
    values, axes = values.flip(0)[:k], axes.flip(1)[:, :k]
    rounding = torch.finfo(rows.dtype).eps * len(rows)
    kept = int((values > rounding * values[0].clamp_min(0)).sum()) if len(values) else 0
    vectors = wide.T @ (axes[:, :kept] / values[:kept].sqrt())
    size = wide.shape[1]
    if kept < k:
        others = torch.randn(size, k - kept, generator=generator, dtype=torch.float64)
        vectors = torch.cat([vectors, others.to(wide.device)], 1)
    # Small eigenvalues leave their vectors less orthogonal; signs stay as they were.
    basis, triangle = torch.linalg.qr(vectors)
    vectors = (basis * triangle.diagonal().sign()).to(rows.dtype)
    images = wide @ vectors.double()
    values = images.square().sum(0)
    residuals = (wide.T @ images - vectors.double() * values).norm(dim=0)
    return values, vectors, residuals
