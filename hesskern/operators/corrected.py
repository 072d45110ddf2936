"""The Kronecker eigenbasis with the Hessian's own diagonal in it (EKFAC, George et al. 2018)."""

from __future__ import annotations

from hesskern.operators.eigenbasis import CorrectedOperator, EigenbasisOperator
from hesskern.operators.layer_hessian import LayerHessian

__all__ = ["CorrectedOperator", "eigenvalue_corrected"]


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
