"""A loss as the gradients of its samples: one row for each, that of the sample's own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hesskern.devices import on_host
from hesskern.passes.batches import Parts
from hesskern.passes.checks import Checks
from hesskern.passes.draws import SampleDraws
from hesskern.passes.losses import Loss, Rows

__all__ = ["SampleLoss"]


class SampleLoss(Loss):
    """Another loss, whose empirical rows are the gradients of :meth:`per_sample`, unweighted.

    Args:
        loss: takes batches apart, runs the model and gives the samples' losses.
        what: a sample is called in messages.

    Attributes:
        first: number of the first sample of the batch that is looked at, for messages.
        scale: [N] float32 that the rows of that batch have been divided by; None: by nothing.
    """

    def __init__(self, loss: Loss, what: str) -> None:
        self._loss, self._what = loss, what
        self.first = 0
        self.scale: Tensor | None = None

    def split_batch(self, element: Any, index: int) -> Parts:
        return self._loss.split_batch(element, index)._replace(weight=None)

    def run(self, model: nn.Module, inputs: Any) -> Tensor:
        return self._loss.run(model, inputs)

    def check(self, outputs: Tensor, targets: Any, checks: Checks) -> Any:
        targets = self._loss.check(outputs, targets, checks)
        self.require_finite(outputs, "the model's outputs", checks)
        return targets

    def require_finite(self, values: Tensor, what: str, checks: Checks) -> None:
        """Requires that values [N, ...] hold no NaN or Inf; the message names the sample.

        Raises:
            ValueError: they do, and lie on the host.
        """
        if not values.numel():
            return
        if on_host(values) and bool(torch.isfinite(values.sum())):
            return
        largest = torch.linalg.vector_norm(
            values.flatten(1) if values.dim() > 1 else values[:, None], torch.inf, 1
        )
        good, first = torch.isfinite(largest), self.first
        checks.require(
            good.all(),
            lambda place: f"{what} for {self._what} {first + int(place)} contain NaN or Inf",
            lambda: (~good).to(torch.int32).argmax(),
        )

    def exact(self, outputs: Tensor, targets: Any) -> Rows:
        return self._loss.exact(outputs, targets)

    def sampled(self, outputs: Tensor, targets: Any, samples: int, draws: SampleDraws) -> Rows:
        return self._loss.sampled(outputs, targets, samples, draws)

    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._loss.per_sample(outputs, targets)

    def empirical(self, outputs: Tensor, targets: Any) -> Rows:
        # Rounded to the outputs' dtype only once it is there.
        wide = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        with torch.enable_grad():
            free = outputs.detach().to(wide).requires_grad_()
            (gradient,) = torch.autograd.grad(self.per_sample(free, targets).sum(), free)
        self.scale = None
        if outputs.dtype == torch.float16 and gradient.numel():
            # Where a network is sure, or the mean is over many tokens, they leave its range. Every
            # sample by itself, and a power of two: scores stay its own, to the bit.
            largest = torch.linalg.vector_norm(gradient.flatten(1), torch.inf, 1)
            self.scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
            gradient = gradient / self.scale.reshape(-1, *(1,) * (gradient.dim() - 1))
        return Rows(1, lambda _: gradient.to(outputs.dtype))
