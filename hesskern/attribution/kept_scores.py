"""The scores of the samples so far, or each query's largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.attribution.queries import sum_calls

__all__ = ["Kept"]


class Kept:
    """The scores so far, or what is kept of them.

    Args:
        queries: q.
        per_layer, top: as in :func:`hesskern.influence`.
        numbered: whether samples come with numbers, for :mod:`hesskern.attribution.rank_scores`.

    Attributes:
        per_layer, best, numbered: the same; ``best`` is ``top``.
        total: samples so far.
        numbers: of every sample, with ``numbered``; -1 where it does not count.
        known: whether they all are the samples' own.
        keys: of the best, [q, k] what of equal scores the lower comes first by, with ``numbered``.
    """

    def __init__(
        self, queries: int, per_layer: bool, top: int | None, numbered: bool = False
    ) -> None:
        self.per_layer, self.best = per_layer, top
        self._queries, self.numbered = queries, numbered
        self._parts: list[dict[str, Tensor]] = []
        self._kept: tuple[Tensor, Tensor] | None = None
        self._written = 0
        self.total = 0
        self.numbers: list[Tensor] = []
        self.known = True
        self.keys: Tensor | None = None

    def add(self, scores: dict[str, Tensor], count: int, numbers: Tensor | None = None) -> Tensor:
        """Takes scores [q, N] or [q, N, t] by layer of the next samples; gives their sums.

        Args:
            scores: by layer.
            count: N.
            numbers: [N] of these samples, with ``numbered``; -1 where one does not count.
        """
        # In float64: as many sums as there are layers cost no digit.
        dtype = next(iter(scores.values())).dtype
        total = sum_calls([part.double() for part in scores.values()]).to(dtype)
        if self.best is not None:
            index = torch.arange(self.total, self.total + count, device=total.device)
            self._add_best(total, index, self.best, numbers)
        else:
            self._parts.append(scores if self.per_layer else {"": total})
        if numbers is not None:
            self.numbers.append(numbers)
        self.total += count
        return total

    def _add_best(self, values: Tensor, index: Tensor, top: int, numbers: Tensor | None) -> None:
        """Keeps the largest of these [q, N] and those before."""
        places = index.expand(self._queries, -1)
        keys = None
        if numbers is not None:
            numbers = numbers.to(values.device)
            # Not a score of a sample that counts.
            values = values.masked_fill(numbers < 0, -torch.inf)
            keys = numbers.expand(self._queries, -1)
        if self._kept is not None:
            values = torch.cat([self._kept[0], values], 1)
            places = torch.cat([self._kept[1], places], 1)
        if keys is not None:
            keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
            before = keys.argsort(dim=1, stable=True)
            values, places, keys = (t.gather(1, before) for t in (values, places, keys))
        # Stable: of equal scores the earlier sample's comes first.
        values, order = values.sort(dim=1, descending=True, stable=True)
        order = order[:, :top]
        self._kept = values[:, :top], places.gather(1, order)
        self.keys = None if keys is None else keys.gather(1, order)

    def state(self) -> dict[str, Any]:
        """All but what :meth:`fresh` gives, for a checkpoint."""
        state: dict[str, Any] = {"best": self._kept, "total": self.total}
        if self.numbered:
            numbers = torch.cat(self.numbers) if self.numbers else None
            state |= {"numbers": numbers, "known": self.known, "keys": self.keys}
        return state

    def fresh(self) -> list[dict[str, Tensor]] | None:
        """The scores that it has not given before; None where none are added to others."""
        found = self._parts[self._written :]
        self._written = len(self._parts)
        return found or None

    def restore(self, state: Mapping[str, Any], parts: Iterable[Any], device: torch.device) -> None:
        """Takes over a state, and the scores that were given before it."""
        self.total = state["total"]
        if state["best"] is not None:
            values, places = state["best"]
            self._kept = values.to(device), places.to(device)
        if self.numbered:
            self.numbers = [] if state["numbers"] is None else [state["numbers"].cpu()]
            self.known = state["known"]
            self.keys = None if state["keys"] is None else state["keys"].to(device)
        for part in parts:
            self._parts += [{n: scores.to(device) for n, scores in p.items()} for p in part]
        self._written = len(self._parts)

    def finished(self) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
        """Scores and indices as :class:`Influence` has them."""
        if self._kept is not None:
            return self._kept
        scores = {name: _joined([part[name] for part in self._parts]) for name in self._parts[0]}
        return (scores if self.per_layer else scores[""]), None


def _joined(parts: list[Tensor]) -> Tensor:
    """[q, n] or [q, n, T] of parts of the samples, with zeros behind shorter ones' positions."""
    if parts[0].dim() == 3:
        longest = max(part.shape[2] for part in parts)
        parts = [nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts]
    return torch.cat(parts, 1)
