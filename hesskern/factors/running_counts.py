"""What an accumulator counts besides its sums: numbers a device still holds, and draws used up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.factors.layer_sums import Counted

__all__ = ["DrawsUsed", "HeldCounts"]


@dataclass
class DrawsUsed:
    """Which random numbers have been used, so that no two batches get the same.

    Attributes:
        streams: number of those begun: one for all of the data that is consumed together, one for
            batches that come one by one.
        updating: whether the last one is of batches that come one by one.
        position: in that one, of the next sample.
    """

    streams: int = 0
    updating: bool = False
    position: int = 0

    def begin(self, update: bool) -> None:
        """Goes on with single batches, or begins a stream."""
        if not (update and self.updating):
            self.streams, self.updating, self.position = self.streams + 1, update, 0


class HeldCounts:
    """Weighted numbers of samples and positions that the device holds until the pass ends."""

    def __init__(self) -> None:
        self._shrunk: Tensor | None = None
        self._counts: dict[tuple[bool, tuple[tuple[str, int], ...]], Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def zero(self, counts: list[float | Tensor]) -> Tensor:
        """0-dim float64 zero where these counts, or those held, lie."""
        tensors = [count for count in counts if isinstance(count, Tensor)]
        return (*tensors, *self._counts.values())[0].new_zeros(())

    def add(self, number: Tensor, counted: Counted) -> None:
        """Adds the 0-dim float64 number of what was counted."""
        key = counted.samples, tuple(counted.positions.items())
        self._counts[key] = self._counts[key] + number if key in self._counts else number

    def scale(self, factor: Tensor) -> None:
        """Multiplies everything that was counted, by the host as well, by a 0-dim number."""
        self._shrunk = factor if self._shrunk is None else self._shrunk * factor
        self._counts = {key: count * factor for key, count in self._counts.items()}

    def state(self) -> dict[str, Any]:
        """What is held, as it is, for a checkpoint."""
        return {
            "shrunk": self._shrunk,
            "counts": [
                [samples, list(map(list, positions)), number]
                for (samples, positions), number in self._counts.items()
            ],
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> HeldCounts:
        """The same again, on a device."""
        held = cls()
        if state["shrunk"] is not None:
            held._shrunk = state["shrunk"].to(device)
        for samples, positions, number in state["counts"]:
            key = samples, tuple((name, times) for name, times in positions)
            held._counts[key] = number.to(device)
        return held

    def read(self) -> tuple[float, list[Counted]]:
        """What the host has counted is to be multiplied by, and what is to be added; waits once."""
        if not self._counts:
            return 1.0, []
        counts = list(self._counts.values())
        shrunk = counts[0].new_ones(()) if self._shrunk is None else self._shrunk
        factor, *numbers = torch.stack([shrunk, *(c.to(shrunk.device) for c in counts)]).tolist()
        return factor, [
            Counted(n, dict(positions), samples)
            for n, (samples, positions) in zip(numbers, self._counts, strict=True)
        ]
