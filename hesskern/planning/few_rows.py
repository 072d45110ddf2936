"""Fewer root rows than a pass has: from some number on, every row takes what others took."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from hesskern.passes.losses import Loss, Rows
from hesskern.passes.memory import budget_for
from hesskern.planning.layers import BatchRows
from hesskern.planning.requests import Request

__all__ = ["enough_rows", "held_beyond", "with_few_rows"]

# Root rows that are run on shapes where they go backwards one by one.
_FEW_ROWS = 8


def with_few_rows(loss: Loss, most: int) -> Loss:
    """The loss with the first of its exact rows alone.

    Args:
        loss: any.
        most: rows per sample.
    """
    kind: Any = type(loss)

    # Derived from whatever the loss is, which no checker can know.
    class FewRows(kind):  # type: ignore[misc]
        def exact(self, outputs: Any, targets: Any) -> Rows:
            rows: Rows = super().exact(outputs, targets)
            return replace(rows, count=min(rows.count, most))

    found = copy.copy(loss)
    object.__setattr__(found, "__class__", FewRows)
    return found


def enough_rows(request: Request, rows: BatchRows) -> int:
    """Root rows per sample that are run on shapes; what more of them hold is known."""
    if request.output != "exact" or request.what not in ("factors", "ekfac") or not rows.single:
        return rows.count
    return min(rows.count, _FEW_ROWS)


def held_beyond(request: Request, rows: BatchRows, most: int, device: torch.device) -> int:
    """Bytes of single rows that are kept beside the first ones, until a budget is full."""
    if most >= rows.count:
        return 0
    budget = budget_for(request.memory_budget, device, 2**30, 1 / 16)
    # What is put together of a layer is held twice meanwhile.
    joined = budget // 16
    each = sum(rows.nbytes.values()) // rows.count
    # The first pass of EKFAC is that of the factors.
    kept = min(rows.count, max(most, (budget - joined) // max(1, each)))
    return _put_together(rows, kept, joined) - _put_together(rows, most, joined)


def _put_together(rows: BatchRows, kept: int, limit: int) -> int:
    """Bytes of rows while layer after layer is put together, and its own are let go of.

    Args:
        rows: of a batch.
        kept: root rows that are there.
        limit: bytes of a layer that are put together at a time.
    """
    left = sum(rows.nbytes.values()) // rows.count
    most = 0
    for nbytes in rows.nbytes.values():
        own = nbytes // rows.count
        most = max(most, kept * left + min(limit, kept * own))
        left -= own
    return most
