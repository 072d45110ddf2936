"""The way of a pass through its data: what it has seen, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesskern.checkpoints.generators import generator_states, go_back
from hesskern.digests import digest

__all__ = ["Course"]


class Course:
    """Hands out the elements of the data that a pass has not seen, and digests all of them.

    The digest of an element goes on from that of the one before. An element that the pass has seen
    is loaded again and compared: where it is another, the data are others.

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
            }
        self.samples, self.position = int(state["samples"]), int(state["position"])
        self.batches = self._seen = int(state["batches"])
        # Both, behind the elements that were handed out.
        self._counts = [(self.samples, self.position)]
        self._data = data
        self._expected = _hexadecimal(state["digests"])
        self._digests = list(self._expected)
        self._length, self._generators = state["length"], state["generators"]

    def elements(self, given: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """(index, element) of those that are new, with what goes along with each.

        Args:
            given: the data's elements, each with something else.

        Raises:
            ValueError: the data are not those of the checkpoint.
        """
        self._open()
        last = ""
        count = 0
        for index, (element, beside) in enumerate(given):
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
        }

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
