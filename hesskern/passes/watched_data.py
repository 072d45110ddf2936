"""Loaders whose batches may be left out, because nothing but the batch comes of loading one.

What is drawn at random while a batch is loaded, or what its data set remembers of it, makes the
batches behind it other ones. The loading is watched for that where it happens: in this process, or
in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
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
        state: a digest of the data set and of what makes batches of its samples.
        pure: whether loading left the generators and the data set as they were, so far.
        left_out: numbers of the elements that were left out; there from the first element on.
    """

    def __init__(self, loader: DataLoader[Any], state: str) -> None:
        self._loader, self.state = loader, state
        self.pure = True
        self.left_out: list[Numbers | None] = []
        self._here: _Watch | None = None
        # Of every worker, or of this process: how many elements it loaded with the data set's state
        # behind them known.
        self._known = [0] * max(1, loader.num_workers)

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
        state = state_digest((_held(data), data.worker_init_fn))
        return None if state is None else WatchedData(data, state)

    def most(self, seen: int, sure: int) -> int:
        """How many elements of those seen may be left out.

        Every worker loads one of those it has loaded before, and the same worker as before loads
        each of the rest.

        Args:
            seen: elements.
            sure: what :meth:`sure` said then.
        """
        workers = self._loader.num_workers
        return max(0, min(seen - max(1, workers), sure)) // max(1, workers) * max(1, workers)

    def sure(self) -> int:
        """Behind how many elements the data set is known to be as it was; 0 where it is not."""
        if self._here is not None and self.pure:
            # Its state is looked at seldom, and at any rate before someone relies on it.
            self.pure = self._here.pure(True)
            self._known = [self._here.known]
        if not self.pure:
            return 0
        counts = enumerate(self._known)
        return len(self.left_out) + min(count * len(self._known) + at for at, count in counts)

    def behind(self, left_out: int) -> Generator[tuple[Any, Numbers | None], None, None]:
        """The elements behind as many, which are drawn but not loaded."""
        loader, here = self._loader, _Watch()
        self.left_out = []
        changes: dict[str, Any] = {}
        if loader.num_workers:
            there = _InWorker(loader.collate_fn, loader.worker_init_fn)
            changes = {"collate_fn": there.collated, "worker_init_fn": there.begin}
        else:
            self._here = here
            here.begin(_held(loader))
        now = None if loader.num_workers else here.now
        elements, record = recorded(loader, left_out, now, changes)
        for index, element in enumerate(elements):
            while len(self.left_out) < left_out:
                self.left_out.append(numbers_of(loader.dataset, record.drawn.popleft()))
            pure = True
            if loader.num_workers:
                pure, self._known[index % loader.num_workers], element = element
            elif self.pure:
                pure = here.pure()
            numbers = numbers_of(loader.dataset, record.drawn.popleft())
            self.pure = self.pure and pure and numbers is not None
            yield element, numbers


def _held(loader: DataLoader[Any]) -> tuple[Any, Any]:
    """What of a loader may change while it loads."""
    return loader.dataset, loader.collate_fn


class _Watch:
    """Tells whether a process' generators and data set are as they were.

    Attributes:
        known: batches behind which the data set was looked at, and was as before.
    """

    def __init__(self) -> None:
        self._pure = True
        self._count = self.known = 0
        self._held: Any = None
        self._state: str | None = None
        self.now()

    def now(self) -> None:
        """Takes the generators for the state before loading."""
        self._generators = global_generators()

    def begin(self, held: Any) -> None:
        """Takes a data set, and what makes batches of it, for that before loading."""
        self._held, self._state = held, state_digest(held)

    def pure(self, again: bool = False) -> bool:
        """Whether everything is as it was; behind every batch, and ``again`` behind the last."""
        if not again:
            self._count += 1
            if self._pure:
                self._pure = self._state is not None and self._same_generators()
        # The whole of a data set is too much for every batch.
        due = again or self._count & (self._count - 1) == 0
        if self._pure and due and self.known < self._count:
            self._pure = state_digest(self._held) == self._state
            self.known = self._count
        return self._pure

    def _same_generators(self) -> bool:
        found, other = global_generators(), self._generators
        return torch.equal(found[0], other[0]) and found[1:] == other[1:]


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
            self._watch.begin((info.dataset, self._collate))

    def collated(self, samples: Any) -> tuple[bool, int, Any]:
        """In the place of ``collate_fn``: the batch, behind what the watch says of it."""
        element = self._collate(samples)
        if self._watch is None:
            return False, 0, element
        return self._watch.pure(), self._watch.known, element
