"""Arguments that take one of a few words: their types. Checks of settings while running."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

__all__ = [
    "Bias",
    "Method",
    "Order",
    "Output",
    "Precision",
    "PublishedMethod",
    "Which",
    "check_choice",
    "check_counts",
    "check_positive",
]

Output = Literal["exact", "mc", "empirical"]
"""How the output Hessian is had: all classes, targets drawn from the model, those of the data."""

Bias = Literal["none", "joint"]
"""Weights only, or 1 appended to the inputs where a layer has a bias."""

Precision = Literal["float32", "float64"]
"""In which precision eigenvectors of float32 matrices are computed."""

Order = Literal["weight", "output"]
"""Flat vectors of a layer as its weight is kept in memory, or as matrices [m, d], flattened."""

Which = Literal["LA", "SA", "LM"]
"""The eigenvalues that are wanted: largest, smallest, or largest in absolute value."""

PublishedMethod = Literal["base", "appr", "iter", "iter_d", "iter_m"]
"""How a certificate's posterior is found, as published."""

Method = Literal["truncated", PublishedMethod]
"""The same with ours."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless the argument called ``name`` is one of a Literal's words."""
    words = get_args(choices)
    if value not in words:
        *others, last = map(repr, words)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def check_counts(settings: Any, *names: str) -> None:
    """Raises ValueError unless these attributes are None or at least 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_positive(settings: Any, *names: str) -> None:
    """Raises ValueError unless these attributes are None, or positive and finite."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
