"""How far a layer's output gradients cluster by logit and by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.operators.samples import layer_rows
from hesskern.passes.data_pass import DataPass
from hesskern.passes.layers import select_layers
from hesskern.passes.losses import resolve_loss

__all__ = ["GradientClusters", "gradient_clusters"]


@dataclass(frozen=True)
class GradientClusters:
    """Shares of the variance of gradients that cluster means explain (as in a one-way ANOVA).

    The vectors are d logit_i / d z of sample n, for all logits i and samples n; each share is that
    of the squared distances from the overall mean which is left when every vector is replaced by
    the mean of its cluster.

    Attributes:
        by_logit: clusters are the logits i.
        by_class: clusters are the classes of the samples.
        by_both: clusters are pairs of a logit and a class.
    """

    by_logit: float
    by_class: float
    by_both: float


def gradient_clusters(model: nn.Module, data: Iterable[Any], layer: str) -> GradientClusters:
    """Clustering of the gradients of all logits in a layer's output, in one pass.

    Args:
        model: gives logits [N, c]; runs in eval mode and comes back as it was.
        data: iterable of (inputs, targets [N]), classes 0 ... c - 1.
        layer: a Linear layer with one input per sample.

    Raises:
        ValueError: the layer is unknown, sees more than one position, or there is no data.
    """
    specs, _ = select_layers(model, [layer], "none")
    loss = resolve_loss(None, _every_logit)
    sums: Tensor | None = None
    counts = squares = torch.zeros((), dtype=torch.float64)
    with DataPass(model, data, loss, specs) as run:
        for batch, roots in run:
            classes = roots.outputs.shape[1]
            labels = torch.nn.functional.one_hot(batch.targets, classes).double()
            # Room for all logits at a time, so that a batch comes in one piece.
            for _, rows in layer_rows(specs, roots, 2**62):
                if rows.s.dim() != 3 or rows.stored:
                    raise ValueError(
                        f"layer must be a Linear layer with one input per sample, got {layer!r}"
                    )
                gradients = rows.s.double()
                by_class = torch.einsum("nk,ncm->ckm", labels, gradients)
                sums = by_class if sums is None else sums + by_class
                counts = counts + labels.sum(0)
                squares = squares + gradients.square().sum()
    if sums is None:
        raise ValueError("data yielded no samples")
    logits = sums.shape[0]
    mean = sums.sum((0, 1)) / (logits * counts.sum())
    total = float(squares - logits * counts.sum() * mean.square().sum())
    if total <= 0:
        raise ValueError("all gradients are equal, so there is no variance to explain")

    def explained(groups: Tensor, sizes: Tensor) -> float:
        """Share of the variance between groups: sums [g, m] of sizes [g]."""
        kept = sizes > 0
        means = groups[kept] / sizes[kept].unsqueeze(1)
        return float((sizes[kept] * (means - mean).square().sum(1)).sum()) / total

    return GradientClusters(
        by_logit=explained(sums.sum(1), counts.sum().expand(logits)),
        by_class=explained(sums.sum(0), logits * counts),
        by_both=explained(sums.flatten(0, 1), counts.repeat(logits)),
    )


def _every_logit(outputs: Tensor, targets: Any) -> Tensor:
    """[N, c, c] the identity: the gradient of each logit by itself."""
    c = outputs.shape[1]
    return torch.eye(c, dtype=outputs.dtype, device=outputs.device).expand(len(outputs), c, c)
