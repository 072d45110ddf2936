"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

__all__ = ["counted", "listed", "number", "percent", "seconds", "span"]


def number(value: float | None) -> str:
    """About three significant digits; exponents only where they cannot be helped."""
    if value is None:
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if 0.0005 <= size < 0.9995:
        return f"{value:.3f}"
    if 0.9995 <= size < 99.95:
        return f"{value:.2f}"
    if 99.95 <= size < 1e6:
        return f"{value:,.0f}"
    return f"{value:.2e}"


def percent(share: float) -> str:
    """A share of one as per cent, with a space that does not break."""
    value = 100 * share
    digits = f"{value:.1g}" if value < 0.1 else f"{value:.0f}" if 9.95 <= value < 99 else ""
    return f"{digits or format(value, '.1f')}\u00a0%"


def span(values: Iterable[float], show: Callable[[float], str] = number) -> str:
    """``low to high``, or one number where both read the same."""
    ordered = sorted(values)
    low, high = show(ordered[0]), show(ordered[-1])
    return low if low == high else f"{low} to {high}"


def seconds(value: float) -> str:
    """A duration in seconds."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def counted(count: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
