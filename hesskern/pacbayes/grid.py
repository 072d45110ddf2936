"""Prior variances put on the grid that the union bound is over."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hesskern.pacbayes.loop import Draft
from hesskern.pacbayes.posterior import LayerPosterior
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.slots import Slot

__all__ = ["on_grid"]


def on_grid(
    drafts: Mapping[str, Draft],
    slots: Mapping[str, Slot],
    prior: Mapping[str, Tensor],
    n: int,
    protocol: Protocol,
) -> dict[str, LayerPosterior]:
    """Puts the prior variances on the grid.

    A relative draft goes to the nearest j, and mean and variances with it: its KL stays what it
    was. Of another draft's neighbouring j the one with the lower rate is taken.
    """

    def layer(name: str, index: int, moved: bool = False) -> LayerPosterior:
        draft, slot = drafts[name], slots[name]
        mean, variance, centre = draft.mean.clone(), draft.variance.double(), slot.matrix(prior)
        scale = protocol.grid.variance(index) / draft.prior_variance
        if draft.relative:
            variance = variance * scale
        # Of what is positive, no part may round to zero: its logarithm is part of KL.
        variance = variance.clamp(min=torch.finfo(torch.float64).tiny)
        if moved:
            mean = centre + scale**0.5 * (mean - centre)
        return LayerPosterior(
            slot.per_example,
            mean,
            centre,
            variance,
            draft.U,
            draft.V,
            index,
        )

    def cost(chosen: Collection[LayerPosterior]) -> float:
        divergence = sum(item.kl(protocol.grid.variance(item.index)) for item in chosen)
        priced = protocol.priced([item.index for item in chosen])
        return divergence + sum(protocol.grid.price(j) for j in priced)

    if protocol.shared_variance:
        # All drafts of a method with one prior variance agree on it; others meet in the middle.
        logs = [math.log(draft.prior_variance) for draft in drafts.values()]
        common = protocol.grid.neighbours(math.exp(sum(logs) / len(logs)))
        options = [{name: layer(name, j) for name in drafts} for j in common]
        return min(options, key=lambda chosen: cost(chosen.values()))
    found: dict[str, LayerPosterior] = {}
    for name, draft in drafts.items():
        if draft.relative:
            found[name] = layer(name, protocol.grid.nearest(draft.prior_variance), moved=True)
        else:
            near = protocol.grid.neighbours(draft.prior_variance)
            found[name] = min((layer(name, j) for j in near), key=lambda item: cost([item]))
    return found
