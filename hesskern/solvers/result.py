"""Result objects shared by the eigensolvers and by the operators that know their own eigenpairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["EigenResult"]


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of a symmetric operator on R^P, the most wanted first.

    Attributes:
        values: [k], the operator's dtype. Descending for ``which="LA"``, ascending for ``"SA"``,
            descending in absolute value for ``"LM"``.
        vectors: [P, k], orthonormal columns, the operator's dtype and device.
        residuals: [k], ``‖H v - λ v‖ / |λ_1|`` with λ_1 the eigenvalue of largest magnitude: for a
            positive semi-definite operator and for ``"LM"`` this is ``values[0]``, else the
            largest absolute Ritz value that the solver met. Where the operator carries a
            certified bound on what it leaves out (``pruning_error``), ``bound / |λ_1|`` is added.
        converged: whether the solver's own residuals are all within the tolerance.
        matvecs: products with the operator, counted by single vectors; 0 where none was needed.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    matvecs: int
