"""Kronecker products of a diagonal and a matrix, for layers with very many outputs."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hesskern.operators.base import LayerOperator
from hesskern.operators.damping import Damping, Extent, check_invertible, resolved, rounding, said
from hesskern.operators.vectors import check_symmetric, require_finite

__all__ = ["DiagonalKroneckerOperator"]


class DiagonalKroneckerOperator(LayerOperator):
    """diag(a) (x) B: vectors are matrices [m, d] flattened, and K vec(X) = vec(diag(a) X B^T).

    Nothing of shape [m, m] is ever made. Products, solves, trace and diagonal it has, eigenvectors
    it has none: those of diag(a) would be such a matrix.

    Args:
        a: [m] non-negative, e.g. the diagonal of an output Hessian.
        B: [d, d] symmetric, e.g. the input covariance; or [g, d, d], then block diagonal.
        transposed: whether vectors are matrices [d, m] flattened, as the weight is kept.
        name: of the layer, for messages.
        known: whether B is known to be symmetric and a not negative: nobody looks then.

    Raises:
        TypeError: a factor is not a tensor.
        ValueError: shapes, dtypes or devices do not fit; B is not symmetric, or a negative.
    """

    def __init__(
        self,
        a: Tensor,
        B: Tensor,
        *,
        transposed: bool = False,
        name: str | None = None,
        known: bool = False,
    ) -> None:
        for letter, factor in (("a", a), ("B", B)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"{letter} must be a tensor, got {type(factor).__name__}")
        if a.dim() != 1:
            raise ValueError(f"a must be [m], got {list(a.shape)}")
        if B.dim() not in (2, 3) or B.shape[-1] != B.shape[-2]:
            raise ValueError(f"B must be [d, d] or [g, d, d], got {list(B.shape)}")
        if a.dtype != B.dtype or a.device != B.device:
            raise ValueError(
                f"a and B must agree in dtype and device, got {a.dtype} on {a.device} and "
                f"{B.dtype} on {B.device}"
            )
        self.groups = B.shape[0] if B.dim() == 3 else 1
        if len(a) % self.groups:
            raise ValueError(f"B has {self.groups} groups, which do not divide m = {len(a)}")
        if not known:
            check_symmetric("B", B)
            if bool((a < 0).any()):
                raise ValueError(f"a must not be negative, got {float(a.min()):g} in it")
        self.a, self.B, self.name, self.transposed = a, B, name, transposed
        self.layer_shape = (len(a), B.shape[-1])
        self.shape = (len(a) * B.shape[-1],) * 2
        self.dtype, self.device = a.dtype, a.device

    @property
    def _right(self) -> Tensor:
        """[g, d, d]"""
        return self.B if self.B.dim() == 3 else self.B.unsqueeze(0)

    def _by_group(self, rows: Tensor) -> Tensor:
        """[k, g, m/g, d] of rows [k, P]."""
        return rows.reshape(len(rows), self.groups, -1, self.layer_shape[1])

    @property
    def _left(self) -> Tensor:
        """[g, m/g, 1]"""
        return self.a.reshape(self.groups, -1, 1)

    def _matmul(self, block: Tensor) -> Tensor:
        return (self._left * torch.matmul(self._by_group(block), self._right)).flatten(1)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, Extent]:
        """V [g, d, d] of B, the products of its eigenvalues with a [g, m/g, d] in float64, none
        below zero by B's rounding; and their extent.

        What an eigenvalue of B is off by tells of its own size alone: the entries of a are known
        each to its own rounding, and small ones beside large ones are no zeros.

        Raises:
            ValueError: a or B holds NaN or Inf.
        """
        for letter, factor in (("a", self.a), ("B", self.B)):
            if not bool(factor.isfinite().all()):
                raise ValueError(f"{letter} of {said(self.name)} holds NaN or Inf")
        gamma, v = torch.linalg.eigh(self._right.double())
        largest = gamma.abs().amax(1, keepdim=True)
        small = gamma.abs() <= rounding(1.0, self.layer_shape[1], self.dtype) * largest
        values = self._left.double() * gamma.masked_fill(small & (gamma < 0), 0.0).unsqueeze(1)
        rank = int(((self._left != 0).sum((1, 2)) * (~small).sum(1)).sum())
        extent = Extent(float(values.min()), float(values.abs().max()), rank, values.numel())
        return v.to(self.dtype), values, extent

    def solve(self, vectors: Tensor, damping: Damping) -> Tensor:
        """(K + damping I)^-1 times vectors, exact in B's eigenbasis.

        Args:
            vectors: [P] or [P, k].
            damping: a number >= 0, or "mean" for a tenth of the mean eigenvalue.

        Returns:
            the shape of ``vectors``.

        Raises:
            TypeError, ValueError: ``vectors`` do not fit, or hold NaN or Inf; ``damping`` is no
                such number; K + damping I is singular; a factor holds NaN or Inf.
        """
        number = resolved(damping, self.trace(), self.shape[0], self.name)
        v, values, extent = self._eigen
        check_invertible(extent, number, self.dtype, self.name, "solve")
        if extent.least + number <= 0:
            raise ValueError(f"solve needs a damping above {-extent.least:g}, got {number:g}")
        inverse = (values + number).reciprocal().to(self.dtype)

        def solved(rows: Tensor) -> Tensor:
            require_finite([rows], [self.name])
            rotated = torch.matmul(self._by_group(rows), v)
            return torch.matmul(rotated * inverse, v.mT).flatten(1)

        return self._applied(vectors, solved)

    def trace(self) -> float:
        left = self._left.double().sum((1, 2))
        return float((left * self._right.diagonal(dim1=1, dim2=2).double().sum(1)).sum())

    def squared_norm(self) -> float:
        """The squared Frobenius norm."""
        left = self._left.double().square().sum((1, 2))
        return float((left * self._right.double().square().sum((1, 2))).sum())

    def diagonal(self) -> Tensor:
        right = self._right.diagonal(dim1=1, dim2=2).unsqueeze(1)
        return self._outward((self._left * right).reshape(1, -1))[0]
