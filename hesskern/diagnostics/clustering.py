"""How far a layer's output gradients cluster by logit and by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.operators.samples import layer_rows
from hesskern.passes.batches import no_samples
from hesskern.passes.data_pass import DataPass
from hesskern.passes.layers import select_layers
from hesskern.passes.losses import resolve_loss, with_root

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


def gradient_clusters(
    model: nn.Module, data: Iterable[Any], layer: str, loss: Any = None
) -> GradientClusters:
    """Clustering of the gradients of all logits in a layer's output, in one pass.

    Args:
        model: gives logits [N, c]; runs in eval mode and comes back as it was.
        data: iterable of (inputs, targets [N]), classes 0 ... c - 1.
        layer: a Linear layer with one input per sample.
        loss: what takes batches of another form apart, :class:`hesskern.SequenceClassification` for
            those of transformers; nothing else of it is used.

    Raises:
        ValueError: the layer is unknown, sees more than one position, there is no data, or it does
            not consist of logits [N, c] with classes [N].
        TypeError: the loss is none.
    """
    specs, _ = select_layers(model, [layer], "none")
    every_logit = with_root(_every_logit, None if loss is None else resolve_loss(loss))
    sums: Tensor | None = None
    counts = squares = torch.zeros((), dtype=torch.float64)
    with DataPass(model, data, every_logit, specs) as run:
        for batch, roots in run:
            classes = roots.outputs.shape[1]
            if batch.targets.numel() != len(roots.outputs) or batch.targets.is_floating_point():
                raise ValueError(
                    f"targets must be a class for every sample, [N] = [{len(roots.outputs)}], got "
                    f"{batch.targets.dtype} {list(batch.targets.shape)}"
                )
            targets = batch.targets.reshape(-1).long()
            labels = torch.nn.functional.one_hot(targets, classes).double()
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
        raise no_samples()
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
    if outputs.dim() != 2:
        raise ValueError(f"model must give logits [N, c], got {list(outputs.shape)}")
    c = outputs.shape[1]
    return torch.eye(c, dtype=outputs.dtype, device=outputs.device).expand(len(outputs), c, c)
