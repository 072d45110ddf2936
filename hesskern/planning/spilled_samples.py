"""What samples take in memory while those above a budget go elsewhere."""

from __future__ import annotations

from collections.abc import Collection

from hesskern.operators.spilled import piece_bytes, waiting_bytes
from hesskern.planning.layers import BatchRows

__all__ = ["batches_until_spilling", "held_while_spilling"]


# Batches that are run on shapes at most. Of more, each is little of what is held.
_MOST = 24


def batches_until_spilling(rows: BatchRows, batches: int, budget: int) -> int | None:
    """How many batches it takes until samples go as fast as they come; None where it is many.

    Args:
        rows: of a batch.
        batches: of the pass.
        budget: of the call.
    """
    each = max(1, sum(rows.samples.values()))
    filled = (budget + 2 * waiting_bytes(budget, len(rows.samples)) + piece_bytes()) // each + 3
    found = min(batches, filled)
    return found if found <= _MOST else None


def held_while_spilling(
    batches: int, rows: BatchRows, spilled: Collection[str], budget: int
) -> int:
    """The most bytes of samples held at a time, of all layers.

    They grow up to the budget as often as a layer is spilled, and beside it wait those that have
    been, until they are many.

    Args:
        batches: of the pass.
        rows: of a batch.
        spilled: the layers that are spilled in the end.
        budget: of the call.
    """
    each = sum(rows.samples.values())
    if not spilled:
        return each * batches
    # Pieces over root rows of one batch have their inputs in common, which count once a piece.
    step = min(rows.count, max(1, budget // 8 * rows.count // max(1, sum(rows.nbytes.values()))))
    again = -(-rows.count // step) - 1
    counted = each + again * sum(max(0, rows.samples[n] - rows.nbytes[n]) for n in rows.samples)
    gone = batches * sum(rows.samples[name] for name in spilled)
    waiting = min(gone, waiting_bytes(budget, len(spilled)) * each // max(1, counted))
    # What is put together of the fullest layer, more than the others on the average, is held twice.
    together = min(piece_bytes(), 2 * waiting // len(spilled))
    held = min(each * batches, budget + waiting)
    return held + together * (each * batches > budget)
