"""The package's code on shapes beyond 2^31: bytes of a factor, entries of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hesskern as hk

M, D, N = 40_000, 70_000, 2


def large() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, 3))
    return model, (torch.empty(N, D, device="meta"), torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize(
    ("what", "held"),
    [
        ("factors", M * M + D * D + D),
        ("ekfac", M * M + D * D + M * D),
        ("inputs", D * D + D),
    ],
)
def test_a_layer_beyond(what: Any, held: int) -> None:
    assert M * D > 2**31
    assert 4 * D * D > 2**31
    model, batch = large()
    options = {"max_outputs": M} if what != "inputs" else {}
    plan = hk.plan(
        model, batch, nn.CrossEntropyLoss(), what=what, available=2**40, layers="0", **options
    )
    (layer,) = plan.layers
    assert layer.factors == 4 * held
    assert plan.peak >= plan.kept == layer.factors


def test_samples_of_a_layer_beyond() -> None:
    model, batch = large()
    plan = hk.plan(model, batch, nn.CrossEntropyLoss(), what="hessians", num_samples=4 * N)
    first = plan.layers[0]
    assert first.samples == 4 * 4 * N * (D + 2 * M)
    assert not first.recomputed
    tight = hk.plan(
        model,
        batch,
        nn.CrossEntropyLoss(),
        what="hessians",
        num_samples=4 * N,
        memory_budget=2**20,
    )
    assert tight.layers[0].recomputed
    assert "spill='disk'" in tight.advice[0]
