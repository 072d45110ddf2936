"""The Kronecker eigenbasis with the Hessian's own diagonal in it (EKFAC, George et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from hesskern import ops
from hesskern.operators.base import EigenbasisOperator
from hesskern.operators.layer_hessian import LayerHessian

__all__ = ["CorrectedOperator", "eigenvalue_corrected"]


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
        self._take(left, right, values.to(like.dtype), like.transposed)

    @classmethod
    def of_bases(
        cls, left: list[Tensor], right: list[Tensor], values: Tensor, *, transposed: bool = False
    ) -> CorrectedOperator:
        """The operator of eigenvectors that are known.

        Args:
            left, right: per group, U [m/g, m/g] and V [d, d], orthogonal.
            values: S [m, d] of their dtype, which is kept and not copied.
            transposed: whether the weight is kept as [d, m].

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
        found._take(left, right, values, transposed)
        return found

    def _take(
        self, left: list[Tensor], right: list[Tensor], values: Tensor, transposed: bool
    ) -> None:
        self.layer_shape, self.groups = (values.shape[0], values.shape[1]), len(left)
        self.transposed = transposed
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

    def trace(self) -> float:
        return float(self.values.double().sum())

    def diagonal(self) -> Tensor:
        parts = [u.square() @ s @ v.square().T for u, v, s in zip(*self.eigenbases, strict=True)]
        return self._outward(torch.cat([part.flatten() for part in parts]))


def eigenvalue_corrected(H: LayerHessian, K: EigenbasisOperator) -> CorrectedOperator:
    """EKFAC: K's eigenvectors, each with the curvature that H has along it.

    Of all matrices with these eigenvectors it is the one nearest to H in the Frobenius norm; its
    trace is H's. One pass over the samples.

    Args:
        H: a layer's Hessian.
        K: of the same layer, e.g. ``factors.operator()`` or ``nearest_kronecker(H)``.

    Raises:
        TypeError: H is not a LayerHessian, or K has no Kronecker eigenbasis.
        ValueError: K's shape, groups, dtype or device differ from H's.
    """
    if not isinstance(H, LayerHessian):
        raise TypeError(f"H must be a LayerHessian, got {type(H).__name__}")
    return CorrectedOperator(K, H.diagonal_in(K))
