"""The way of a pass through its data: what it has seen, and where it goes on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesskern.digests import digest
from hesskern.passes.generators import generator_states, generators_digest, go_back
from hesskern.passes.sample_numbers import NumberedData, Numbers
from hesskern.passes.watched_data import WatchedData

__all__ = ["Course"]


class Course:
    """Hands out the elements of the data that a pass has not seen, and digests all of them.

    The digest of an element goes on from that of the one before. An element that the pass has seen
    is loaded again and compared: where it is another, the data are others.

    Of a loader whose batches can be left out (:class:`WatchedData`) all but the last are only
    drawn, if the state of its data set is what it was, and their indices, the generators behind
    them and the last elements themselves have the digests that they had. Where anything of that is
    not so, all of them are loaded.

    Args:
        where: the checkpoint, for messages.
        device: of the model.
        data: that are about to be iterated.
        state: from :meth:`state`; None for a pass that begins.

    Attributes:
        samples: how many samples the elements so far have had, as far as weights needed it.
        position: number of the next sample, by its position.
        batches: the elements so far.
    """

    def __init__(
        self,
        where: str,
        device: torch.device,
        data: Iterable[Any],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._where, self._device = where, device
        self._begun = state is not None
        if state is None:
            state = {
                "batches": 0,
                "samples": 0,
                "position": 0,
                "digests": _bytes([]),
                "length": _length(data),
                "generators": generator_states(data, device),
                "left out": None,
            }
        self.samples, self.position = int(state["samples"]), int(state["position"])
        self.batches = self._seen = int(state["batches"])
        # Both, behind the elements that were handed out.
        self._counts = [(self.samples, self.position)]
        self._data = data
        self._expected = _hexadecimal(state["digests"])
        self._digests = list(self._expected)
        self._length, self._generators = state["length"], state["generators"]
        self._found: Any = state.get("left out")
        self._watched: WatchedData | None = None
        # Digests of the indices and of the generators, behind each of the elements.
        self._traces: list[tuple[str, str]] = []

    def elements(self, given: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """(index, element) of those that are new, with what goes along with each.

        Args:
            given: the data's elements, each with something else.

        Raises:
            ValueError: the data are not those of the checkpoint.
        """
        self._open()
        if isinstance(given, NumberedData):
            self._watched = WatchedData.of(given.data)
        first = self._seen
        rest: Iterator[tuple[Any, Any]] | None = self._behind_seen()
        if rest is None:
            rest, first, self._traces = iter(given), 0, []
            if self._watched is not None:
                rest = self._watched.behind(0)
        last = self._expected[first - 1] if first else ""
        count = first
        for index, (element, beside) in enumerate(rest, first):
            self._trace(beside)
            last = digest(element, last)
            count = index + 1
            if index < self._seen:
                if last != self._expected[index]:
                    raise self.other(f"batch {index} is another one")
                continue
            self._digests.append(last)
            self.batches = count
            yield index, (element, beside)
        if count < self._seen:
            raise self.other(f"there are {count} of the {self._seen} batches that were seen")

    def _behind_seen(self) -> Generator[tuple[Any, Any], None, None] | None:
        """The elements behind those that were seen, most of which are left out.

        Returns:
            None where all have to be loaded; everything is then as it was before.
        """
        watched, before = self._watched, self._found
        if watched is None or before is None or watched.state != before["state"]:
            return None
        left_out = watched.most(self._seen, int(before.get("sure", 0)))
        if not left_out:
            return None
        rest = watched.behind(left_out)
        if not self._seen_again(watched, rest, left_out):
            # Ends workers.
            rest.close()
            self._watched = WatchedData.of(self._data)
            self._open()
            return None
        return rest

    def _seen_again(self, watched: WatchedData, rest: Iterator[Any], left_out: int) -> bool:
        """Draws and loads what was seen; whether it is what it was."""
        self._traces, last = [], self._expected[left_out - 1]
        for index in range(left_out, self._seen):
            element, beside = next(rest, (None, None))
            if not self._traces:
                for numbers in watched.left_out:
                    self._trace(numbers, "")
            self._trace(beside)
            last = digest(element, last)
            if last != self._expected[index]:
                return False
        behind = self._found["indices"], self._found["generators"]
        return watched.pure and len(self._traces) == self._seen and self._traces[-1] == behind

    def _trace(self, numbers: Numbers | None, generators: str | None = None) -> None:
        """Takes note of an element that was drawn, and mostly loaded."""
        if self._watched is None or not self._watched.pure:
            return
        if generators is None:
            generators = generators_digest(self._data, self._device)
        before = self._traces[-1][0] if self._traces else ""
        self._traces.append(
            (digest(None if numbers is None else numbers.values, before), generators)
        )

    def count(self, samples: int, position: int) -> None:
        """Takes the counts behind the last element that was handed out."""
        self.samples, self.position = samples, position
        self._counts.append((samples, position))

    def state(self, done: int | None = None) -> dict[str, Any]:
        """What it takes to go on.

        Args:
            done: behind how many elements; None for all that were handed out.
        """
        done = self.batches if done is None else done
        samples, position = self._counts[done - self._seen]
        return {
            "batches": done,
            "samples": samples,
            "position": position,
            "digests": _bytes(self._digests[:done]),
            "length": self._length,
            "generators": self._generators,
            "left out": self._left_out(done),
        }

    def _left_out(self, done: int) -> dict[str, Any] | None:
        """What tells that elements can be left out; None where they cannot."""
        if self._watched is None or not 0 < done <= len(self._traces):
            return None
        sure = self._watched.sure()
        if not sure:
            return None
        indices, generators = self._traces[done - 1]
        state = self._watched.state
        return {"state": state, "indices": indices, "generators": generators, "sure": sure}

    def _open(self) -> None:
        length = _length(self._data)
        # What is no sequence may hold the same.
        if None not in (length, self._length) and length != self._length:
            raise self.other(f"there were {self._length} batches of them, and are {length}")
        if self._begun:
            problem = go_back(self._generators, self._data, self._device)
            if problem is not None:
                raise self.other(f"they came from {problem}")

    def other(self, how: str) -> ValueError:
        """The error of data that are not those of the checkpoint."""
        return ValueError(
            f"{self._where} belongs to other data: {how} (has their order changed? Pass the same "
            "data, or another file name to begin anew)"
        )


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def _bytes(digests: list[str]) -> Tensor:
    """[k, 16] uint8."""
    joined = bytearray(bytes.fromhex("".join(digests)))
    if not joined:
        return torch.zeros(0, 16, dtype=torch.uint8)
    return torch.from_numpy(np.frombuffer(joined, dtype=np.uint8)).reshape(-1, 16)


def _hexadecimal(digests: Tensor) -> list[str]:
    return [row.tobytes().hex() for row in digests.numpy()]
