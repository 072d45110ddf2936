"""Plain-torch definition of every operator's result; the tests hold both backends against it.

Each function returns what its namesake in :mod:`hesskern.ops` computes (for the accumulating ones:
all that is added, of symmetric matrices both triangles), in the dtype of its inputs, memory and
speed no concern.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "conv_eigen_correction",
    "conv_input_covariance",
    "eigen_correction",
    "input_covariance",
    "kron_eigen_matmul",
    "kron_matmul",
    "layer_hessian_matmul",
    "output_hessian",
    "sampled_cross_entropy_gradient",
    "unfold",
]


def input_covariance(x: Tensor, alpha: float = 1.0, ones: bool = False) -> Tensor:
    """``alpha x^T x`` [d, d] of x [N, d]; [d + 1, d + 1] with a column of ones."""
    if ones:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return alpha * x.T @ x


def unfold(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Patches [N, C k k, P] of x [N, C, H, W] or [N, C, L], zero-padded."""
    if x.dim() == 3:
        x = x.unsqueeze(2)
        kernel_size, stride = (1, *kernel_size), (1, *stride)
        padding, dilation = (0, *padding), (1, *dilation)
    return F.unfold(
        x,
        tuple(kernel_size),
        dilation=tuple(dilation),
        padding=tuple(padding),
        stride=tuple(stride),
    )


def conv_input_covariance(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    alpha: float = 1.0,
) -> Tensor:
    """``alpha sum_n X_n X_n^T`` [g, C k k / g, C k k / g] of x [N, C, H, W] or [N, C, L]."""
    patches = unfold(x, kernel_size, stride, padding, dilation)
    patches = patches.unflatten(1, (groups, patches.shape[1] // groups))
    return alpha * torch.einsum("ngip,ngjp->gij", patches, patches)


def output_hessian(
    jacobian: Tensor, probabilities: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """``alpha sum_n M_n`` [m, m] of jacobian [N, c, m] or [N, c, m, t] and probabilities [N, c]."""
    rows = jacobian if jacobian.dim() == 4 else jacobian.unsqueeze(-1)
    if probabilities is None:
        return alpha * torch.einsum("ncit,ncjt->ij", rows, rows)
    p = probabilities
    weights = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return alpha * torch.einsum("ncit,ncb,nbjt->ij", rows, weights, rows)


def eigen_correction(
    g: Tensor, x: Tensor, U: Tensor, V: Tensor, alpha: float = 1.0, ones: bool = False
) -> Tensor:
    """``alpha sum_nr (U^T (sum_t g_nrt x_nt^T) V)²`` [m, d]; shapes as in ``ops``."""
    if x.dim() == 2:
        x, g = x.unsqueeze(-1), g.unsqueeze(-1)
    groups = len(U) if U.dim() == 3 else 1
    left = U if U.dim() == 3 else U.unsqueeze(0)
    right = V if V.dim() == 3 else V.unsqueeze(0)
    x = x.unflatten(1, (groups, -1))
    if ones:
        x = torch.cat([x, torch.ones_like(x[:, :, :1])], 2)
    g = g.unflatten(2, (groups, -1))
    rows = torch.einsum("nrgmt,ngdt->nrgmd", g, x)
    rotated = torch.einsum("gma,nrgmd,gdb->nrgab", left, rows, right)
    return alpha * rotated.square().sum((0, 1)).flatten(0, 1)


def conv_eigen_correction(
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    *window: Sequence[int],
    groups: int = 1,
    alpha: float = 1.0,
    ones: bool = False,
) -> Tensor:
    """:func:`eigen_correction` of the patches of x [N, C, H, W] or [N, C, L]; as in ``ops``.

    window: kernel_size, stride, padding and dilation.
    """
    patches = unfold(x, *window)
    left = U if U.dim() == 3 else U.unsqueeze(0)
    right = V if V.dim() == 3 else V.unsqueeze(0)
    return eigen_correction(g.flatten(3), patches, left, right, alpha, ones)


def kron_matmul(A: Tensor, B: Tensor, X: Tensor) -> Tensor:
    """``A X B^T`` for A [m', m], B [d', d], X [m, d] or [k, m, d]."""
    return A @ X @ B.T


def kron_eigen_matmul(U: Tensor, S: Tensor, V: Tensor, X: Tensor) -> Tensor:
    """``U (S . (U^T X V)) V^T`` for U [m, r], S [r, q], V [d, q], X [m, d] or [k, m, d]."""
    return U @ (S * (U.T @ X @ V)) @ V.T


def layer_hessian_matmul(x: Tensor, s: Tensor, V: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha sum_nc <V, R_nc> R_nc`` with R_nc = sum_t s_nct x_nt^T; shapes as in ``ops``."""
    if x.dim() == 2:
        x, s = x.unsqueeze(-1), s.unsqueeze(-1)
    rows = torch.einsum("ncmt,ndt->ncmd", s, x)
    block = V if V.dim() == 3 else V.unsqueeze(0)
    out = torch.einsum("kmd,ncmd,ncij->kij", block, rows, rows) * alpha
    return out if V.dim() == 3 else out[0]


def sampled_cross_entropy_gradient(
    logits: Tensor,
    uniform: Tensor,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    terms: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """``alpha / sqrt(terms_n) (p_nt - e_k)``, k drawn from p by ``uniform``; as in ``ops``."""
    rows = logits if logits.dim() == 3 else logits.unsqueeze(-1)
    n, c, t = rows.shape
    p = rows.softmax(1)
    sums = p.double().cumsum(1)
    passed = sums > uniform.double().reshape(n, 1, t) * sums[:, -1:]
    own = F.one_hot(passed.int().argmax(1), c).movedim(-1, 1)
    out = alpha * (p - own.to(p.dtype))
    if terms is not None:
        out = out / terms.to(p.dtype).sqrt().reshape(n, 1, 1)
    if targets is not None:
        out = out.masked_fill((targets == ignore_index).reshape(n, 1, t), 0)
    return out.reshape(logits.shape)
