"""The scores of the samples so far, or each query's largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.attribution.queries import sum_calls

__all__ = ["Kept"]


class Kept:
    """The scores so far, or what is kept of them."""

    def __init__(self, queries: int, per_layer: bool, top: int | None) -> None:
        self._per_layer, self._top = per_layer, top
        self._queries = queries
        self._parts: list[dict[str, Tensor]] = []
        self._best: tuple[Tensor, Tensor] | None = None
        self._written = 0
        self.total = 0

    def add(self, scores: dict[str, Tensor], count: int) -> Tensor:
        """Takes scores [q, N] or [q, N, t] by layer of the next samples; gives their sums."""
        # In float64: as many sums as there are layers cost no digit.
        dtype = next(iter(scores.values())).dtype
        total = sum_calls([part.double() for part in scores.values()]).to(dtype)
        if self._top is not None:
            index = torch.arange(self.total, self.total + count, device=total.device)
            values, places = total, index.expand(self._queries, -1)
            if self._best is not None:
                values = torch.cat([self._best[0], values], 1)
                places = torch.cat([self._best[1], places], 1)
            # Stable: of equal scores the earlier sample's comes first.
            values, order = values.sort(dim=1, descending=True, stable=True)
            order = order[:, : self._top]
            self._best = values[:, : self._top], places.gather(1, order)
        else:
            self._parts.append(scores if self._per_layer else {"": total})
        self.total += count
        return total

    def state(self) -> dict[str, Any]:
        """All but what :meth:`fresh` gives, for a checkpoint."""
        return {"best": self._best, "total": self.total}

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
            self._best = values.to(device), places.to(device)
        for part in parts:
            self._parts += [{n: scores.to(device) for n, scores in p.items()} for p in part]
        self._written = len(self._parts)

    def finished(self) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
        """Scores and indices as :class:`Influence` has them."""
        if self._best is not None:
            return self._best
        scores = {name: _joined([part[name] for part in self._parts]) for name in self._parts[0]}
        return (scores if self._per_layer else scores[""]), None


def _joined(parts: list[Tensor]) -> Tensor:
    """[q, n] or [q, n, T] of parts of the samples, with zeros behind shorter ones' positions."""
    if parts[0].dim() == 3:
        longest = max(part.shape[2] for part in parts)
        parts = [nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts]
    return torch.cat(parts, 1)
