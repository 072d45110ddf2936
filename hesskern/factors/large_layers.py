"""What is known of a layer whose output Hessian is too large to be kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hesskern.choices import Order, check_choice
from hesskern.operators.diagonal_kronecker import DiagonalKroneckerOperator
from hesskern.passes.layers import LayerSpec

__all__ = ["LargeLayerFactors", "OfLayer"]


class OfLayer:
    """What a result about one layer says of the layer."""

    spec: LayerSpec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def layer_shape(self) -> tuple[int, int]:
        """(m, d): the shape of the weight as a matrix, d per group."""
        return self.spec.shape

    @property
    def groups(self) -> int:
        return self.spec.groups


@dataclass(frozen=True, eq=False)
class LargeLayerFactors(OfLayer):
    """Factors of a layer with more than ``max_outputs`` outputs: of E[M] the diagonal alone.

    Attributes:
        spec: the layer's geometry.
        input_covariance: E[x x^T], summed over positions: [d, d], or [g, d, d] with groups.
        output_diagonal: [m] diagonal of E[M], the mean over all samples' positions.
        num_samples: weighted number of samples behind the means.
        positions: mean of the positions per sample.
        tied_to: as in :class:`hesskern.LayerFactors`.
    """

    spec: LayerSpec
    input_covariance: Tensor
    output_diagonal: Tensor
    num_samples: float
    positions: float
    tied_to: str | None = None

    def operator(self, order: Order = "weight") -> DiagonalKroneckerOperator:
        """K = diag(E[M]) (x) E[x x^T], without a matrix [m, m].

        Args:
            order: of flat vectors, as in :meth:`hesskern.LayerFactors.operator`.

        Raises:
            ValueError: ``order`` is another word.
        """
        check_choice("order", order, Order)
        transposed = self.spec.transposed and order == "weight"
        return DiagonalKroneckerOperator(
            self.output_diagonal,
            self.input_covariance,
            transposed=transposed,
            name=self.name,
            known=True,
        )
