"""Symmetric matrices over a layer's weight that a Kronecker eigenbasis makes diagonal."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesskern import ops
from hesskern.operators.base import LayerOperator
from hesskern.operators.damping import (
    Damping,
    Extent,
    check_invertible,
    resolved,
    rounding,
    said,
    settled,
)
from hesskern.operators.vectors import draws, require_finite
from hesskern.ops import foreach

if TYPE_CHECKING:
    from hesskern.solvers.result import EigenResult

__all__ = ["CorrectedOperator", "EigenbasisOperator"]


class EigenbasisOperator(LayerOperator):
    """A symmetric matrix that is diagonal in a Kronecker eigenbasis u_i (x) v_j.

    Attributes:
        layer_shape: (m, d); vectors are such matrices, flattened.
        groups: with groups the matrix is block diagonal.

    Of the methods that take a damping: it is added to every eigenvalue, a number >= 0 or "mean" for
    a tenth of the mean eigenvalue, tr(K) / P. Eigenvalues below zero by no more than rounding
    (eps n times the largest, n the size of the factor they come from) count as zero; without
    damping those within rounding make the matrix singular, and what needs an inverse is refused.
    """

    groups: int

    @property
    @abstractmethod
    def eigenbases(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group: U [m/g, m/g] and V [d, d], orthogonal, and the eigenvalues S [m/g, d]."""

    def squared_norm(self) -> float:
        """The squared Frobenius norm, the sum of S²."""
        return sum(float(s.double().square().sum()) for s in self.eigenbases[2])

    def _scaled(self, factor: float) -> EigenbasisOperator:
        return CorrectedOperator(self, factor * torch.cat(self.eigenbases[2]))

    def _blocks(self, block: Tensor) -> list[Tensor]:
        """[k, P] or [k, m, d] -> per group [k, m/g, d]."""
        m, d = self.layer_shape
        shaped = block.reshape(len(block), self.groups, m // self.groups, d)
        return list(shaped.unbind(1))

    @staticmethod
    def _joined(blocks: list[Tensor]) -> Tensor:
        return torch.stack(blocks, 1).flatten(1)

    @cached_property
    def _settled(self) -> tuple[list[Tensor], Extent]:
        """Per group the eigenvalues S [m/g, d], none below zero by rounding; and their extent."""
        return settled(self.eigenbases[2], self.name)

    def _eigenvalues(self) -> Iterable[Tensor]:
        """The settled eigenvalues in float64, group by group."""
        return (s.double() for s in self._settled[0])

    @cached_property
    def _trace(self) -> float:
        return self.trace()

    def _damping(self, damping: Damping, name: str | None) -> float:
        # The trace is a reading of the device's memory.
        trace = self._trace if damping == "mean" else 0.0
        return resolved(damping, trace, self.shape[0], name)

    @property
    def settled(self) -> list[Tensor]:
        """Per group the eigenvalues S [m/g, d], those below zero by rounding being zero."""
        return self._settled[0]

    def _require_invertible(self, damping: float, what: str, name: str | None) -> None:
        """Raises ValueError unless K + damping has an inverse in K's dtype."""
        extent = self._settled[1]
        check_invertible(extent, damping, self.dtype, name, what)
        if extent.least >= 0:
            return
        for s in self._eigenvalues():
            nearest = float((s + damping).abs().min())
            if nearest <= rounding(extent.largest, max(s.shape), self.dtype):
                raise ValueError(
                    f"{what} needs another damping: {said(name)} has an eigenvalue within rounding "
                    f"of {-damping:g}"
                )

    def require_positive(self, damping: float, what: str, name: str | None) -> None:
        """Raises ValueError unless all eigenvalues of K + damping are positive."""
        extent = self._settled[1]
        # The least of an indefinite matrix is known to rounding alone.
        within = torch.finfo(self.dtype).eps * extent.largest if extent.least < 0 else 0.0
        if extent.least + damping < within:
            raise ValueError(
                f"{what} needs positive eigenvalues, but the least of {said(name)} is "
                f"{extent.least:.3g} (largest {extent.largest:.3g}) and the damping {damping:g}: "
                f"give one above {-extent.least:.3g}"
            )
        check_invertible(extent, damping, self.dtype, name, what)

    def solve(self, vectors: Tensor, damping: Damping) -> Tensor:
        """(K + damping I)^-1 times vectors, exact in K's eigenbasis: two products of its size.

        Args:
            vectors: [P] or [P, k].
            damping: a number >= 0, or "mean".

        Returns:
            the shape of ``vectors``.

        Raises:
            TypeError, ValueError: ``vectors`` do not fit, as in ``K @ vectors``, or hold NaN or
                Inf; ``damping`` is no such number; K + damping I is singular.
        """
        number = self._damping(damping, self.name)
        self._require_invertible(number, "solve", self.name)
        values = self._settled[0]

        def inverse(rows: Tensor) -> Tensor:
            require_finite([rows], [self.name])
            left, right, _ = self.eigenbases
            scale = foreach.inverse_shifted(values, [number] * len(values))
            return self._joined(
                ops.grouped_kron_eigen_matmul(left, scale, right, self._blocks(rows))
            )

        return self._applied(vectors, inverse)

    def power(self, p: float, damping: Damping = 0.0) -> EigenbasisOperator:
        """(K + damping I)^p, e.g. p = -1 for the inverse, -1/2 for its root, 1/2 for K's.

        Args:
            p: any finite number; 0 is the identity.
            damping: a number >= 0, or "mean".

        Returns:
            an operator with K's eigenvectors. Its eigenvalues are computed in float64.

        Raises:
            TypeError, ValueError: an argument is no such number; an eigenvalue is negative where
                p is no integer, or zero where p is negative; the result passes K's dtype.
        """
        return self._power(p, damping, self.name)

    def _power(self, p: float, damping: Damping, name: str | None) -> EigenbasisOperator:
        if isinstance(p, bool) or not isinstance(p, Real):
            raise TypeError(f"p must be a number, got {type(p).__name__}")
        if not abs(p) < math.inf:
            raise ValueError(f"p must be finite, got {float(p):g}")
        p, number = float(p), self._damping(damping, name)
        what = f"power({p:g})"
        if not p.is_integer() and self._settled[1].least + number < 0:
            self.require_positive(number, what, name)
        if p < 0:
            self._require_invertible(number, what, name)
        powers = [(s + number).pow(p).to(self.dtype) for s in self._eigenvalues()]
        if not all(bool(s.isfinite().all()) for s in powers):
            raise ValueError(
                f"{what} of {said(name)} passes the range of {self.dtype}: its eigenvalues reach "
                f"from {self._settled[1].least:.3g} to {self._settled[1].largest:.3g}, with "
                f"{number:g} added"
            )
        return CorrectedOperator(self, torch.cat(powers))

    def logdet(self, damping: Damping) -> float:
        """log det(K + damping I), the sum of logarithms in float64.

        Args:
            damping: a number >= 0, or "mean".

        Raises:
            TypeError, ValueError: ``damping`` is no such number; an eigenvalue of K + damping I is
                not positive.
        """
        return self._logdet(damping, self.name)

    def _logdet(self, damping: Damping, name: str | None) -> float:
        number = self._damping(damping, name)
        self.require_positive(number, "logdet", name)
        return float(sum((s + number).log().sum() for s in self._eigenvalues()))

    def sample(self, n: int, damping: Damping, generator: torch.Generator | None = None) -> Tensor:
        """n draws from N(0, (K + damping I)^-1): (U (x) V) diag(S + damping)^-1/2 z, z standard.

        Args:
            n: number of draws.
            damping: a number >= 0, or "mean".
            generator: on any device; the same one gives the same draws. None: torch's own.

        Returns:
            [P, n], one draw a column.

        Raises:
            TypeError, ValueError: an argument is no such number; an eigenvalue of K + damping I is
                not positive.
        """
        scale = self._roots(damping, "sample", self.name)
        with torch.inference_mode(False), torch.no_grad():
            drawn = draws(n, scale, generator)
            left, right, _ = self.eigenbases
            rows = self._joined(ops.grouped_kron_matmul(left, right, drawn))
            return self._outward(rows).T

    def _roots(self, damping: Damping, what: str, name: str | None) -> list[Tensor]:
        """Per group (S + damping)^-1/2 [m/g, d]."""
        number = self._damping(damping, name)
        self.require_positive(number, what, name)
        return [(s + number).rsqrt().to(self.dtype) for s in self._eigenvalues()]

    def eigsh(self, k: int) -> EigenResult:
        """The k largest eigenpairs: the largest entries of S, u (x) v.

        Raises:
            ValueError: k is not in [1, P].
        """
        from hesskern.solvers.result import EigenResult

        if not 1 <= k <= self.shape[0]:
            raise ValueError(f"k must lie in [1, {self.shape[0]}], got {k}")
        left, right, products = self.eigenbases
        flat = torch.cat([s.flatten() for s in products])
        values, index = flat.topk(k)
        m, d = left[0].shape[0], right[0].shape[0]
        group = index // (m * d)
        row, column = index % (m * d) // d, index % d
        u = torch.stack(left)[group, :, row]
        v = torch.stack(right)[group, :, column]
        vectors = torch.zeros(k, self.groups, m, d, dtype=self.dtype, device=self.device)
        vectors[torch.arange(k, device=self.device), group] = u.unsqueeze(2) * v.unsqueeze(1)
        vectors = self._outward(vectors.flatten(1)).T
        scale = flat.abs().max().clamp(min=torch.finfo(self.dtype).tiny)
        residuals = (self @ vectors - vectors * values).norm(dim=0) / scale
        return EigenResult(values, vectors, residuals, True, 0)

    def solve_shifted(self, vectors: Tensor, shifts: Tensor, floor: float = 1e-3) -> Tensor:
        """(K - shift_j I)^-1 vectors_j in K's eigenbasis, guarded away from its poles.

        Args:
            vectors: [P, k].
            shifts: [k].
            floor: differences smaller than ``floor * |shift|`` are moved out to it, sign kept; for
                shifts near zero |shift| counts as the rounding of K's largest eigenvalue.

        Returns:
            [P, k].
        """
        left, right, products = self.eigenbases
        blocks = self._blocks(self._inward(vectors.T.contiguous()))
        theta = shifts.to(self.dtype).reshape(-1, 1, 1)
        info = torch.finfo(self.dtype)
        largest = torch.stack([s.abs().max() for s in products]).max()
        gap = (floor * torch.maximum(theta.abs(), info.eps * largest)).clamp(min=info.tiny)
        rotated = ops.grouped_kron_matmul([u.T for u in left], [v.T for v in right], blocks)
        scaled = []
        for y, s in zip(rotated, products, strict=True):
            difference = s - theta
            sign = torch.where(difference >= 0, 1.0, -1.0).to(self.dtype)
            scaled.append(y / (sign * torch.maximum(difference.abs(), gap)))
        return self._outward(self._joined(ops.grouped_kron_matmul(left, right, scaled))).T


class CorrectedOperator(EigenbasisOperator):
    """(U (x) V) diag(S) (U (x) V)^T, with any S in place of an outer product of eigenvalues.

    Args:
        like: gives the eigenbases, shape and groups.
        values: S [m, d].

    Raises:
        ValueError: ``values`` is of another shape than the layer.
    """

    def __init__(self, like: EigenbasisOperator, values: Tensor) -> None:
        if tuple(values.shape) != like.layer_shape:
            raise ValueError(
                f"values must be [m, d] = {list(like.layer_shape)}, got {list(values.shape)}"
            )
        left, right, _ = like.eigenbases
        self._take(left, right, values.to(like.dtype), like.transposed, like.name)

    @classmethod
    def of_bases(
        cls,
        left: list[Tensor],
        right: list[Tensor],
        values: Tensor,
        *,
        transposed: bool = False,
        name: str | None = None,
    ) -> CorrectedOperator:
        """The operator of eigenvectors that are known.

        Args:
            left, right: per group, U [m/g, m/g] and V [d, d], orthogonal.
            values: S [m, d] of their dtype, which is kept and not copied.
            transposed: whether the weight is kept as [d, m].
            name: of the layer, for messages.

        Raises:
            ValueError: the shapes do not fit.
        """
        m, d = sum(len(u) for u in left), len(right[0])
        if len(left) != len(right) or tuple(values.shape) != (m, d):
            raise ValueError(
                f"values must be [m, d] = {[m, d]} with as many U as V, got {list(values.shape)}, "
                f"{len(left)} U and {len(right)} V"
            )
        found = cls.__new__(cls)
        found._take(left, right, values, transposed, name)
        return found

    def _take(
        self,
        left: list[Tensor],
        right: list[Tensor],
        values: Tensor,
        transposed: bool,
        name: str | None,
    ) -> None:
        self.layer_shape, self.groups = (values.shape[0], values.shape[1]), len(left)
        self.transposed, self.name = transposed, name
        self.shape = (values.numel(), values.numel())
        self.dtype, self.device = values.dtype, values.device
        self._left, self._right = left, right
        self.values = values

    @property
    def eigenbases(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group: U [m/g, m/g], V [d, d] and the eigenvalues S [m/g, d]."""
        step = self.layer_shape[0] // self.groups
        return self._left, self._right, list(self.values.split(step))

    def _matmul(self, block: Tensor) -> Tensor:
        left, right, values = self.eigenbases
        return self._joined(ops.grouped_kron_eigen_matmul(left, values, right, self._blocks(block)))

    def _scaled(self, factor: float) -> CorrectedOperator:
        return CorrectedOperator(self, factor * self.values)

    def trace(self) -> float:
        return float(self.values.double().sum())

    def diagonal(self) -> Tensor:
        parts = [u.square() @ s @ v.square().T for u, v, s in zip(*self.eigenbases, strict=True)]
        return self._outward(torch.cat([part.flatten() for part in parts]))
