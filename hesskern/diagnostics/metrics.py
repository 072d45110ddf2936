"""What curvature spaces are compared by (arXiv 2010.04261, sections 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.diagnostics.norms import relative_norms
from hesskern.factors.result import LayerFactors
from hesskern.operators.base import CurvatureOperator

__all__ = [
    "Correspondence",
    "DecouplingError",
    "InputAutocorrelation",
    "decoupling_error",
    "eigenvector_correspondence",
    "input_autocorrelation",
    "rank_one_ratio",
    "singular_values",
    "subspace_overlap",
]


def subspace_overlap(U: Tensor, V: Tensor) -> Tensor:
    """Overlap ‖U_k^T V_k‖_F² / k of the spaces of the first k columns, for every k.

    Args:
        U, V: [P, K], orthonormal columns, most important first.

    Returns:
        [K] float64, each in [0, 1]: 1 for equal spaces, about k/P for random ones.

    Raises:
        ValueError: shapes differ, or columns are not orthonormal to 1e-3.
    """
    if U.dim() != 2 or U.shape != V.shape:
        raise ValueError(f"U and V must both be [P, K], got {list(U.shape)} and {list(V.shape)}")
    common = torch.promote_types(U.dtype, V.dtype)
    U, V = U.to(common), V.to(common)
    for name, matrix in (("U", U), ("V", V)):
        gram = matrix.T @ matrix
        worst = float((gram - torch.eye(len(gram)).to(gram)).abs().max())
        if not worst < 1e-3:
            raise ValueError(
                f"{name} must have orthonormal columns; ‖{name}^T {name} - I‖_max is {worst:.2g}"
            )
    squares = (U.T @ V).double().square()
    sums = squares.cumsum(0).cumsum(1).diagonal()
    return sums / torch.arange(1, len(sums) + 1, dtype=torch.float64, device=sums.device)


@dataclass(frozen=True)
class Correspondence:
    """How a layer's eigenvectors line up with the factors' eigenvectors.

    Attributes:
        output: [m, k] ‖Mat(h_j)^T u_i‖², u_i of E[M]; columns sum to one.
        input: [d, k] ‖Mat(h_j) v_i‖², v_i of E[x x^T]; columns sum to one.
    """

    output: Tensor
    input: Tensor


def eigenvector_correspondence(vectors: Tensor, factors: LayerFactors) -> Correspondence:
    """Squared norms of eigenvectors, as matrices, along each factor's eigenvectors.

    Args:
        vectors: [m d, k], orthonormal columns.
        factors: of the same layer; one group.

    Returns:
        :class:`Correspondence`, with the factors' eigenvectors most important first.

    Raises:
        ValueError: the shapes do not fit.
        NotImplementedError: the layer is a grouped convolution.
    """
    if factors.groups > 1:
        raise NotImplementedError(
            f"layer {factors.name!r} has {factors.groups} groups and no single input eigenbasis"
        )
    matrices = _matrices(vectors, factors.weight_shape)
    if factors.spec.transposed:
        matrices = matrices.mT
    _, u = torch.linalg.eigh(factors.output_hessian.double())
    _, v = torch.linalg.eigh(factors.input_covariance.double())
    u, v = u.flip(1).to(matrices), v.flip(1).to(matrices)
    return Correspondence(
        output=torch.einsum("mi,kmd->ikd", u, matrices).square().sum(2),
        input=torch.einsum("kmd,di->ikm", matrices, v).square().sum(2),
    )


def _matrices(vectors: Tensor, layer_shape: tuple[int, int]) -> Tensor:
    m, d = layer_shape
    if vectors.dim() != 2 or vectors.shape[0] != m * d:
        raise ValueError(
            f"vectors must be [m d, k] = [{m * d}, k] for a layer of shape {(m, d)}, got "
            f"{list(vectors.shape)}"
        )
    return vectors.T.reshape(-1, m, d)


def singular_values(vectors: Tensor, layer_shape: tuple[int, int]) -> Tensor:
    """Singular values of Mat(h) / ‖Mat(h)‖_F of every column: their squares sum to one.

    Args:
        vectors: [m d, k].
        layer_shape: (m, d), the ``weight_shape`` of the factors or the Hessian.

    Returns:
        [k, min(m, d)], largest first.

    Raises:
        ValueError: the shapes do not fit.
    """
    matrices = _matrices(vectors, layer_shape)
    return torch.linalg.svdvals(matrices) / matrices.flatten(1).norm(dim=1, keepdim=True)


def rank_one_ratio(vectors: Tensor, layer_shape: tuple[int, int]) -> Tensor:
    """‖Mat(h)‖_2 / ‖Mat(h)‖_F of every column: 1 if the matrix has rank one.

    Args:
        vectors: [m d, k].
        layer_shape: (m, d), the ``weight_shape`` of the factors or the Hessian.

    Returns:
        [k].
    """
    return singular_values(vectors, layer_shape)[:, 0]


@dataclass(frozen=True)
class InputAutocorrelation:
    """How nearly rank one E[x x^T] is.

    Attributes:
        mean_alignment: (v_1^T E[x] / ‖E[x]‖)², v_1 the first eigenvector of E[x x^T]; with
            positions E[x] is the first left singular vector of E[X].
        eigenvalue_ratio: lambda_1 / lambda_2 of E[x x^T]; inf if lambda_2 is zero.
    """

    mean_alignment: float
    eigenvalue_ratio: float


def input_autocorrelation(factors: LayerFactors) -> InputAutocorrelation:
    """The input auto-correlation metrics of one layer.

    Raises:
        NotImplementedError: the layer is a grouped convolution.
    """
    if factors.groups > 1:
        raise NotImplementedError(
            f"layer {factors.name!r} has {factors.groups} groups and no single input covariance"
        )
    values, vectors = torch.linalg.eigh(factors.input_covariance.double())
    alignment = float((vectors[:, -1] @ factors.input_mean_direction.double()) ** 2)
    if len(values) < 2 or float(values[-2]) <= 0:
        return InputAutocorrelation(alignment, float("inf"))
    return InputAutocorrelation(alignment, float(values[-1] / values[-2]))


@dataclass(frozen=True)
class DecouplingError:
    """How far a layer-wise Hessian is from a Kronecker product.

    Attributes:
        spectral: ‖H - K‖_2 / ‖H‖_2.
        frobenius: ‖H - K‖_F / ‖H‖_F.
        frobenius_error: standard error of ``frobenius``; 0 where it was computed exactly.
    """

    spectral: float
    frobenius: float
    frobenius_error: float


def decoupling_error(
    H: CurvatureOperator,
    K: CurvatureOperator,
    *,
    probes: int = 16,
    seed: int = 0,
    dense_below: int = 2048,
) -> DecouplingError:
    """Relative spectral and Frobenius error of the decoupling H ~ K = E[M] (x) E[x x^T].

    Up to ``dense_below`` parameters both are exact. Above, the spectral norms come from Lanczos.
    The Frobenius norms of a layer's Hessian and a K with a Kronecker eigenbasis follow from H's
    exact diagonal in that basis and the norm of the rest, H minus that diagonal, which alone is
    estimated; for other operators both norms are. ``probes`` random vectors outside the Krylov
    space are the estimate (in the manner of Hutch++, Meyer et al. 2021, applied to the square).
    The rest depends on K's eigenvectors and ``seed`` alone: forms that share their eigenvectors
    are compared without noise, and none comes out nearer to H than ``eigenvalue_corrected(H, K)``.

    Args:
        H, K: [P, P] operators of one dtype on one device.
        probes: random vectors for the Frobenius norm, at least two.
        seed: of the random vectors.
        dense_below: largest P that is computed densely.

    Raises:
        ValueError: shapes, dtypes or devices differ, H is zero, or ``probes`` is too small.
    """
    if H.shape != K.shape:
        raise ValueError(f"H and K must have the same shape, got {H.shape} and {K.shape}")
    if H.dtype != K.dtype or H.device != K.device:
        raise ValueError(
            f"H and K must agree in dtype and device, got {H.dtype} on {H.device} and "
            f"{K.dtype} on {K.device}"
        )
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes!r}")
    if H.shape[0] <= dense_below:
        dense = H.to_dense().double()
        difference = dense - K.to_dense().double()
        norm = float(torch.linalg.eigvalsh(dense).abs().max())
        if norm == 0:
            raise ValueError("H is zero, so a relative error is not defined")
        return DecouplingError(
            float(torch.linalg.eigvalsh(difference).abs().max()) / norm,
            float(difference.norm() / dense.norm()),
            0.0,
        )
    return DecouplingError(*relative_norms(H, K, probes, seed))
