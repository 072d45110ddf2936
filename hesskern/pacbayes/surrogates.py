"""What stands in for the 0-1 error while a posterior is optimized."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.special import log_ndtr

__all__ = ["error_probability", "log_loss"]

_NODES = 8


def log_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [N] of logits [N, c]; logistic loss / ln 2 of logits [N, 1] (published)."""
    if outputs.shape[1] == 1:
        return F.softplus(-_signs(targets, outputs) * outputs[:, 0]) / math.log(2)
    return F.cross_entropy(outputs, targets, reduction="none")


def error_probability(mean: Tensor, deviation: Tensor, targets: Tensor) -> Tensor:
    """Probability [N] that a Gaussian score vector leads to a wrong prediction. Differentiable.

    The scores are independent given what enters the last layer, N(mean_k, deviation^2) with one
    deviation per example: the 0-1 error's conditional expectation, without bias, and smooth.
    Binary: Phi(-y mean / deviation). With c classes a prediction is right if mean_t + deviation g
    exceeds all others, P = E_g prod_k Phi((mean_t - mean_k) / deviation + g), a one-dimensional
    integral over a standard normal g, by Gauss-Hermite quadrature.

    Args:
        mean: [N, c], or [N, 1] for one logit of class 1 against class 0.
        deviation: [N, 1], positive.
        targets: [N].
    """
    scaled = mean / deviation
    if mean.shape[1] == 1:
        return torch.special.ndtr(-_signs(targets, mean) * scaled[:, 0])
    margins = scaled.gather(1, targets[:, None]) - scaled
    nodes, weights = _quadrature(mean.device, mean.dtype)
    others = F.one_hot(targets, mean.shape[1]).bool().logical_not()
    logs = log_ndtr(margins[:, :, None] + nodes) * others[:, :, None]
    return 1 - logs.sum(1).exp() @ weights


@cache
def _quadrature(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    both = torch.from_numpy(np.stack([nodes, weights / weights.sum()])).to(device, dtype)
    return both[0], both[1]


def _signs(targets: Tensor, like: Tensor) -> Tensor:
    return (2 * targets - 1).to(like.dtype)
