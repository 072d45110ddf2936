"""(E + damping)^-1 of an EKFAC whose layers the ranks of a group have left among them.

Every rank multiplies the queries' gradients of its own layers, and sends what it finds to all; no
rank needs another's eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.attribution.inverses import (
    Curvature,
    check_operators,
    chosen,
    damping_of,
    other_model,
)
from hesskern.attribution.queries import LayerQueries
from hesskern.attribution.rank_scores import agree_on_queries
from hesskern.factors.ekfac import EKFAC
from hesskern.parallel.ranks import Ranks
from hesskern.passes.layers import LayerSpec

__all__ = ["SharedCurvature", "curvature_of_parts"]


@dataclass(frozen=True)
class SharedCurvature(Curvature):
    """The layers that count, with the operators of this rank's alone.

    Attributes:
        owners: of every layer, the rank that has its operator.
        ranks: all of which make the same calls.
    """

    owners: dict[str, int]
    ranks: Ranks

    def agree(self, gradients: Mapping[str, Tensor], count: int) -> None:
        """Makes sure that all ranks have the same queries, which none can tell from the solutions.

        Args:
            gradients: [q, g, m/g, d] of the queries, by layer.
            count: q.

        Raises:
            RankError: one has others.
        """
        own = {name: LayerQueries(gradient) for name, gradient in gradients.items()}
        agree_on_queries(self.ranks, own, count)

    def solve(self, name: str, gradients: Tensor) -> Tensor:
        if self.owners[name] == self.ranks.rank:
            solved = super().solve(name, gradients).contiguous()
        else:
            solved = torch.empty_like(gradients, memory_format=torch.contiguous_format)
        self.ranks.broadcast_([solved], self.owners[name])
        return solved


def curvature_of_parts(
    E: EKFAC,
    model: nn.Module,
    layers: str | Iterable[str] | None,
    damping: Any,
    ranks: Ranks,
    checkpoint: Any,
) -> SharedCurvature:
    """:func:`curvature_of` for the parts of all ranks.

    Args:
        E: this rank's part.
        model, layers, damping: as there.
        ranks: all of which call this.
        checkpoint: must be None.

    Raises:
        TypeError, ValueError: as there, or E is not this rank's part, or there is a checkpoint.
        RankError: the parts are not those of one EKFAC.
    """
    part = E.part
    assert part is not None
    if (part.ranks, part.size) != ((ranks.rank,), ranks.size):
        raise ValueError(
            f"E: rank {ranks.rank} of {ranks.size} must have its own part of a sharded EKFAC, got "
            f"that of {part.described}"
        )
    if checkpoint is not None:
        raise ValueError(
            "checkpoint must be None where E is a part, as all ranks make the queries together; "
            "read all parts together with hk.load_ekfac"
        )
    ranks.agree("the parts of E", {"digest of the whole": part.whole})

    def matching(name: str, specs: tuple[LayerSpec, LayerSpec]) -> LayerSpec:
        if E.specs[name] not in specs:
            raise other_model(name, E.specs[name], specs[0])
        return E.specs[name]

    specs, skipped = chosen(E.specs, model, layers, matching)
    operators = {name: E[name] for name in specs if name in E}
    found = ranks.gather("traces of E", {name: E[name].trace() for name in operators})
    traces = {name: trace for own in found for name, trace in own.items()}
    sizes = {name: spec.shape[0] * spec.shape[1] for name, spec in specs.items()}
    numbers = damping_of(damping, sizes, traces.__getitem__)
    check_operators(operators, numbers, model)
    owners = {name: part.owners[name] for name in specs}
    return SharedCurvature(specs, dict(operators), numbers, skipped, owners, ranks)
