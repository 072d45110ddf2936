"""Numbers of nested results, held against each other."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["differences"]


def differences(first: Any, second: Any, but: str, close: float) -> list[str]:
    """Places at which numbers differ.

    Args:
        first, second: nested dicts and lists.
        but: words; numbers with one of them in the name of their place are let be.
        close: how far numbers may be apart, relatively or, where they are below 1, absolutely.
    """
    one, two = _numbers(first), _numbers(second)
    assert one.keys() == two.keys()
    left_out = but.split()
    return [
        f"{name}: {one[name]} and {two[name]}"
        for name in one
        if not any(word in name for word in left_out)
        and not math.isclose(one[name], two[name], rel_tol=close, abs_tol=close)
    ]


def _numbers(value: Any, place: str = "") -> dict[str, float]:
    """All numbers of a nested result, by where they stand."""
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in parts for k, v in _numbers(part, f"{place}/{key}").items()}
    return {place: float(value)} if isinstance(value, (int, float)) else {}
