"""The best single Kronecker product (Van Loan & Pitsianis 1993), without forming the Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from hesskern.operators.kronecker import KroneckerOperator
from hesskern.operators.layer_hessian import LayerHessian

__all__ = ["nearest_kronecker"]


def nearest_kronecker(
    H: LayerHessian, tol: float = 1e-6, max_iterations: int = 100
) -> KroneckerOperator:
    """A (x) B with the least ‖H - A (x) B‖_F.

    Alternates A <- sum_kl H_(ik)(jl) B_kl / ‖B‖² and its mirror image: power iteration on the
    rearranged matrix, whose leading singular pair is the answer. H is positive semi-definite, and
    so are A and B. They are scaled to equal Frobenius norms.

    Args:
        H: a layer's Hessian, of a layer with one group.
        tol: relative change of A (x) B below which the iteration ends.
        max_iterations: at the most.

    Returns:
        :class:`KroneckerOperator` with A [m, m] and B [d, d] in H's dtype.

    Raises:
        TypeError: H is not a LayerHessian.
        NotImplementedError: the layer is a grouped convolution.
        ValueError: H is zero, or the iteration does not settle.
    """
    if not isinstance(H, LayerHessian):
        raise TypeError(f"H must be a LayerHessian, got {type(H).__name__}")
    if H.groups > 1:
        raise NotImplementedError(
            f"layer {H.name!r} has {H.groups} groups, so one product A (x) B does not fit its shape"
        )
    left = H.contract_inputs(torch.eye(H.layer_shape[1], dtype=H.dtype, device=H.device))
    if float(left.norm()) == 0:
        raise ValueError("H is zero, so its nearest Kronecker product is not defined")
    left = left / left.norm()
    scale = 0.0
    for _ in range(max_iterations):
        right = H.contract_outputs(left)
        right = right / right.norm()
        update = H.contract_inputs(right)
        previous, scale = scale, float(update.norm())
        update = update / scale
        change = float((update - left).norm()) + abs(scale - previous) / scale
        left = update
        if change <= tol:
            root: Tensor = torch.tensor(scale, dtype=H.dtype, device=H.device).sqrt()
            left, right = ((side + side.T) / 2 * root for side in (left, right))
            return KroneckerOperator.of_symmetric(left, right, transposed=H.transposed)
    raise ValueError(
        f"max_iterations of {max_iterations} is too small: the last change was {change:.2g}, "
        f"above tol={tol:g}"
    )
