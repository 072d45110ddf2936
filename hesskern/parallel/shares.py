"""Who of several ranks does, or keeps, which of many things."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["shared_out"]


def shared_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """Shares things out so that no rank has much more than the others.

    The largest first, each to the rank that has the least so far (Graham 1969: the fullest has at
    most a third more than under the best sharing).

    Args:
        sizes: of the things: work, or bytes.
        ranks: their number.

    Returns:
        a rank for every thing.
    """
    owners, held = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = min(range(ranks), key=held.__getitem__)
        held[owners[i]] += sizes[i]
    return owners
