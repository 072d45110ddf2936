"""What an item is, and the few words that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import Outcome

__all__ = ["K_AXIS", "Item", "pairs_of", "strip_power"]

K_AXIS = "k, dimension of the leading space"
"""What charts of overlaps call their x axis."""


@dataclass(frozen=True)
class Item:
    """One published figure or table.

    Attributes:
        name: on the command line.
        title: on the page.
        shows: what to look for, a sentence or two.
        networks: what it looks at.
        run: computes it.
        minutes: "quick" and "paper" (any published recipe), expected on two cores with nothing
            trained yet.
    """

    name: str
    title: str
    shows: str
    networks: tuple[Network, ...]
    run: Callable[[Lab, Sequence[Network]], Outcome]
    minutes: Mapping[str, float]

    def expected_seconds(self, profile: str) -> float:
        """How long it is expected to take with nothing trained yet."""
        return 60 * self.minutes["quick" if profile == "quick" else "paper"]


def pairs_of(seeds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every two seeds, in order."""
    for i, first in enumerate(seeds):
        for second in seeds[i + 1 :]:
            yield first, second


def strip_power(model: str) -> str:
    """``f200^2`` and ``F200x2`` alike as ``f200x2``."""
    return model.lower().replace("^", "x")
