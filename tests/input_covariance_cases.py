"""Models and comparisons of the tests of input covariances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from networks import randn, seeded
from torch import Tensor, nn

import hesskern as hk


def sample_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


class Gated(nn.Module):
    """Over sequences [N, T, 6]: two layers with one input, and a pooler on the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 5), nn.Linear(6, 5)
        self.down = nn.Linear(5, 6, bias=False)
        self.pooler = nn.Linear(6, 4)

    def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        assert labels is None
        x = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return self.pooler(x[:, 0])


def gated() -> nn.Module:
    return seeded(Gated()).double()


def sequences(n: int = 3, t: int = 4, seed: int = 0) -> Tensor:
    return randn(n, t, 6, seed=seed)


class Through(nn.Module):
    """A layer, then a function of it and its input, then another layer."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first, x))


def equal(one: hk.InputCovariances, other: hk.InputCovariances, bound: float = 0.0) -> None:
    assert list(one) == list(other)
    assert one.num_samples == pytest.approx(other.num_samples, rel=1e-12)
    for name in one:
        a, b = one[name], other[name]
        assert relative_error(a.input_covariance, b.input_covariance) <= bound
        assert relative_error(a.input_mean, b.input_mean) <= bound
        assert a.positions == pytest.approx(b.positions, rel=1e-12)
