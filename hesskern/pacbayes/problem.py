"""What every method is given: a network, the prior, where the mean starts, samples and terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hesskern.factors.compute import kronecker_factors
from hesskern.factors.result import Factors
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import Slot, evaluating

__all__ = ["Problem", "mean_over_groups"]

_FACTOR_BATCH = 1000


@dataclass(frozen=True, eq=False)
class Problem:
    """The posterior of which network is wanted, and under which terms.

    Attributes:
        model: network [N, ...] -> [N, c], or [N, 1]; methods write into its layers' weights.
        slots: the layers that carry the posterior, by name.
        prior: state with w0, the prior's centre.
        start: state with the weights at which the mean starts.
        samples: the training samples.
        protocol: the certificate's terms.
    """

    model: nn.Module
    slots: Mapping[str, Slot]
    prior: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    samples: Samples
    protocol: Protocol

    @cached_property
    def outputs(self) -> int:
        """Scores per sample: 1 for one logit of class 1 against class 0."""
        with torch.no_grad(), evaluating(self.model):
            return int(self.model(self.samples.inputs[:2]).shape[1])

    def factors(self, means: Mapping[str, Tensor], rows: Tensor | None = None) -> Factors:
        """Kronecker factors, biases included, of the network with these weights.

        Args:
            means: [m, d] by layer; they are written into the model.
            rows: [B] indices of the samples to look at; None for all.
        """
        for name, mean in means.items():
            self.slots[name].load(mean)
        inputs, targets = self.samples.inputs, self.samples.targets
        if rows is not None:
            inputs, targets = inputs[rows], targets[rows]
        loss: nn.Module = nn.CrossEntropyLoss()
        if self.outputs == 1:
            loss, targets = nn.BCEWithLogitsLoss(), targets[:, None].to(inputs.dtype)
        batches = zip(inputs.split(_FACTOR_BATCH), targets.split(_FACTOR_BATCH), strict=True)
        return kronecker_factors(self.model, batches, loss, list(self.slots), bias="joint")


def mean_over_groups(covariance: Tensor) -> Tensor:
    """[d, d] of [d, d] or [g, d, d]: with groups any basis is valid, only the fit differs."""
    return covariance if covariance.dim() == 2 else covariance.mean(0)
