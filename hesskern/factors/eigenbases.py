"""Eigenvectors of Kronecker factors, layer by layer; the factors are let go of on the way.

Ranks of a group share the matrices out among them, the largest first, each to the rank that has the
least to do so far. All get the eigenvectors of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.choices import Precision
from hesskern.factors.result import LayerFactors
from hesskern.operators.decompositions import eigenpairs
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.shares import shared_out

__all__ = ["Bases", "eigenbases", "shares"]

# Matrices of one size are decomposed together up to this many elements.
_TOGETHER = 2**20


@dataclass
class Bases:
    """Eigenvectors of a layer's factors, in the columns, their eigenvalues ascending.

    Attributes:
        left: per group, U [m/g, m/g] of the output Hessian.
        right: per group, V [d, d] of the input covariance.
    """

    left: list[Tensor]
    right: list[Tensor]


@dataclass
class _Piece:
    """One factor of one group, and where its eigenvectors go."""

    layer: str
    what: str
    matrix: Tensor
    target: list[Tensor]
    group: int


def eigenbases(
    factors: dict[str, LayerFactors],
    precision: Precision,
    devices: dict[str, torch.device],
    dtypes: dict[str, torch.dtype],
    ranks: Ranks | None = None,
) -> dict[str, Bases]:
    """Eigenvectors of every layer's factors.

    Args:
        factors: by layer; emptied, so that a factor's memory is free once its eigenvectors are
            there, if nobody else holds it.
        precision: of the decompositions; where float64 eigenvectors are wanted they are float64
            whatever it says.
        devices, dtypes: by layer, where eigenvectors are computed and stay, and their dtype.
        ranks: that share the work; all call this with the same factors. None: there are no others.

    Raises:
        ValueError: a factor holds NaN or Inf, or has no decomposition; names the layer.
        RankError: that is so on another rank, or it has failed otherwise.
    """
    found, pieces = _taken_apart(factors, devices, dtypes)
    if ranks is None:
        _decompose_all(pieces, precision)
    else:
        _shared(pieces, precision, ranks)
    return found


def _decompose_all(
    pieces: dict[tuple[int, torch.dtype, torch.device], list[_Piece]], precision: Precision
) -> None:
    """Eigenvectors of all matrices, whose memory is let go of; empties the lists."""
    for (size, dtype, device), alike in pieces.items():
        together = max(1, _TOGETHER // max(1, size * size))
        while alike:
            part, alike[:] = alike[:together], alike[together:]
            _decompose(part, precision, dtype, device)


def _shared(
    pieces: dict[tuple[int, torch.dtype, torch.device], list[_Piece]],
    precision: Precision,
    ranks: Ranks,
) -> None:
    """The same on several ranks: each decomposes some of them, and sends what it finds to all."""
    keys = [key for key, alike in pieces.items() for _ in alike]
    owners = shares([size for size, _, _ in keys], ranks.size)
    mine: dict[tuple[int, torch.dtype, torch.device], list[_Piece]] = {}
    sent: list[list[tuple[_Piece, int, torch.dtype, torch.device]]] = [
        [] for _ in range(ranks.size)
    ]
    flat = [piece for alike in pieces.values() for piece in alike]
    pieces.clear()
    for piece, key, owner in zip(flat, keys, owners, strict=True):
        sent[owner].append((piece, *key))
        if owner == ranks.rank:
            mine.setdefault(key, []).append(piece)
        else:
            # Nobody here needs it any more.
            piece.matrix = torch.empty(0)
    with section_of(ranks, "eigendecompositions"):
        _decompose_all(mine, precision)
    for owner, given in enumerate(sent):
        for piece, size, dtype, device in given if owner != ranks.rank else ():
            piece.target[piece.group] = torch.empty(size, size, dtype=dtype, device=device)
        ranks.broadcast_([piece.target[piece.group] for piece, *_ in given], owner)


def shares(sizes: list[int], ranks: int) -> list[int]:
    """Which rank decomposes which matrix, so that the last is done soon.

    By :func:`shared_out`, of the work that a matrix takes, n³.

    Args:
        sizes: n of every matrix.
        ranks: their number.

    Returns:
        a rank for every matrix.
    """
    return shared_out([size**3 for size in sizes], ranks)


def _taken_apart(
    factors: dict[str, LayerFactors],
    devices: dict[str, torch.device],
    dtypes: dict[str, torch.dtype],
) -> tuple[dict[str, Bases], dict[tuple[int, torch.dtype, torch.device], list[_Piece]]]:
    """Room for eigenvectors, and the matrices that they are of, by size, dtype and device."""
    found: dict[str, Bases] = {}
    pieces: dict[tuple[int, torch.dtype, torch.device], list[_Piece]] = {}
    for name in list(factors):
        layer = factors.pop(name)
        groups = layer.groups
        step = layer.layer_shape[0] // groups
        bases = found[name] = Bases([torch.empty(0)] * groups, [torch.empty(0)] * groups)
        covariances = layer.input_covariance
        for group in range(groups):
            rows = slice(group * step, (group + 1) * step)
            output = layer.output_hessian[rows, rows]
            inputs = covariances[group] if covariances.dim() == 3 else covariances
            for what, matrix, target in (
                ("output Hessian", output, bases.left),
                ("input covariance", inputs, bases.right),
            ):
                key = len(matrix), dtypes[name], devices[name]
                pieces.setdefault(key, []).append(_Piece(name, what, matrix, target, group))
    return found, pieces


def _decompose(
    pieces: list[_Piece], precision: Precision, dtype: torch.dtype, device: torch.device
) -> None:
    """Eigenvectors of matrices of one size."""
    matrices = [piece.matrix.to(device, dtype) for piece in pieces]
    names = [f"the {piece.what} of layer {piece.layer!r}" for piece in pieces]
    for piece, (_, vectors) in zip(pieces, eigenpairs(matrices, names, precision), strict=True):
        piece.target[piece.group] = vectors.contiguous()
