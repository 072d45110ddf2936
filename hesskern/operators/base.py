"""Curvature operators: symmetric matrices known by their products with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor

from hesskern import ops

if TYPE_CHECKING:
    from hesskern.solvers.result import EigenResult

__all__ = ["CurvatureOperator", "EigenbasisOperator", "LayerOperator"]


class CurvatureOperator(ABC):
    """A symmetric [P, P] matrix: ``H @ v`` for v [P], ``H @ V`` for a block V [P, k].

    Attributes:
        shape: (P, P).
        dtype, device: of the vectors it takes and gives.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

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
        if not isinstance(vectors, Tensor):
            raise TypeError(f"vectors must be a tensor, got {type(vectors).__name__}")
        size = self.shape[0]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(f"vectors must be [{size}] or [{size}, k], got {list(vectors.shape)}")
        if vectors.dtype != self.dtype:
            raise TypeError(f"vectors must be {self.dtype}, got {vectors.dtype}")
        if vectors.device != self.device:
            raise ValueError(f"vectors must be on {self.device}, got {vectors.device}")
        with torch.inference_mode(False), torch.no_grad():
            if vectors.is_inference():
                vectors = vectors.clone()
            if vectors.dim() == 1:
                return self._outward(self._matmul(self._inward(vectors.unsqueeze(0))))[0]
            return self._outward(self._matmul(self._inward(vectors.T.contiguous()))).T

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

    def _turned(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        return rows.unflatten(-1, shape).mT.flatten(-2) if self.transposed else rows


class EigenbasisOperator(LayerOperator):
    """A symmetric matrix that is diagonal in a Kronecker eigenbasis u_i (x) v_j.

    Attributes:
        layer_shape: (m, d); vectors are such matrices, flattened.
        groups: with groups the matrix is block diagonal.
    """

    groups: int

    @property
    @abstractmethod
    def eigenbases(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per group: U [m/g, m/g] and V [d, d], orthogonal, and the eigenvalues S [m/g, d]."""

    def squared_norm(self) -> float:
        """The squared Frobenius norm, the sum of S²."""
        return sum(float(s.double().square().sum()) for s in self.eigenbases[2])

    def _blocks(self, block: Tensor) -> list[Tensor]:
        """[k, P] -> per group [k, m/g, d]."""
        m, d = self.layer_shape
        shaped = block.reshape(len(block), self.groups, m // self.groups, d)
        return list(shaped.unbind(1))

    @staticmethod
    def _joined(blocks: list[Tensor]) -> Tensor:
        return torch.stack(blocks, 1).flatten(1)

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
