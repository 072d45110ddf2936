"""Eigendecompositions of many symmetric matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern.ops import foreach

__all__ = ["Eigenpairs", "eigenpairs"]

Eigenpairs = tuple[Tensor, Tensor]
"""Eigenvalues [n] and eigenvectors [n, n], columns."""

# Rows up to which matrices of one size are decomposed together: at 4 rows that takes half the time
# of one by one, from 64 on the same on a CPU, and a copy of all of them.
_TOGETHER = 32


def eigenpairs(matrices: Sequence[Tensor], names: Sequence[str]) -> list[Eigenpairs]:
    """Eigenvalues and eigenvectors of symmetric matrices, computed in float64.

    Args:
        matrices: each [n, n], all on one device; the lower triangle is read.
        names: what they are called in messages.

    Returns:
        per matrix the eigenvalues [n], ascending, in float64 and the eigenvectors [n, n], columns,
        in the matrix's dtype.

    Raises:
        ValueError: a matrix holds NaN or Inf.
    """
    kept = [i for i, matrix in enumerate(matrices) if matrix.numel() > 0]
    if kept:
        flags, order = foreach.are_finite([matrices[i] for i in kept])
        for flag, i in zip(torch.cat(flags).tolist(), order, strict=True):
            if not flag:
                raise ValueError(f"{names[kept[i]]} holds NaN or Inf, and has no eigenvectors")
    sizes: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        sizes.setdefault(len(matrix), []).append(i)
    found: dict[int, Eigenpairs] = {}
    for size, members in sizes.items():
        if size > _TOGETHER:
            for i in members:
                values, vectors = torch.linalg.eigh(matrices[i].double())
                found[i] = values, vectors.to(matrices[i].dtype)
            continue
        values, vectors = torch.linalg.eigh(torch.stack([matrices[i].double() for i in members]))
        for i, own, basis in zip(members, values, vectors, strict=True):
            # Each keeps its own alone, not the stack.
            found[i] = own.clone(), basis.to(matrices[i].dtype, copy=True)
    return [found[i] for i in range(len(matrices))]
