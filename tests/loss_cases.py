"""Losses with outputs and targets for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import classes, randn
from torch import Tensor, nn


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).softmax(1)


def masked(*shape: int, c: int, ignore: int, seed: int = 0) -> Tensor:
    """Class indices with the first sample and a few others masked."""
    targets = classes(*shape, c=c, seed=seed)
    targets[0] = ignore
    flat = targets.flatten(1) if targets.dim() > 1 else targets[:, None]
    flat[2, ::2] = ignore
    return targets


@dataclass(frozen=True)
class LossCase:
    """A loss, the shape of a sample's outputs and targets for N samples."""

    loss: nn.Module
    shape: tuple[int, ...]
    targets: Callable[[int, int], Tensor]

    def data(self) -> list[tuple[Tensor, Tensor]]:
        return [(randn(n, 3, seed=n), self.targets(n, n)) for n in (5, 3)]

    def sample_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """torch's loss on that sample alone; a fully masked one counts as 0."""
        ignore = getattr(self.loss, "ignore_index", None)
        if not target.is_floating_point() and bool((target == ignore).all()):
            return outputs.sum() * 0
        return self.loss(outputs, target)

    def weights(self) -> list[Tensor]:
        """1 for every sample that counts, 0 for fully masked ones."""
        ignore = getattr(self.loss, "ignore_index", None)
        return [
            torch.ones(len(t)).double()
            if t.is_floating_point()
            else (t.reshape(len(t), -1) != ignore).any(1).double()
            for _, t in self.data()
        ]

    def terms(self, target: Tensor) -> int:
        """How many terms a sample's loss is the mean of."""
        if self.loss.reduction == "sum":
            return 1
        if not isinstance(self.loss, nn.CrossEntropyLoss):
            return math.prod(self.shape)
        if target.is_floating_point():
            return math.prod(self.shape[1:])
        return max(1, int((target != self.loss.ignore_index).sum()))


LOSSES: dict[str, LossCase] = {
    "cross-entropy": LossCase(
        nn.CrossEntropyLoss(), (4,), lambda n, seed: classes(n, c=4, seed=seed)
    ),
    "cross-entropy sum": LossCase(
        nn.CrossEntropyLoss(reduction="sum"), (4,), lambda n, seed: classes(n, c=4, seed=seed)
    ),
    "two classes": LossCase(
        nn.CrossEntropyLoss(), (2,), lambda n, seed: classes(n, c=2, seed=seed)
    ),
    "label smoothing": LossCase(
        nn.CrossEntropyLoss(label_smoothing=0.2), (4,), lambda n, seed: classes(n, c=4, seed=seed)
    ),
    "ignore_index": LossCase(
        nn.CrossEntropyLoss(ignore_index=-7),
        (4,),
        lambda n, seed: masked(n, c=4, ignore=-7, seed=seed),
    ),
    "ignore_index is a class": LossCase(
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1, reduction="sum"),
        (4,),
        lambda n, seed: masked(n, c=4, ignore=1, seed=seed),
    ),
    "probabilities": LossCase(
        nn.CrossEntropyLoss(), (4,), lambda n, seed: probabilities(n, 4, seed=seed)
    ),
    "probabilities with label smoothing": LossCase(
        nn.CrossEntropyLoss(label_smoothing=0.3),
        (4,),
        lambda n, seed: probabilities(n, 4, seed=seed),
    ),
    "tokens": LossCase(
        nn.CrossEntropyLoss(), (3, 4), lambda n, seed: classes(n, 4, c=3, seed=seed)
    ),
    "tokens sum": LossCase(
        nn.CrossEntropyLoss(reduction="sum"),
        (3, 4),
        lambda n, seed: classes(n, 4, c=3, seed=seed),
    ),
    "masked tokens": LossCase(
        nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1),
        (3, 4),
        lambda n, seed: masked(n, 4, c=3, ignore=-100, seed=seed),
    ),
    "masked tokens sum": LossCase(
        nn.CrossEntropyLoss(reduction="sum"),
        (3, 4),
        lambda n, seed: masked(n, 4, c=3, ignore=-100, seed=seed),
    ),
    "tokens with probabilities": LossCase(
        nn.CrossEntropyLoss(), (3, 4), lambda n, seed: probabilities(n, 3, 4, seed=seed)
    ),
    "images": LossCase(
        nn.CrossEntropyLoss(), (3, 2, 2), lambda n, seed: classes(n, 2, 2, c=3, seed=seed)
    ),
    "mse": LossCase(nn.MSELoss(), (4,), lambda n, seed: randn(n, 4, seed=seed)),
    "mse sum": LossCase(nn.MSELoss(reduction="sum"), (4,), lambda n, seed: randn(n, 4, seed=seed)),
    "mse of one number": LossCase(nn.MSELoss(), (), lambda n, seed: randn(n, seed=seed)),
    "mse of images": LossCase(
        nn.MSELoss(), (2, 2, 2), lambda n, seed: randn(n, 2, 2, 2, seed=seed)
    ),
    "bce": LossCase(nn.BCEWithLogitsLoss(), (4,), lambda n, seed: randn(n, 4, seed=seed).sigmoid()),
    "bce sum": LossCase(
        nn.BCEWithLogitsLoss(reduction="sum"),
        (4,),
        lambda n, seed: classes(n, 4, c=2, seed=seed).double(),
    ),
    "bce of one logit": LossCase(
        nn.BCEWithLogitsLoss(), (), lambda n, seed: classes(n, c=2, seed=seed).double()
    ),
}


# Custom losses


def softmax_root(outputs: Tensor, targets: Any) -> Tensor:
    """[N, c, c] with rows sqrt(p_j) (e_j - p)."""
    p = outputs.softmax(1)
    eye = torch.eye(p.shape[1], dtype=p.dtype)
    return p.sqrt().unsqueeze(2) * (eye - p.unsqueeze(1))
