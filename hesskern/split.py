"""A positive semi-definite operator as the sum of a cheap part and a small rest."""

from __future__ import annotations

from dataclasses import dataclass

from hesskern.subspace import SymmetricOperator

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """H = heavy + light, both positive semi-definite.

    Attributes:
        heavy: [P, P] most of H, cheap to multiply with.
        light: [P, P] the rest.
        share: part of a product with H that a product with ``heavy`` costs, in (0, 1).
        bound: certified bound on ‖light‖_2.
    """

    heavy: SymmetricOperator
    light: SymmetricOperator
    share: float
    bound: float
