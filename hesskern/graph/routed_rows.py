"""Rows that belong to samples in no regular order, as those of a routed expert do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["RoutedRows", "merged_owners", "regular", "scattered"]


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """Rows of which each belongs to one sample, some of them to none.

    By sample they stand in as many positions as the sample with the most rows has; those that are
    left over hold zeros.

    Attributes:
        owners: [R] int64, sample of every row, R >= 1.
        samples: N.
    """

    owners: Tensor
    samples: int

    @cached_property
    def counts(self) -> Tensor:
        """[N] int64 rows of every sample."""
        return torch.bincount(self.owners, minlength=self.samples)

    @cached_property
    def positions(self) -> int:
        """Rows of the sample that has the most."""
        return int(self.counts.max())

    @cached_property
    def valid(self) -> Tensor:
        """[N, positions] bool, which positions hold a row."""
        return torch.arange(self.positions, device=self.owners.device) < self.counts.unsqueeze(1)

    @cached_property
    def _places(self) -> Tensor:
        """[R] where every row stands among [N positions]."""
        order = torch.argsort(self.owners, stable=True)
        begins = self.counts.cumsum(0) - self.counts
        owners = self.owners[order]
        within = torch.arange(len(order), device=order.device) - begins[owners]
        places = torch.empty_like(order)
        places[order] = owners * self.positions + within
        return places

    def by_sample(self, rows: Tensor) -> Tensor:
        """[N, positions, ...] of rows [R, ...], zeros where there is none."""
        out = rows.new_zeros(self.samples * self.positions, *rows.shape[1:])
        out.index_copy_(0, self._places, rows)
        return out.unflatten(0, (self.samples, self.positions))


def scattered(owners: Tensor, index: Tensor, size: int) -> Tensor | None:
    """Owners [size] of entries, each taken as often as ``index`` holds its number.

    Args:
        owners: [R] of what was taken; -1: nobody's.
        index: [R] numbers of entries.
        size: how many entries there are.

    Returns:
        -1 for an entry that was not taken; None where one belongs to several samples.
    """
    known = owners >= 0
    owners, index = owners[known], index[known]
    high = owners.new_full((size,), -1).scatter_reduce_(0, index, owners, "amax")
    if not torch.equal(high[index], owners):
        return None
    return high


def merged_owners(first: Tensor, second: Tensor) -> Tensor | None:
    """Owners of entries on which both act; None where an entry then has several."""
    both = (first >= 0) & (second >= 0)
    if bool((both & (first != second)).any()):
        return None
    return torch.maximum(first, second)


def regular(owners: Tensor, samples: int) -> int | None:
    """The number i of neighbours where entry r belongs to sample (r // i) % samples, or None."""
    size = len(owners)
    if not size or size % samples:
        return None
    other = (owners != owners[0]).nonzero()
    inner = int(other[0]) if len(other) else size
    if size % (inner * samples):
        return None
    expected = torch.arange(size, device=owners.device) // inner % samples
    return inner if torch.equal(owners, expected) else None
