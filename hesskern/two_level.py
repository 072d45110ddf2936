"""Eigenpairs of H = T + E from many products with a cheap part T and few with the small rest E.

The leading eigenvectors V of T span nearly the wanted space. With E V known, E is replaced by its
Nyström approximation F = E V (V^T E V)^+ V^T E, which is exact on V, positive semi-definite, and at
most E. Eigenvectors v of T + F are then those of H up to

    ‖(H - T - F) v‖ <= ‖(E - F) V‖ ‖V^T v‖ + ‖E‖ ‖v - V V^T v‖,

of second order in E, and bounded without another product by what is known of ‖E‖. Where the bound
does not suffice, E v is computed: the residual is then exact, and V grows by v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.results import EigenResult
from hesskern.split import Split
from hesskern.subspace import SymmetricOperator

__all__ = ["two_level"]

Solve = Callable[[SymmetricOperator, int, float], EigenResult]
"""(operator, number of pairs, tolerance) to its leading eigenpairs."""

_ROUNDS = 3
# Relative to the largest, below which an eigenvalue of V^T E V counts as zero.
_RANK = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass
class _Corrected:
    """T + F.

    Attributes:
        split: H = T + E.
        vectors: V [P, b], orthonormal.
        images: E V [P, b].
    """

    split: Split
    vectors: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        heavy = self.split.heavy
        self.shape, self.dtype, self.device = heavy.shape, heavy.dtype, heavy.device
        gram = (self.vectors.T @ self.images).double()
        values, axes = torch.linalg.eigh((gram + gram.T) / 2)
        kept = values > _RANK[self.dtype] * values[-1].clamp_min(0)
        axes, values = axes[:, kept], values[kept]
        # F = root root^T
        self._root = self.images @ (axes / values.sqrt()).to(self.dtype)
        rest = self.images - self._root @ (self._root.T @ self.vectors)
        self._unexplained = float(rest.double().norm())

    def __matmul__(self, block: Tensor) -> Tensor:
        return self.split.heavy @ block + self._root @ (self._root.T @ block)

    def error(self, vectors: Tensor) -> Tensor:
        """[k] bounds on ‖(E - F) v‖ for orthonormal vectors [P, k]."""
        inside = self.vectors.T @ vectors
        outside = (vectors - self.vectors @ inside).double().norm(dim=0)
        return self._unexplained * inside.double().norm(dim=0) + self.split.bound * outside

    def extended(self, vectors: Tensor, images: Tensor) -> _Corrected:
        """With further vectors [P, j] and their E V [P, j]."""
        inside = self.vectors.T @ vectors
        rest = vectors - self.vectors @ inside
        # Twice: the vectors lie nearly in the span.
        more = self.vectors.T @ rest
        rest, inside = rest - self.vectors @ more, inside + more
        images = images - self.images @ inside
        left, sizes, right = torch.linalg.svd(rest.double(), full_matrices=False)
        kept = sizes > 1e-5 * sizes.max().clamp_min(torch.finfo(torch.float64).tiny)
        scaled = (right[kept].T / sizes[kept]).to(self.dtype)
        return _Corrected(
            self.split,
            torch.cat([self.vectors, left[:, kept].to(self.dtype)], 1),
            torch.cat([self.images, images @ scaled], 1),
        )


def two_level(split: Split, k: int, tol: float, solve: Solve) -> EigenResult | None:
    """The ``k`` largest eigenpairs of ``split.heavy + split.light``.

    Args:
        split: H in two parts.
        k: number of pairs.
        tol: bound on every residual ‖H v - λ v‖ / λ_1.
        solve: finds the leading eigenpairs of an operator, none missing.

    Returns:
        the result, with ``matvecs`` counting products with H (a product with a part counts as the
        part of H that it costs), or None where this way does not lead there: the rest is too large
        for the gaps between the eigenvalues, or the rounds were used up.
    """
    size = int(split.heavy.shape[0])
    wanted = k + max(6, k // 4)
    if 2 * wanted > size:
        return None
    first = solve(split.heavy, wanted, max(tol, min(10 * tol, 1e-3)))
    scale = float(first.values[0])
    if not first.converged or scale <= 0:
        return None
    # At most `wanted` eigenvalues of H lie above this one of T plus the norm of the rest.
    if float(first.values[-1]) + split.bound > float(first.values[k - 1]):
        return None
    cost = split.share * first.matvecs + (1 - split.share) * wanted
    corrected = _Corrected(split, first.vectors, split.light @ first.vectors)
    for _ in range(_ROUNDS):
        result = solve(corrected, k, 0.5 * tol)
        cost += split.share * result.matvecs
        if not result.converged:
            return None
        scale = float(result.values[0])
        bounds = result.residuals.double() + corrected.error(result.vectors) / scale
        open_pairs = bounds > tol
        if bool(open_pairs.any()):
            vectors = result.vectors[:, open_pairs]
            images = split.light @ vectors
            cost += (1 - split.share) * vectors.shape[1]
            residuals = split.heavy @ vectors + images - vectors * result.values[open_pairs]
            cost += split.share * vectors.shape[1]
            bounds[open_pairs] = residuals.double().norm(dim=0) / scale
            if bool((bounds > tol).any()):
                corrected = corrected.extended(vectors, images)
                continue
        return EigenResult(
            result.values, result.vectors, bounds.to(result.vectors), True, round(cost)
        )
    return None
