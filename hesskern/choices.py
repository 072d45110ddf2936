"""Arguments that take one of a few words: their types, and the check while running."""

from __future__ import annotations

from typing import Any, Literal, get_args

__all__ = ["Bias", "Order", "Output", "Which", "check_choice"]

Output = Literal["exact", "mc", "empirical"]
"""How the output Hessian is had: all classes, targets drawn from the model, those of the data."""

Bias = Literal["none", "joint"]
"""Weights only, or 1 appended to the inputs where a layer has a bias."""

Order = Literal["weight", "output"]
"""Flat vectors of a layer as its weight is kept in memory, or as matrices [m, d], flattened."""

Which = Literal["LA", "SA", "LM"]
"""The eigenvalues that are wanted: largest, smallest, or largest in absolute value."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless the argument called ``name`` is one of a Literal's words."""
    words = get_args(choices)
    if value not in words:
        *others, last = map(repr, words)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
