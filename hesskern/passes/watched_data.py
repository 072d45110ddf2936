"""Loaders whose batches may be left out, because nothing but the batch comes of loading one.

What is drawn at random while a batch is loaded, or what its data set remembers of it, makes the
batches behind it other ones. The loading is watched for that where it happens: in this process, or
in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from hesskern.passes.data_set_state import state_digest
from hesskern.passes.generators import global_generators
from hesskern.passes.loaders import readable, recorded, sampler_name
from hesskern.passes.sample_numbers import Numbers, numbers_of

__all__ = ["WatchedData"]


class WatchedData:
    """The elements of a loader, each with its samples' numbers, while their loading is watched.

    Args:
        loader: one that :meth:`of` takes.

    Attributes:
        state: a digest of the data set.
        pure: whether loading left the generators and the data set as they were, so far.
        left_out: numbers of the elements that were left out; there from the first element on.
    """

    def __init__(self, loader: DataLoader[Any], state: str) -> None:
        self._loader, self.state = loader, state
        self.pure = True
        self.left_out: list[Numbers | None] = []

    @staticmethod
    def of(data: Any) -> WatchedData | None:
        """A loader, if batches of it can be left out at all.

        That is torch's own over a map-style data set whose state can be told, with samplers that
        can be iterated once more, and without workers that persist.
        """
        if type(data) is not DataLoader or not readable(data):
            return None
        sampler: Any = getattr(data, sampler_name(data))
        once = any(isinstance(s, Iterator) for s in (sampler, getattr(sampler, "sampler", None)))
        if once or (data.num_workers and data.persistent_workers):
            return None
        state = state_digest(data.dataset)
        return None if state is None else WatchedData(data, state)

    def most(self, seen: int) -> int:
        """How many elements of those seen may be left out.

        Every worker loads one of those it has loaded before, and the same worker as before loads
        each of the rest.
        """
        workers = self._loader.num_workers
        return max(0, seen - 1) if not workers else max(0, (seen - workers) // workers * workers)

    def behind(self, left_out: int) -> Generator[tuple[Any, Numbers | None], None, None]:
        """The elements behind as many, which are drawn but not loaded."""
        loader, here = self._loader, _Watch()
        self.left_out = []
        changes: dict[str, Any] = {}
        if loader.num_workers:
            there = _InWorker(loader.collate_fn, loader.worker_init_fn)
            changes = {"collate_fn": there.collated, "worker_init_fn": there.begin}
        else:
            here.begin(loader.dataset, self.state)
        now = None if loader.num_workers else here.now
        elements, record = recorded(loader, left_out, now, changes)
        for element in elements:
            while len(self.left_out) < left_out:
                self.left_out.append(numbers_of(loader.dataset, record.drawn.popleft()))
            pure = True
            if loader.num_workers:
                pure, element = element
            elif self.pure:
                pure = here.pure()
            numbers = numbers_of(loader.dataset, record.drawn.popleft())
            self.pure = self.pure and pure and numbers is not None
            yield element, numbers


class _Watch:
    """Tells whether a process' generators and data set are as they were."""

    def __init__(self) -> None:
        self._pure = True
        self._count = 0
        self._dataset: Any = None
        self._state: str | None = None
        self.now()

    def now(self) -> None:
        """Takes the generators for the state before loading."""
        self._generators = global_generators()

    def begin(self, dataset: Any, state: str | None) -> None:
        """Takes a data set and its state for that before loading."""
        self._dataset, self._state = dataset, state

    def pure(self) -> bool:
        """Whether everything is as it was; behind every batch."""
        self._count += 1
        if self._pure:
            self._pure = self._state is not None and _same(global_generators(), self._generators)
        # The whole of a data set is too much for every batch.
        if self._pure and self._count & (self._count - 1) == 0:
            self._pure = state_digest(self._dataset) == self._state
        return self._pure


class _InWorker:
    """What a loader's worker calls instead of the loader's own functions, to be watched."""

    def __init__(self, collate: Any, begin: Any) -> None:
        self._collate, self._begin = collate, begin
        self._watch: _Watch | None = None

    def begin(self, worker: int) -> None:
        """In the place of ``worker_init_fn``."""
        if self._begin is not None:
            self._begin(worker)
        info = get_worker_info()
        if info is not None:
            self._watch = _Watch()
            self._watch.begin(info.dataset, state_digest(info.dataset))

    def collated(self, samples: Any) -> tuple[bool, Any]:
        """In the place of ``collate_fn``: the batch, behind whether loading it left no trace."""
        element = self._collate(samples)
        return self._watch is not None and self._watch.pure(), element


def _same(found: tuple[Tensor, bytes, bytes], other: tuple[Tensor, bytes, bytes]) -> bool:
    return torch.equal(found[0], other[0]) and found[1:] == other[1:]
