"""What the output Hessian of a layer owes to the weights behind it (arXiv 2010.04261, section 5).

With every ReLU behind layer p open with probability 1/2, E[M] is 4^-(L-p) S^T E[A] S with
S = W^(L) ... W^(p+1) [c, m]. A has the null vector 1, so c - 1 directions remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.diagnostics.metrics import subspace_overlap

__all__ = ["RowSpaceOverlap", "closed_form_output_hessian", "row_space_overlap", "weight_product"]


def weight_product(weights: Sequence[Tensor], outputs: int | None = None) -> Tensor:
    """S = W^(L) ... W^(p+1) of the layers behind layer p.

    Args:
        weights: [m_i, d_i], in the network's order; empty behind the last layer.
        outputs: c, for an empty list: S is then the identity.

    Returns:
        [c, m] in float64.

    Raises:
        ValueError: shapes do not chain, or there are no weights and no ``outputs``.
    """
    if not weights:
        if outputs is None:
            raise ValueError("outputs must be given where no weights follow")
        return torch.eye(outputs, dtype=torch.float64)
    product = weights[0].detach().double()
    for i, weight in enumerate(weights[1:], 1):
        if weight.dim() != 2 or weight.shape[1] != product.shape[0]:
            raise ValueError(
                f"weights[{i}] must be [m, {product.shape[0]}] to follow the one before, got "
                f"{list(weight.shape)}"
            )
        product = weight.detach().double() @ product
    return product


def closed_form_output_hessian(S: Tensor, logit_hessian: Tensor, layers: int) -> Tensor:
    """4^-layers S^T E[A] S.

    Args:
        S: [c, m], see :func:`weight_product`.
        logit_hessian: E[A] [c, c], the output Hessian of the last layer.
        layers: number of ReLU layers between layer p and the outputs, L - p.

    Returns:
        [m, m] in float64.

    Raises:
        ValueError: the shapes do not fit, or ``layers`` is negative.
    """
    S = S.detach().double()
    c = S.shape[0]
    if tuple(logit_hessian.shape) != (c, c):
        raise ValueError(
            f"logit_hessian must be [c, c] = {[c, c]}, got {list(logit_hessian.shape)}"
        )
    if layers < 0:
        raise ValueError(f"layers must not be negative, got {layers}")
    return 4.0**-layers * S.T @ logit_hessian.double() @ S


@dataclass(frozen=True)
class RowSpaceOverlap:
    """Overlap of the c - 1 leading eigenvectors of E[M] with what S's rows span.

    Attributes:
        orthogonal: with the part of the row space orthogonal to the direction 1^T S, as published.
        centred: with the row space of (I - 1 1^T / c) S, the range of S^T A S. The two spaces are
            the same where 1 is an eigenvector of S S^T.
    """

    orthogonal: float
    centred: float


def row_space_overlap(S: Tensor, output_hessian: Tensor) -> RowSpaceOverlap:
    """How much of E[M]'s top c - 1 eigenspace lies in the row space of S.

    Args:
        S: [c, m], see :func:`weight_product`.
        output_hessian: E[M] [m, m].

    Raises:
        ValueError: shapes do not fit, or S has fewer than two rows or a rank below c.
    """
    c, m = S.shape
    if c < 2 or c > m:
        raise ValueError(f"S must be [c, m] with 2 <= c <= m, got {list(S.shape)}")
    if tuple(output_hessian.shape) != (m, m):
        raise ValueError(f"output_hessian must be {[m, m]}, got {list(output_hessian.shape)}")
    S = S.detach().double().to(output_hessian.device)
    top = torch.linalg.eigh(output_hessian.double()).eigenvectors.flip(1)[:, : c - 1]
    rows = torch.linalg.qr(S.T).Q
    common = S.sum(0)
    if int(torch.linalg.matrix_rank(S)) < c or float(common.norm()) == 0:
        raise ValueError("S must have rank c and a sum of rows that is not zero")
    # Within the row space: what is orthogonal to 1^T S.
    inside = torch.linalg.qr((rows.T @ common).unsqueeze(1), mode="complete").Q[:, 1:]
    centred = torch.linalg.svd(S - S.mean(0), full_matrices=False).Vh[: c - 1].T
    return RowSpaceOverlap(
        float(subspace_overlap(rows @ inside, top)[-1]),
        float(subspace_overlap(centred.contiguous(), top)[-1]),
    )
