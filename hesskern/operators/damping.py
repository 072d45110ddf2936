"""What is added to a curvature's eigenvalues, and which of them count as zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Damping",
    "Extent",
    "check_damping",
    "check_invertible",
    "resolved",
    "rounding",
    "said",
    "settled",
]

Damping = float | Literal["mean"]
"""A number >= 0, or a tenth of the mean eigenvalue."""

# Of the mean eigenvalue, what "mean" adds.
_MEAN_SHARE = 0.1


def said(name: str | None) -> str:
    """A layer in a message."""
    return "the operator" if name is None else f"layer {name!r}"


def check_damping(damping: object, name: str | None) -> None:
    """Raises unless this is a finite number >= 0 or "mean".

    Raises:
        TypeError: it is neither a number nor a word.
        ValueError: it is negative, NaN, infinite or another word.
    """
    if isinstance(damping, str):
        if damping != "mean":
            raise ValueError(f"damping must be a number or 'mean', got {damping!r}")
        return
    if isinstance(damping, bool) or not isinstance(damping, Real):
        raise TypeError(f"damping must be a number or 'mean', got {type(damping).__name__}")
    number = float(damping)
    if not 0 <= number < math.inf:
        where = "" if name is None else f" for {said(name)}"
        raise ValueError(f"damping must be finite and >= 0, got {number:g}{where}")


def resolved(damping: Damping, trace: float, size: int, name: str | None) -> float:
    """The number that is added to every eigenvalue of a layer.

    Raises:
        TypeError, ValueError: as :func:`check_damping`; or the damping is "mean" and the trace not
            positive.
    """
    check_damping(damping, name)
    if not isinstance(damping, str):
        return float(damping)
    if not 0 < trace < math.inf:
        raise ValueError(
            f"damping 'mean' is a tenth of the mean eigenvalue, but the trace of {said(name)} is "
            f"{trace:g}: give a number"
        )
    return _MEAN_SHARE * trace / size


def rounding(largest: float, size: int, dtype: torch.dtype) -> float:
    """What eigenvalues of a symmetric matrix may be off by: eps n max |value|.

    Below it numpy's and torch's ``matrix_rank`` take them for zero.

    Args:
        largest: absolute eigenvalue.
        size: n, rows of the matrix.
        dtype: in which the matrix was summed.
    """
    return torch.finfo(dtype).eps * size * largest


@dataclass(frozen=True)
class Extent:
    """How far eigenvalues reach, as the host knows it.

    Attributes:
        least: the least one, those below zero by no more than rounding being zero.
        largest: the largest absolute value.
        rank: how many are beyond rounding.
        size: how many there are.
    """

    least: float
    largest: float
    rank: int
    size: int


def settled(values: Sequence[Tensor], name: str | None) -> tuple[list[Tensor], Extent]:
    """Eigenvalues with those below zero by rounding at zero, and how far they reach.

    Args:
        values: per group, [r, q], with the rounding of their dtype.
        name: of the layer.

    Raises:
        ValueError: one is NaN or infinite.
    """
    whole = torch.stack(list(values))
    largest = whole.abs().amax((1, 2), keepdim=True)
    eps = torch.finfo(whole.dtype).eps
    small = whole.abs() <= eps * max(whole.shape[1:]) * largest
    below = small & (whole < 0)
    clamped = whole.masked_fill(below, 0.0)
    least, top, rank, touched = torch.stack(
        [n.double() for n in (clamped.amin(), largest.amax(), (~small).sum(), below.any())]
    ).tolist()
    if not top < math.inf:
        raise ValueError(f"the eigenvalues of {said(name)} hold NaN or Inf")
    extent = Extent(least, top, int(rank), whole.numel())
    # The same memory wherever it serves.
    return list(clamped.unbind()) if touched else list(values), extent


def check_invertible(
    extent: Extent, damping: float, dtype: torch.dtype, name: str | None, what: str
) -> None:
    """Raises ValueError where an eigenvalue and the damping sum to nothing that can be inverted.

    Negative eigenvalues are for the caller to look at: whether one of them is met by the damping
    is not known from an extent.
    """
    if damping == 0 and extent.rank < extent.size:
        raise ValueError(
            f"{what} needs damping > 0: {said(name)} is singular, of rank {extent.rank} of "
            f"{extent.size} to {str(dtype).removeprefix('torch.')}'s rounding"
        )
    smallest = extent.least + damping
    if smallest >= 0 and smallest * torch.finfo(dtype).max < 1:
        raise ValueError(
            f"damping of {damping:g} is too small for {said(name)}: {what} passes the range of "
            f"{dtype}"
        )
