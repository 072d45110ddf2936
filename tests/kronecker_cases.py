"""Factors of every kind, their dense matrices, and networks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from networks import randn
from torch import Tensor

import hesskern as hk


def positive(size: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """[size, size] positive semi-definite of the given rank, of mean eigenvalue about one."""
    rank = size if rank is None else rank
    root = randn(size, rank, seed=seed)
    return root @ root.T / max(rank, 1)


def dense_kronecker(A: Tensor, B: Tensor) -> Tensor:
    """[m d, m d] block by block, vectors row-major and output first."""
    blocks = B if B.dim() == 3 else B[None]
    step = len(A) // len(blocks)
    return torch.block_diag(
        *(
            torch.kron(A[i * step : (i + 1) * step, i * step : (i + 1) * step].contiguous(), b)
            for i, b in enumerate(blocks)
        )
    )


def permutation(m: int, d: int, transposed: bool) -> Tensor:
    """[m d, m d] R with R vec(W) = vec(W^T) where the weight is kept transposed."""
    if not transposed:
        return torch.eye(m * d).double()
    index = torch.arange(m * d).reshape(m, d).T.flatten()
    return torch.eye(m * d).double()[index]


@dataclass
class Made:
    """An operator of one layer, and its matrix in the order of flat vectors."""

    operator: hk.KroneckerOperator | hk.CorrectedOperator
    dense: Tensor


def kronecker(
    A: Tensor, B: Tensor, dtype: torch.dtype, transposed: bool = False, name: str | None = None
) -> Made:
    A, B = A.to(dtype), B.to(dtype)
    K = hk.KroneckerOperator(A, B, transposed=transposed, name=name)
    R = permutation(*K.layer_shape, transposed)
    return Made(K, R @ dense_kronecker(A.double(), B.double()) @ R.T)


def corrected(K: hk.KroneckerOperator, values: Tensor) -> Made:
    """E with these eigenvalues [m, d], its matrix from K's eigenvectors."""
    E = hk.CorrectedOperator(K, values.to(K.dtype))
    left, right, _ = K.eigenbases
    basis = torch.block_diag(
        *(
            torch.kron(u.double().contiguous(), v.double().contiguous())
            for u, v in zip(left, right, strict=True)
        )
    )
    R = permutation(*K.layer_shape, K.transposed)
    Q = R @ basis
    return Made(E, Q @ torch.diag(E.values.double().flatten()) @ Q.T)


def _plain(dtype: torch.dtype) -> Made:
    return kronecker(positive(4), positive(5, 1), dtype)


def _conv1d(dtype: torch.dtype) -> Made:
    return kronecker(positive(3, 2), positive(6, 3), dtype, transposed=True)


def _groups(dtype: torch.dtype) -> Made:
    return kronecker(positive(6, 4), torch.stack([positive(3, i) for i in range(3)]), dtype)


def _single(dtype: torch.dtype) -> Made:
    return kronecker(positive(1, 5), positive(1, 6), dtype)


def _one_output(dtype: torch.dtype) -> Made:
    return kronecker(positive(1, 7), positive(6, 8), dtype)


def _low_rank(dtype: torch.dtype) -> Made:
    return kronecker(positive(4, 9, rank=2), positive(5, 10, rank=3), dtype)


def _ekfac(dtype: torch.dtype) -> Made:
    return corrected(_plain(dtype).operator, randn(4, 5, seed=11).square())  # type: ignore[arg-type]


def _ekfac_conv1d(dtype: torch.dtype) -> Made:
    return corrected(_conv1d(dtype).operator, randn(3, 6, seed=12).square())  # type: ignore[arg-type]


def _ekfac_groups(dtype: torch.dtype) -> Made:
    return corrected(_groups(dtype).operator, randn(6, 3, seed=13).square())  # type: ignore[arg-type]


LAYERS: dict[str, Callable[[torch.dtype], Made]] = {
    "plain": _plain,
    "conv1d": _conv1d,
    "groups": _groups,
    "single": _single,
    "one output": _one_output,
    "low rank": _low_rank,
    "ekfac": _ekfac,
    "ekfac conv1d": _ekfac_conv1d,
    "ekfac groups": _ekfac_groups,
}


def network(dtype: torch.dtype, *names: str) -> tuple[hk.NetworkOperator, Tensor]:
    """All layers (or those named) as a network, and its dense matrix."""
    made = {name: LAYERS[name](dtype) for name in names or LAYERS}
    dense = torch.block_diag(*(layer.dense for layer in made.values()))
    return hk.NetworkOperator({name: layer.operator for name, layer in made.items()}), dense


def power(matrix: Tensor, p: float) -> Tensor:
    """matrix^p of a symmetric positive semi-definite float64 matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).pow(p)) @ vectors.T


def shifted(dense: Tensor, damping: float) -> Tensor:
    return dense + damping * torch.eye(len(dense)).double()
