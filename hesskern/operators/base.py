"""Curvature operators: symmetric matrices known by their products with vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor

from hesskern.parallel.ranks import Ranks, one_group, telling_of
from hesskern.parallel.replicas import checksums

__all__ = ["CurvatureOperator", "LayerOperator", "SumOperator"]

Layout = tuple[tuple[str | None, tuple[int, int], bool], ...]
"""Of what flat vectors consist: per layer its name, (m, d), and whether it is kept as [d, m]."""


class CurvatureOperator(ABC):
    """A symmetric [P, P] matrix: ``H @ v`` for v [P], ``H @ V`` for a block V [P, k].

    ``H + K``, ``H - K`` and ``2.0 * H`` are operators, too (:class:`SumOperator`).

    Attributes:
        shape: (P, P).
        dtype, device: of the vectors it takes and gives.
        ranks: the processes that hold its samples together; None where this one holds all. What it
            is asked for is then asked on all of them, with the same arguments and in the same
            order, and they all get the same bits.
    """

    ranks: Ranks | None = None
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    # numpy's numbers leave products to __rmul__.
    __array_ufunc__ = None

    @abstractmethod
    def _matmul(self, block: Tensor) -> Tensor:
        """Product with rows: block [k, P] -> [k, P], matrices [m, d] output first."""

    def _inward(self, rows: Tensor) -> Tensor:
        """[k, P] output first of rows in the order of the weight's memory."""
        return rows

    def _outward(self, rows: Tensor) -> Tensor:
        """[k, P] in the order of the weight's memory of rows output first."""
        return rows

    def _outward_matrix(self, matrix: Tensor) -> Tensor:
        """[P, P] with both axes in the order of the weight's memory."""
        return self._outward(self._outward(matrix).T).T

    @abstractmethod
    def trace(self) -> float:
        """Sum of the eigenvalues."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """[P] diagonal."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with one vector [P] or a block [P, k].

        Raises:
            TypeError: ``vectors`` is not a tensor, or of another dtype.
            ValueError: its shape or device do not fit.
        """
        return self._applied(vectors, self._matmul)

    def _applied(self, vectors: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of rows [k, P], output first, on one vector [P] or a block [P, k]."""
        what = f"a product with {self.described}"
        with torch.inference_mode(False), torch.no_grad(), telling_of(self.ranks, what):
            self._check(vectors)
            if vectors.is_inference():
                vectors = vectors.clone()
            if vectors.dim() == 1:
                return self._outward(function(self._inward(vectors.unsqueeze(0))))[0]
            return self._outward(function(self._inward(vectors.T.contiguous()))).T

    def _check(self, vectors: Tensor) -> None:
        """Raises TypeError or ValueError unless these are vectors [P] or [P, k]."""
        if not isinstance(vectors, Tensor):
            raise TypeError(f"vectors must be a tensor, got {type(vectors).__name__}")
        size = self.shape[0]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(f"vectors must be [{size}] or [{size}, k], got {list(vectors.shape)}")
        if vectors.dtype != self.dtype:
            raise TypeError(f"vectors must be {self.dtype}, got {vectors.dtype}")
        if vectors.device != self.device:
            raise ValueError(f"vectors must be on {self.device}, got {vectors.device}")

    @property
    def described(self) -> str:
        """What this is, for messages."""
        return type(self).__name__

    def _of_ranks(self, part: Tensor, upper: bool = False, block: Tensor | None = None) -> Tensor:
        """The sum over the ranks of what each has of its samples, in place.

        Args:
            part: of any shape.
            upper: whether the upper triangle of a [d, d] alone is defined.
            block: that it is a product with, and all ranks must have been given.
        """
        if self.ranks is not None:
            facts = {} if block is None else {"checksums of vectors": checksums({"all": block})}
            what = f"a product with {self.described}" if facts else f"a sum over {self.described}"
            self.ranks.sum_([part], [upper], what, facts)
        return part

    def _number_of_ranks(self, part: float) -> float:
        """The sum over the ranks of what each has of its samples."""
        return part if self.ranks is None else self.ranks.totals("a number of an operator", part)[0]

    def _layout(self) -> Layout | None:
        """What flat vectors consist of; None where only their length is known."""
        return None

    def _scaled(self, factor: float) -> CurvatureOperator:
        return SumOperator([(factor, self)])

    def __mul__(self, factor: float) -> CurvatureOperator:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"the factor of an operator must be finite, got {float(factor):g}")
        return self._scaled(float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> CurvatureOperator:
        return self._scaled(-1.0)

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return SumOperator([(1.0, self), (1.0, other)])

    def __radd__(self, other: int) -> CurvatureOperator:
        # What sum() begins with.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return SumOperator([(1.0, self), (-1.0, other)])

    def to_dense(self) -> Tensor:
        """[P, P]; for small layers."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        dense = self @ eye
        return (dense + dense.T) / 2

    def to_scipy(self) -> sparse.LinearOperator:
        """The same operator for ``scipy.sparse.linalg``."""

        def product(array: np.ndarray) -> np.ndarray:
            flat = array.reshape(self.shape[0], -1)
            vectors = torch.as_tensor(flat.copy(), dtype=self.dtype, device=self.device)
            return (self @ vectors).cpu().numpy().reshape(array.shape)

        numpy_dtype = np.float64 if self.dtype == torch.float64 else np.float32
        return sparse.LinearOperator(
            self.shape, matvec=product, matmat=product, rmatvec=product, dtype=numpy_dtype
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype})"


class SumOperator(CurvatureOperator):
    """A linear combination of operators over the same vectors, term by term.

    It has products, trace, diagonal and ``to_dense()``. Solves and powers it has none: operators
    share no eigenvectors in general. A multiple of one operator that has them keeps them.

    Args:
        terms: factors and operators; sums among them are taken apart.

    Attributes:
        terms: the same.

    Raises:
        TypeError: a term is no operator.
        ValueError: shapes, dtypes, devices or the order of vectors differ.
    """

    def __init__(self, terms: Sequence[tuple[float, CurvatureOperator]]) -> None:
        flat: list[tuple[float, CurvatureOperator]] = []
        for factor, term in terms:
            if not isinstance(term, CurvatureOperator):
                raise TypeError(f"terms must be operators, got {type(term).__name__}")
            inner = term.terms if isinstance(term, SumOperator) else [(1.0, term)]
            flat += [(factor * own, operator) for own, operator in inner]
        if not flat:
            raise ValueError("terms must hold at least one operator")
        first = flat[0][1]
        for _, other in flat[1:]:
            for what in ("shape", "dtype", "device"):
                a, b = getattr(first, what), getattr(other, what)
                if a != b:
                    raise ValueError(f"operators of a sum must agree in {what}, got {a} and {b}")
        placed = [operator for _, operator in flat if operator._layout() is not None]
        for other in placed[1:]:
            _check_layouts(placed[0], other)
        self.terms: tuple[tuple[float, CurvatureOperator], ...] = tuple(flat)
        self.ranks = one_group([operator.ranks for _, operator in flat])
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device

    def _layout(self) -> Layout | None:
        found = [layout for _, term in self.terms if (layout := term._layout()) is not None]
        return found[0] if found else None

    def __matmul__(self, vectors: Any) -> Any:
        """Product with one vector [P], a block [P, k], or what else all terms take."""
        if isinstance(vectors, Mapping):
            terms: list[Any] = [term for _, term in self.terms]
            products = [term @ vectors for term in terms]
            return {
                name: self._combined([product[name] for product in products])
                for name in products[0]
            }
        return super().__matmul__(vectors)

    def _matmul(self, block: Tensor) -> Tensor:
        return self._combined([(term @ block.T).T for _, term in self.terms])

    def _combined(self, parts: Sequence[Tensor]) -> Tensor:
        """The terms' factors times these, summed in the terms' order."""
        total = self.terms[0][0] * parts[0]
        for (factor, _), part in zip(self.terms[1:], parts[1:], strict=True):
            total = total.add_(part, alpha=factor)
        return total

    def trace(self) -> float:
        return math.fsum(factor * term.trace() for factor, term in self.terms)

    def diagonal(self) -> Tensor:
        return self._combined([term.diagonal() for _, term in self.terms])

    def to_dense(self) -> Tensor:
        return self._combined([term.to_dense() for _, term in self.terms])

    def __repr__(self) -> str:
        inner = " + ".join(f"{factor:g} * {term!r}" for factor, term in self.terms)
        return f"SumOperator({inner})"


def _check_layouts(first: CurvatureOperator, other: CurvatureOperator) -> None:
    """Raises ValueError where entries of both operators' vectors belong to other weights."""
    a, b = first._layout(), other._layout()
    if a is None or b is None:
        return
    for i, ((name, shape, kept), (other_name, other_shape, other_kept)) in enumerate(
        zip(a, b, strict=False)
    ):
        one, two = name or f"layer {i}", other_name or f"layer {i}"
        if (name and other_name and name != other_name) or shape != other_shape:
            raise ValueError(
                f"operators of a sum must have the same layers in one order, got {one!r} "
                f"{list(shape)} and {two!r} {list(other_shape)}"
            )
        if kept != other_kept:
            raise ValueError(
                f"operators of a sum must order their vectors alike, but {one!r} is in the order "
                "of the weight, [d, m], in one and output first, [m, d], in the other: make both "
                "by operator(order=...) of one word"
            )
    if len(a) != len(b):
        raise ValueError(f"operators of a sum must have the same layers, got {len(a)} and {len(b)}")


class LayerOperator(CurvatureOperator):
    """A symmetric matrix over one layer's weight.

    Attributes:
        layer_shape: (m, d) of the weight as a matrix.
        transposed: whether the weight is kept as [d, m], and flat vectors with it.
        name: of the layer, where it is known.
    """

    layer_shape: tuple[int, int]
    transposed: bool = False
    name: str | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(m, d), or (d, m) if transposed: vectors are such matrices, flattened."""
        m, d = self.layer_shape
        return (d, m) if self.transposed else (m, d)

    def _inward(self, rows: Tensor) -> Tensor:
        return self._turned(rows, self.weight_shape)

    def _outward(self, rows: Tensor) -> Tensor:
        return self._turned(rows, self.layer_shape)

    def _layout(self) -> Layout:
        return ((None, self.layer_shape, self.transposed),)

    def _turned(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        return rows.unflatten(-1, shape).mT.flatten(-2) if self.transposed else rows
