"""Eigendecompositions of many symmetric matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern.choices import Precision
from hesskern.ops import foreach

__all__ = ["Eigenpairs", "eigenpairs"]

Eigenpairs = tuple[Tensor, Tensor]
"""Eigenvalues [n] and eigenvectors [n, n], columns."""

# Rows up to which matrices of one size are decomposed together: at 4 rows that takes half the time
# of one by one, from 64 on the same on a CPU, and a copy of all of them.
_TOGETHER = 32


def eigenpairs(
    matrices: Sequence[Tensor], names: Sequence[str], precision: Precision = "float64"
) -> list[Eigenpairs]:
    """Eigenvalues and eigenvectors of symmetric matrices.

    Args:
        matrices: each [n, n], all on one device; the lower triangle is read.
        names: what they are called in messages.
        precision: of the decompositions; those of float64 matrices are float64 whatever it says.

    Returns:
        per matrix the eigenvalues [n], ascending, in the decomposition's precision, and the
        eigenvectors [n, n], columns, in the matrix's dtype.

    Raises:
        ValueError: a matrix holds NaN or Inf, or has no decomposition.
    """
    kept = [i for i, matrix in enumerate(matrices) if matrix.numel() > 0]
    if kept:
        flags, order = foreach.are_finite([matrices[i] for i in kept])
        for flag, i in zip(torch.cat(flags).cpu().tolist(), order, strict=True):
            if not flag:
                raise ValueError(f"{names[kept[i]]} holds NaN or Inf, and has no eigenvectors")
    sizes: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        sizes.setdefault(len(matrix), []).append(i)
    found: dict[int, Eigenpairs] = {}
    for size, members in sizes.items():
        if size > _TOGETHER:
            for i in members:
                values, vectors = _decomposed([matrices[i]], [names[i]], precision)
                found[i] = values[0], vectors[0].to(matrices[i].dtype)
            continue
        stacked = [matrices[i] for i in members], [names[i] for i in members]
        values, vectors = _decomposed(*stacked, precision)
        for i, own, basis in zip(members, values, vectors, strict=True):
            # Each keeps its own alone, not the stack.
            found[i] = own.clone(), basis.to(matrices[i].dtype, copy=True)
    return [found[i] for i in range(len(matrices))]


def _decomposed(
    matrices: list[Tensor], names: list[str], precision: Precision
) -> tuple[Tensor, Tensor]:
    """Eigenvalues [k, n] and eigenvectors [k, n, n] of matrices of one size."""
    narrow = precision == "float32" and all(m.dtype != torch.float64 for m in matrices)
    # What does not converge in float32 may do so in float64. LAPACK does not always say so: of
    # finite matrices of rank one it gives NaN at times.
    error: Exception
    for dtype in (torch.float32, torch.float64) if narrow else (torch.float64,):
        wide = [matrix.to(dtype) for matrix in matrices]
        together = wide[0].unsqueeze(0) if len(wide) == 1 else torch.stack(wide)
        try:
            values, vectors = torch.linalg.eigh(together)
        except torch.linalg.LinAlgError as found:  # type: ignore[attr-defined]
            error = found
            continue
        flags, _ = foreach.are_finite([values, vectors])
        if bool(torch.cat(flags).cpu().all()):
            return values, vectors
        error = ValueError("linalg.eigh gave NaN or Inf")
    raise ValueError(f"no eigendecomposition of {', '.join(names)} ({error})") from error
