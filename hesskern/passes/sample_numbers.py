"""Which sample is which: numbers that stay a sample's own however the data comes.

A DataLoader draws its batches as lists of indices of its data set and keeps them to itself. They
are read here beside the batches. What has none is numbered by its position.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hesskern.parallel.ranks import Ranks
from hesskern.passes.loaders import readable, recorded

__all__ = ["NumberedData", "Numbers", "Positions", "numbered", "numbers_of"]

# Added to the part of samples that are numbered in another way than those around them.
_APART = 2**30

_Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Numbers:
    """Numbers of samples.

    Attributes:
        values: [N] int64.
        part: 0 where they are the samples' numbers in the data as a whole; r + 1 where they are
            positions in the part of the data that process r passes (0 where it is alone).
    """

    values: _Array
    part: int = 0

    @staticmethod
    def none() -> Numbers:
        """Those of no samples."""
        return Numbers(np.empty(0, dtype=np.int64), 1)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def known(self) -> bool:
        """Whether they are the samples' own, rather than where they stand."""
        return self.part == 0

    def of(self, samples: slice) -> Numbers:
        """Those of some of the samples."""
        return Numbers(self.values[samples], self.part)

    @staticmethod
    def joined(numbers: list[Numbers]) -> Numbers:
        """One batch's behind another's, all of one part."""
        return Numbers(np.concatenate([each.values for each in numbers]), numbers[0].part)

    def inside(self, samples: int) -> Numbers:
        """Numbers [samples] apart from all others, for a batch that has another count of them."""
        first = int(self.values[0]) if len(self.values) else 0
        begin = first * 2**24
        return Numbers(np.arange(begin, begin + samples, dtype=np.int64), _apart(self.part))


def _apart(part: int) -> int:
    return part if part >= _APART else part + _APART


class Positions:
    """Numbers samples by their positions, from batch to batch.

    Args:
        part: of the numbers.
        begin: position of the first sample.

    Attributes:
        next: position of the sample behind the last batch.
    """

    def __init__(self, part: int = 1, begin: int = 0) -> None:
        self._part, self.next = part, begin

    @staticmethod
    def of(ranks: Ranks | None, begin: int = 0) -> Positions:
        """Those of a rank's part of the data, apart from all other ranks'."""
        return Positions(1 if ranks is None else ranks.rank + 1, begin)

    def take(self, count: int, own: Numbers | None, others_own: bool) -> Numbers:
        """The numbers of the next batch.

        Args:
            count: of its samples.
            own: the data's numbers of them, which count where there are as many; None: unknown.
            others_own: whether other batches of the data come with numbers of their own.
        """
        begin = self.next
        self.next += count
        if own is not None and len(own) == count:
            return own
        part = _apart(self._part) if others_own else self._part
        return Numbers(np.arange(begin, begin + count, dtype=np.int64), part)


class NumberedData:
    """The elements of the data, each with its samples' numbers where the data has them.

    It has them where it is a DataLoader of torch that draws lists of indices of a map-style data
    set: they are these indices, in the data set that a ``Subset`` is made of. Whether there are as
    many of them as the element has samples (a ``collate_fn`` may leave some out) is not looked at.

    Args:
        data: iterable.

    Attributes:
        data: as given.
        known: whether the data draws indices that can be read.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.known = readable(data)

    def __iter__(self) -> Iterator[tuple[Any, Numbers | None]]:
        if not self.known:
            for element in self.data:
                yield element, None
            return
        assert isinstance(self.data, DataLoader)
        elements, record = recorded(self.data)
        for element in elements:
            yield element, numbers_of(self.data.dataset, record.drawn.popleft())


def numbered(data: Iterable[Any]) -> Iterator[tuple[Any, Numbers | None]]:
    """The elements of the data, each with its samples' numbers where the data has them."""
    return iter(NumberedData(data))


def numbers_of(dataset: Any, drawn: Any) -> Numbers | None:
    """The numbers of a batch's indices; None where they are none."""
    if isinstance(drawn, (Tensor, np.ndarray)):
        drawn = drawn.tolist()
    if not isinstance(drawn, (list, tuple, range)):
        return None
    try:
        values = [operator.index(index) for index in drawn]
        while type(dataset) is Subset:
            values = [operator.index(dataset.indices[index]) for index in values]
            dataset = dataset.dataset
        found = np.array(values, dtype=np.int64)
        if len(found) and found.min() < 0:
            # Counted from the end.
            found = np.where(found < 0, found + len(dataset), found)
    except (TypeError, IndexError, OverflowError):
        return None
    return Numbers(found)
