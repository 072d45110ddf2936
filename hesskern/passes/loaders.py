"""What torch's DataLoader draws for its batches, read beside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["Record", "readable", "recorded", "sampler_name"]


class Record:
    """A sampler that remembers what it has drawn.

    Args:
        sampler: of a loader.
        left_out: how many draws, the first ones, its loader does not get to see.
        seen: called before its loader gets one.

    Attributes:
        drawn: what nobody has taken from here yet, the first first.
    """

    def __init__(
        self, sampler: Any, left_out: int = 0, seen: Callable[[], None] | None = None
    ) -> None:
        self._sampler, self._left_out, self._seen = sampler, left_out, seen
        self.drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        # Begun at once, as a loader expects of a sampler that draws random numbers then.
        return self._walk(iter(self._sampler), deque())

    def _walk(self, samples: Iterator[Any], drawn: deque[Any]) -> Iterator[Any]:
        # A loader with workers begins twice and goes on with the second.
        self.drawn = drawn
        for count, sample in enumerate(samples):
            drawn.append(_copied(sample))
            if count < self._left_out:
                continue
            if self._seen is not None:
                self._seen()
            yield sample

    def __len__(self) -> int:
        return len(self._sampler)


def readable(data: Any) -> bool:
    """Whether what a loader draws can be read, and comes in the order of its batches."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return False
    usual = all(
        getattr(type(data), name) is getattr(DataLoader, name, None) and name not in vars(data)
        for name in ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
    )
    return usual and (not data.num_workers or getattr(data, "in_order", True))


def recorded(
    loader: DataLoader[Any],
    left_out: int = 0,
    seen: Callable[[], None] | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Iterator[Any], Record]:
    """A loader's batches, and the record of what it draws for them.

    Args:
        loader: that is readable.
        left_out, seen: as of :class:`Record`.
        changes: attributes of the loader that are other ones for this iteration; none where its
            workers persist.
    """
    name = sampler_name(loader)
    own: Any = getattr(loader, name)
    record = Record(own, left_out, seen)
    workers = loader.persistent_workers and loader.num_workers > 0
    running: Any = loader._iterator if workers else None
    if running is not None:
        # Its workers are there; they are begun anew.
        running._index_sampler = record
        try:
            return iter(loader), record
        finally:
            running._index_sampler = own
    # The loader itself stays as it is, and refuses another sampler.
    twin = object.__new__(type(loader))
    vars(twin).update(vars(loader))
    vars(twin).update({**changes, name: record})
    elements: Any = iter(twin)
    if workers:
        elements._index_sampler = own
        loader._iterator = elements
    return elements, record


def sampler_name(loader: DataLoader[Any]) -> str:
    """Which of a loader's samplers says what is an element."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def _copied(sample: Any) -> Any:
    """What was drawn, safe from who may change it."""
    return list(sample) if isinstance(sample, list) else sample
