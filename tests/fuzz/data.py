"""Batches for a random model, and the losses of their samples by torch alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Batch", "LossCase", "draw_loss", "draw_targets", "draw_weights"]


@dataclass
class Batch:
    """One batch.

    Attributes:
        inputs: by argument of the model.
        targets: for the loss.
        weight: [N] of the samples, or None.
    """

    inputs: dict[str, Tensor]
    targets: Any = None
    weight: Tensor | None = None


class Quadratic:
    """l(f, y) = ½ ‖B (f - y)‖², given by its output root."""

    def __init__(self, root: Tensor) -> None:
        self.root = root

    def output_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.root.to(outputs).expand(len(outputs), -1, -1)

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) @ self.root.to(outputs).T).square().sum(1) / 2

    def __repr__(self) -> str:
        return f"Quadratic(root={list(self.root.shape)})"


@dataclass
class LossCase:
    """A loss as hesskern takes it, and as torch has it for one sample.

    Attributes:
        loss: the argument.
        sample: outputs [1, ...] and targets [1, ...] to a scalar; None where the sample does not
            count.
        kind: "ce", "mse", "bce" or "custom".
    """

    loss: Any
    sample: Callable[[Tensor, Tensor], Tensor | None]
    kind: str

    def describe(self) -> str:
        if self.kind == "ce":
            names = ("reduction", "ignore_index", "label_smoothing")
            return "CE(" + ", ".join(f"{n}={getattr(self.loss, n)!r}" for n in names) + ")"
        reduction = getattr(self.loss, "reduction", None)
        return f"{self.loss!r}" + (f" reduction={reduction}" if reduction else "")


def draw_loss(rng: random.Random, outputs: Tensor, fixed: bool) -> LossCase:
    """A loss that fits outputs [N, c, ...].

    Args:
        outputs: of one batch.
        fixed: whether their shape behind the samples is the same in all batches.
    """
    reduction = rng.choice(("mean", "mean", "sum"))
    kind = rng.choices(("ce", "mse", "bce", "custom"), (6, 2, 1, 1))[0]
    if outputs.dim() == 1:
        kind = rng.choice(("mse", "bce"))
    if kind == "ce" and outputs.shape[1] == 1 and rng.random() < 0.9:
        # Of one class cross-entropy has no curvature.
        kind = rng.choice(("mse", "bce"))
    if kind == "custom" and (outputs.dim() != 2 or not fixed):
        kind = "ce"
    if kind == "custom":
        c = outputs.shape[1]
        root = torch.tensor(
            [[rng.gauss(0, 1) for _ in range(c)] for _ in range(rng.choice((1, c)))]
        )
        quadratic = Quadratic(root.double())
        return LossCase(quadratic, lambda f, y: quadratic.per_sample(f, y)[0], kind)
    if kind == "mse":
        return LossCase(
            nn.MSELoss(reduction=reduction),
            lambda f, y: F.mse_loss(f, y.to(f), reduction=reduction),
            kind,
        )
    if kind == "bce":
        return LossCase(
            nn.BCEWithLogitsLoss(reduction=reduction),
            lambda f, y: F.binary_cross_entropy_with_logits(f, y.to(f), reduction=reduction),
            kind,
        )
    smoothing = rng.choice((0.0, 0.0, 0.2))
    ignored = rng.choice((-100, -100, 0)) if outputs.shape[1] > 1 else -100

    def sample(f: Tensor, y: Tensor) -> Tensor | None:
        if y.is_floating_point():
            y = y.to(f)
        elif bool((y == ignored).all()):
            return None
        return F.cross_entropy(
            f, y, reduction=reduction, ignore_index=ignored, label_smoothing=smoothing
        )

    loss = nn.CrossEntropyLoss(reduction=reduction, ignore_index=ignored, label_smoothing=smoothing)
    return LossCase(loss, sample, kind)


def draw_targets(
    rng: random.Random, source: torch.Generator, case: LossCase, outputs: Tensor, soft: bool
) -> Tensor:
    """Targets for a batch; ``soft``: class probabilities."""
    if case.kind in ("mse", "custom"):
        return torch.randn(outputs.shape, generator=source, dtype=torch.float64)
    if case.kind == "bce":
        return torch.rand(outputs.shape, generator=source, dtype=torch.float64)
    if soft and case.loss.ignore_index < 0:
        noise = torch.randn(outputs.shape, generator=source, dtype=torch.float64)
        return noise.softmax(1)
    size = (outputs.shape[0], *outputs.shape[2:])
    targets = torch.randint(0, outputs.shape[1], size, generator=source)
    if rng.random() < 0.3:
        hidden = torch.rand(size, generator=source) < 0.3
        # One sample that counts stays.
        hidden[0] = False
        targets = targets.masked_fill(hidden, case.loss.ignore_index)
    if case.loss.ignore_index == 0:
        targets[0] = 1
    return targets


def draw_weights(rng: random.Random, source: torch.Generator, count: int) -> Tensor:
    weights = torch.rand(count, generator=source, dtype=torch.float64) + 0.2
    if count > 1 and rng.random() < 0.3:
        weights[rng.randrange(1, count)] = 0.0
    return weights
