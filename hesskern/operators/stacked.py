"""The stacked output Hessian: the whole Gauss-Newton matrix with inputs at their means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern.operators.base import CurvatureOperator
from hesskern.solvers.result import EigenResult

__all__ = ["StackedGaussNewton"]


class StackedGaussNewton(CurvatureOperator):
    """B M B^T with M = E[sum_c s_c s_c^T] over all layers' outputs and B = diag(I_m (x) E[x^(p)]).

    This is the Gauss-Newton matrix of a network whose layers all see their mean input; it has the
    paper's approximate eigenvectors (u^(p) (x) E[x~^(p)])_p (arXiv 2010.04261, full Hessian). Made
    by :meth:`hesskern.GaussNewton.stacked`.

    Args:
        output_hessian: M [q, q], q the sum of the layers' outputs.
        input_means: E[x^(p)] [d] of every layer.
        sizes: outputs m of every layer.
    """

    def __init__(
        self, output_hessian: Tensor, input_means: Sequence[Tensor], sizes: Sequence[int]
    ) -> None:
        self.output_hessian = output_hessian
        self.input_means, self.sizes = list(input_means), list(sizes)
        size = sum(m * len(x) for m, x in zip(sizes, input_means, strict=True))
        self.shape = (size, size)
        self.dtype, self.device = output_hessian.dtype, output_hessian.device

    def _reduce(self, block: Tensor) -> Tensor:
        """B^T of rows [k, P]: [k, q]."""
        parts = block.split(
            [m * len(x) for m, x in zip(self.sizes, self.input_means, strict=True)], 1
        )
        return torch.cat(
            [
                part.reshape(len(block), m, -1) @ x
                for part, m, x in zip(parts, self.sizes, self.input_means, strict=True)
            ],
            1,
        )

    def _expand(self, block: Tensor) -> Tensor:
        """B of rows [k, q]: [k, P]."""
        return torch.cat(
            [
                (part.unsqueeze(2) * x).flatten(1)
                for part, x in zip(block.split(self.sizes, 1), self.input_means, strict=True)
            ],
            1,
        )

    def _matmul(self, block: Tensor) -> Tensor:
        return self._expand(self._reduce(block) @ self.output_hessian)

    @property
    def _lengths(self) -> Tensor:
        """[q] the norms ‖E[x^(p)]‖, once per output."""
        norms = [x.norm().expand(m) for m, x in zip(self.sizes, self.input_means, strict=True)]
        return torch.cat(norms)

    def trace(self) -> float:
        return float((self.output_hessian.diagonal() * self._lengths.square()).double().sum())

    def diagonal(self) -> Tensor:
        squares = [x.square() for x in self.input_means]
        parts = self.output_hessian.diagonal().split(self.sizes)
        return torch.cat([torch.outer(p, x).flatten() for p, x in zip(parts, squares, strict=True)])

    def eigsh(self, k: int) -> EigenResult:
        """The k largest eigenpairs, exactly: of D M D with D the lengths of the mean inputs.

        Raises:
            ValueError: k is not in [1, q].
        """
        values, u = self._top(k, self._lengths)
        lengths = self._lengths.clamp(min=torch.finfo(self.dtype).tiny)
        vectors = self._expand((u / lengths.unsqueeze(1)).T).T
        scale = values[0].abs().clamp(min=torch.finfo(self.dtype).tiny)
        residuals = (self @ vectors.contiguous() - vectors * values).norm(dim=0) / scale
        return EigenResult(values, vectors.contiguous(), residuals, True, 0)

    def published_vectors(self, k: int) -> Tensor:
        """[P, k] the paper's (u^(p) (x) E[x~^(p)])_p with u of M alone, made orthonormal in order.

        They are eigenvectors of B M B^T where all mean inputs have one length.

        Raises:
            ValueError: k is not in [1, q].
        """
        _, u = self._top(k, None)
        return torch.linalg.qr(self._expand(u.T.contiguous()).T).Q

    def _top(self, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix = self.output_hessian.double()
        if not 1 <= k <= len(matrix):
            raise ValueError(f"k must lie in [1, {len(matrix)}], got {k}")
        if lengths is not None:
            matrix = matrix * torch.outer(lengths, lengths).double()
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:k].to(self.dtype), vectors.flip(1)[:, :k].to(self.dtype)
