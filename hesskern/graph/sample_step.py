"""Where samples are in a tensor, and an operation on the way from the outputs to a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.graph.nodes import axis_of

__all__ = ["Axis", "Rule", "Step", "owners_of"]


@dataclass(frozen=True, eq=False)
class Axis:
    """Samples within an axis of a tensor: index i of the axis belongs to (i // inner) % N.

    Attributes:
        owners: [size of the axis] int64, the sample that each index belongs to instead, where a
            selection by numbers has moved them; -1 for those on which no output depends.
    """

    axis: int
    inner: int
    owners: Tensor | None = None

    def same(self, other: Axis) -> bool:
        """Whether both say the same, as far as the sizes alone tell."""
        whole = self.owners is None and other.owners is None
        return whole and (self.axis, self.inner) == (other.axis, other.inner)


@dataclass(frozen=True)
class Step:
    """From an operation's result to one of its operands.

    Attributes:
        node, operand: which.
        shape, source: of the result and of the operand.
        here: samples in the result.
        samples: N.
        device: of the outputs.
        number: of the result among those of the operation.
    """

    node: Any
    operand: int
    shape: tuple[int, ...]
    source: tuple[int, ...]
    here: Axis
    samples: int
    device: torch.device
    number: int = 0

    def at(self, axis: int) -> Axis:
        return Axis(axis, self.here.inner, self.here.owners)

    @property
    def owners(self) -> Tensor:
        """[size of the axis] of the result."""
        return owners_of(self.here, self.shape[self.here.axis], self.samples, self.device)

    def dim(self, axis: int) -> int:
        """An axis of the result, counted from 0."""
        return axis_of(axis, len(self.shape))


Rule = Callable[[Step], "Axis | None"]


def owners_of(here: Axis, size: int, samples: int, device: torch.device) -> Tensor:
    """[size] the sample that every index of an axis belongs to."""
    if here.owners is not None:
        return here.owners
    return torch.arange(size, device=device) // here.inner % samples
