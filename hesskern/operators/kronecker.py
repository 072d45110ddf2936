"""Kronecker products as operators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesskern import ops
from hesskern.operators.damping import Damping, Extent, resolved, rounding, said
from hesskern.operators.decompositions import Eigenpairs, eigenpairs
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.operators.vectors import check_symmetric

__all__ = ["KroneckerOperator", "decompose"]


class KroneckerOperator(EigenbasisOperator):
    """A (x) B, row-major: vectors are matrices [m, d] flattened, and K vec(X) = vec(A X B^T).

    With groups K is block diagonal: block i is A_ii (x) B_i, A_ii the i-th diagonal block of A.

    Args:
        A: [m, m] symmetric, e.g. the output Hessian.
        B: [d, d] symmetric, e.g. the input covariance; or [g, d, d].
        transposed: whether vectors are matrices [d, m] flattened, as the weight is kept: the matrix
            is then B (x) A.
        name: of the layer, for messages.

    Raises:
        TypeError: a factor is not a tensor.
        ValueError: a factor is not square or not symmetric, dtypes or devices differ, or g does
            not divide m.
    """

    def __init__(
        self, A: Tensor, B: Tensor, *, transposed: bool = False, name: str | None = None
    ) -> None:
        for letter, factor in (("A", A), ("B", B)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"{letter} must be a tensor, got {type(factor).__name__}")
        if A.dim() != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"A must be [m, m], got {list(A.shape)}")
        if B.dim() not in (2, 3) or B.shape[-1] != B.shape[-2]:
            raise ValueError(f"B must be [d, d] or [g, d, d], got {list(B.shape)}")
        if A.dtype != B.dtype or A.device != B.device:
            raise ValueError(
                f"A and B must agree in dtype and device, got {A.dtype} on {A.device} and "
                f"{B.dtype} on {B.device}"
            )
        groups = B.shape[0] if B.dim() == 3 else 1
        if A.shape[0] % groups:
            raise ValueError(f"B has {groups} groups, which do not divide m = {A.shape[0]}")
        check_symmetric("A", A)
        check_symmetric("B", B)
        self._take(A, B, transposed, name)

    @classmethod
    def of_symmetric(
        cls, A: Tensor, B: Tensor, *, transposed: bool = False, name: str | None = None
    ) -> KroneckerOperator:
        """The same of factors that are known to fit, which nobody looks at (nor waits for)."""
        found = cls.__new__(cls)
        found._take(A, B, transposed, name)
        return found

    def _take(self, A: Tensor, B: Tensor, transposed: bool, name: str | None) -> None:
        self.A, self.B = A, B
        self.name = name
        self.groups = B.shape[0] if B.dim() == 3 else 1
        self.transposed = transposed
        self.layer_shape = (A.shape[0], B.shape[-1])
        size = A.shape[0] * B.shape[-1]
        self.shape = (size, size)
        self.dtype, self.device = A.dtype, A.device
        self._cut()

    def _cut(self) -> None:
        """The factors of every group, in the memory of A and B."""
        step = self.A.shape[0] // self.groups
        self._left = [
            self.A[i * step : (i + 1) * step, i * step : (i + 1) * step] for i in range(self.groups)
        ]
        self._right = list(self.B) if self.B.dim() == 3 else [self.B]

    def __getstate__(self) -> dict[str, Any]:
        # Every view would take the whole of its factor with it.
        return {k: v for k, v in self.__dict__.items() if k not in ("_left", "_right")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cut()

    @property
    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per group: the block A_ii [m/g, m/g] and B_i [d, d], in the memory of A and B."""
        return self._left, self._right

    def of_rows(self, rows: Tensor) -> Tensor:
        """[k, P] products with rows [k, P] of matrices [m, d], output first whatever the weight."""
        return self._matmul(rows)

    def _matmul(self, block: Tensor) -> Tensor:
        return self._joined(ops.grouped_kron_matmul(self._left, self._right, self._blocks(block)))

    @cached_property
    def _pairs(self) -> tuple[list[Eigenpairs], list[Eigenpairs]]:
        """Per group the eigenvalues, in float64, and eigenvectors of A and of B."""
        decompose([self], [self.name])
        return self.__dict__["_pairs"]

    @cached_property
    def eigenbases(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group: eigenvectors U [m/g, m/g] of A and V [d, d] of B, and the products of their
        eigenvalues S [m/g, d]; ascending along both axes."""
        left, right = self._pairs
        values = [
            torch.outer(tau, gamma).to(self.dtype)
            for (tau, _), (gamma, _) in zip(left, right, strict=True)
        ]
        return [u for _, u in left], [v for _, v in right], values

    @cached_property
    def _factor_values(self) -> tuple[list[tuple[Tensor, Tensor]], Extent, bool]:
        """Per group the factors' eigenvalues in float64, none below zero by rounding; the extent of
        their products, and whether there was any."""
        eps = torch.finfo(self.dtype).eps
        settled, numbers = [], []
        for (tau, _), (gamma, _) in zip(*self._pairs, strict=True):
            pair = []
            for values in (tau, gamma):
                small = values.abs() <= eps * len(values) * values.abs().max()
                clamped = values.masked_fill(small & (values < 0), 0.0)
                # The ends, how many are beyond rounding, and whether one was moved.
                ends = clamped[0], clamped[-1]
                moved = (clamped != values).any()
                numbers += [n.double() for n in (*ends, (~small).sum(), moved)]
                pair.append(clamped)
            settled.append((pair[0], pair[1]))
        least, largest, rank, any_moved = math.inf, 0.0, 0, False
        for row in torch.stack(numbers).reshape(-1, 8).tolist():
            low, high, beyond, moved_left, other_low, other_high, others, moved_right = row
            corners = [a * b for a in (low, high) for b in (other_low, other_high)]
            least = min(least, *corners)
            largest = max(largest, *map(abs, corners))
            rank += int(beyond) * int(others)
            any_moved = any_moved or bool(moved_left or moved_right)
        return settled, Extent(least, largest, rank, self.shape[0]), any_moved

    @cached_property
    def _settled(self) -> tuple[list[Tensor], Extent]:
        _, extent, moved = self._factor_values
        # The same memory wherever it serves.
        values = [s.to(self.dtype) for s in self._eigenvalues()] if moved else self.eigenbases[2]
        return values, extent

    def _eigenvalues(self) -> Iterator[Tensor]:
        return (torch.outer(tau, gamma) for tau, gamma in self._factor_values[0])

    def _scaled(self, factor: float) -> KroneckerOperator:
        scaled = KroneckerOperator.of_symmetric(
            factor * self.A, self.B, transposed=self.transposed, name=self.name
        )
        if "_pairs" in self.__dict__ and factor > 0:
            left, right = self._pairs
            scaled._pairs = [(factor * tau, u) for tau, u in left], right
        return scaled

    def trace(self) -> float:
        return float(
            sum(
                a.diagonal().double().sum() * b.diagonal().double().sum()
                for a, b in zip(self._left, self._right, strict=True)
            )
        )

    def squared_norm(self) -> float:
        """‖A (x) B‖_F² = ‖A‖_F² ‖B‖_F², summed over groups."""
        return float(
            sum(
                a.double().square().sum() * b.double().square().sum()
                for a, b in zip(self._left, self._right, strict=True)
            )
        )

    def diagonal(self) -> Tensor:
        parts = [
            torch.outer(a.diagonal(), b.diagonal()).flatten()
            for a, b in zip(self._left, self._right, strict=True)
        ]
        return self._outward(torch.cat(parts))

    def to_dense(self) -> Tensor:
        pairs = zip(self._left, self._right, strict=True)
        # torch's own wants views that not all strides have.
        blocks = (torch.kron(a.contiguous(), b.contiguous()) for a, b in pairs)
        return self._outward_matrix(torch.block_diag(*blocks))

    def factored_inverse(self, damping: Damping) -> KroneckerOperator:
        """K-FAC's inverse: the damping goes into both factors, and the result has two again.

        (A + pi sqrt(damping) I)^-1 (x) (B + sqrt(damping) / pi I)^-1 with
        pi^2 = (tr A / m) / (tr B / d), group by group (Martens & Grosse 2015, section 6.3). It is
        no inverse of K + damping I, which :meth:`solve` gives, but that of a matrix which is larger
        by pi sqrt(damping) I (x) B + A (x) sqrt(damping) / pi I.

        Args:
            damping: a number >= 0, or "mean" for a tenth of K's mean eigenvalue.

        Returns:
            with factors in K's dtype, inverted in float64. A block of zero trace has pi = 1.

        Raises:
            TypeError, ValueError: ``damping`` is no such number; a factor is not positive definite
                with its share of it, or not finite.
        """
        return self._factored_inverse(damping, self.name)

    def _factored_inverse(self, damping: Damping, name: str | None) -> KroneckerOperator:
        root = resolved(damping, self.trace(), self.shape[0], name) ** 0.5
        left, right = [], []
        for a, b in zip(self._left, self._right, strict=True):
            a, b = a.double(), b.double()
            share, other = _mean_diagonal(a), _mean_diagonal(b)
            pi = (share / other) ** 0.5 if share > 0 and other > 0 else 1.0
            left.append(self._inverse(f"A of {said(name)}", a, root * pi))
            right.append(self._inverse(f"B of {said(name)}", b, root / pi))
        A = torch.block_diag(*left)
        B = torch.stack(right) if self.B.dim() == 3 else right[0]
        return KroneckerOperator.of_symmetric(A, B, transposed=self.transposed, name=self.name)

    def _inverse(self, what: str, factor: Tensor, shift: float) -> Tensor:
        """(factor + shift I)^-1 of a float64 factor, in K's dtype."""
        if shift > 0:
            eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            root, info = torch.linalg.cholesky_ex(factor + shift * eye)
            inverse = torch.cholesky_inverse(root).to(self.dtype)
            if not bool(info) and bool(inverse.isfinite().all()):
                return ((inverse + inverse.T) / 2).contiguous()
        if not bool(factor.isfinite().all()):
            raise ValueError(f"{what} holds NaN or Inf, and has no inverse")
        values, vectors = torch.linalg.eigh(factor)
        within = rounding(float(values.abs().max()), len(values), self.dtype)
        least = float(values[0])
        if least < -within and least + shift <= 0:
            raise ValueError(
                f"factored_inverse needs positive definite factors, but {what} has the eigenvalue "
                f"{least:.3g}, and {shift:.3g} is added to it: give a larger damping"
            )
        if shift == 0 and least <= within:
            raise ValueError(
                f"factored_inverse needs damping > 0: {what} is singular, of rank "
                f"{int((values > within).sum())} of {len(values)} to {self.dtype}'s rounding"
            )
        shifted = torch.where(values.abs() <= within, values.clamp(min=0), values) + shift
        inverse = ((vectors / shifted) @ vectors.T).to(self.dtype)
        if not bool(inverse.isfinite().all()):
            raise ValueError(
                f"damping is too small for {what}: its inverse with {shift:.3g} added passes the "
                f"range of {self.dtype}"
            )
        return ((inverse + inverse.T) / 2).contiguous()


def _mean_diagonal(factor: Tensor) -> float:
    return float(factor.diagonal().mean()) if len(factor) else 0.0


def decompose(operators: Sequence[KroneckerOperator], names: Sequence[str | None]) -> None:
    """Decomposes the factors of all operators that have not been decomposed, together.

    Args:
        operators: on one device.
        names: of their layers, for messages.

    Raises:
        ValueError: a factor holds NaN or Inf.
    """
    given = zip(operators, names, strict=True)
    new = [(K, name) for K, name in given if "_pairs" not in K.__dict__]
    labels = [
        f"{letter} of {said(name)}" for K, name in new for letter in "AB" for _ in range(K.groups)
    ]
    # They are kept, whatever mode the first that asks for them is in.
    with torch.inference_mode(False), torch.no_grad():
        matrices = [factor.detach() for K, _ in new for factor in (*K._left, *K._right)]
        found = iter(eigenpairs(matrices, labels))
    for K, _ in new:
        left = [next(found) for _ in range(K.groups)]
        K._pairs = left, [next(found) for _ in range(K.groups)]
