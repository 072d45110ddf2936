"""Influence scores of batches with a tensor that has positions, not samples, in its first axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from influence_loops import close
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()
T = 4


class Mixed(nn.Module):
    """Positions mixed by a matrix [T, T], or weighted by a vector [T], that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        x = shared @ x if shared.dim() == 2 else shared[:, None] * x
        return self.head(x.mean(1))


class Named(Mixed):
    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(x, position_ids.to(x))


def expected(model: nn.Module, samples: list[Any], call: Any) -> Tensor:
    """[n, n] products of the samples' gradients."""
    rows = []
    for x, y in samples:
        model.zero_grad()
        LOSS(call(x), y).backward()
        rows.append(
            torch.cat([model.get_parameter(f"{n}.weight").grad.flatten() for n in ("up", "head")])
        )
    model.zero_grad(set_to_none=True)
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize("kind", ["matrix", "vector", "named"])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_as_many_positions_as_samples(kind: str, batch_size: int | None) -> None:
    model: nn.Module = seeded(Named() if kind == "named" else Mixed())
    shared = torch.arange(T) if kind == "named" else randn(T, T)[: T if kind == "matrix" else 1]
    shared = shared[0] if kind == "vector" else shared
    x, y = randn(T, T, 3), classes(T, c=2)
    inputs = {"x": x, "position_ids": shared} if kind == "named" else (x, shared)
    data = [(inputs, y)]
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(T)]
    products = expected(model, samples, lambda one: model(one, shared))
    found = hk.influence(None, model, data, data, LOSS, batch_size=batch_size).scores
    close(found, products, 1e-12)


def test_samples_that_look_like_it_are_scored_as_they_are() -> None:
    """As long as it cannot be told the batch stays whole, whatever is the case."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return self.head((torch.tanh(self.up(x)) * weights[..., None]).mean(1))

    model = seeded(Two())
    x, weights, y = randn(T, T, 3), randn(T, T, seed=1), classes(T, c=2)
    samples = [((x[i : i + 1], weights[i : i + 1]), y[i : i + 1]) for i in range(T)]
    products = expected(model, samples, lambda one: model(*one))
    for data in ([((x, weights), y)], samples):
        found = hk.influence(None, model, data, data, LOSS, batch_size=3).scores
        close(found, products, 1e-12)
