"""Influence scores on a device that the CPU plays: the CPU's numbers, named errors, no waiting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from masked import encoder, padded
from networks import classes, randn
from played_device import counting, generators, played
from torch import Tensor, nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def samples(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, 4, seed=seed), classes(n, c=3, seed=seed)


def on_host(scores: Any) -> Tensor:
    assert isinstance(scores, Tensor)
    return scores.cpu()


@pytest.mark.parametrize("where", ["host", "device"])
def test_numbers(where: str) -> None:
    device = played()
    train, queries = [samples(20), samples(9, 1)], [samples(3, 2)]
    for options in ({}, {"top": 4}, {"query_rank": 2}, {"per_token": True}):
        with generators():
            E = hk.kronecker_factors(mlp(), train, LOSS)
            expected = hk.influence(E, mlp(), queries, train, LOSS, **options)
            model = mlp().to(device)
            E = hk.kronecker_factors(model, train, LOSS)
            given = [[(x, y) for x, y in data] for data in (queries, train)]
            if where == "device":
                given = [[(x.to(device), y.to(device)) for x, y in data] for data in given]
            found = hk.influence(E, model, *given, LOSS, **options)
            torch.testing.assert_close(
                on_host(found.scores), on_host(expected.scores), rtol=1e-9, atol=1e-12
            )
            if "top" in options:
                assert torch.equal(on_host(found.indices), on_host(expected.indices))


@pytest.mark.parametrize("per_token", [False, True])
def test_padding(per_token: bool) -> None:
    device = played()
    layers = ["qkv", "out", "up", "down", "pixel"]
    more: Any = {"position_mask": lambda inputs: inputs["mask"], "layers": layers}
    train, queries = padded("left"), padded("right", (2, 5), seed=1)
    with generators():
        E = hk.kronecker_factors(encoder(), [train], LOSS, output="empirical", **more)
        given = E, encoder(), [queries], [train], LOSS
        expected = hk.influence(*given, per_token=per_token, **more).scores
        model = encoder().to(device)
        E = hk.kronecker_factors(model, [train], LOSS, output="empirical", **more)
        moved = [
            ({key: value.to(device) for key, value in inputs.items()}, targets.to(device))
            for inputs, targets in (queries, train)
        ]
        found = hk.influence(E, model, moved[:1], moved[1:], LOSS, per_token=per_token, **more)
        torch.testing.assert_close(on_host(found.scores), on_host(expected), rtol=1e-8, atol=1e-12)


def test_nan_is_named_behind_the_device() -> None:
    device = played()
    with generators():
        model = mlp().to(device)
        train, queries = [samples(20), samples(9, 1)], [samples(3, 2)]
        E = hk.kronecker_factors(model, train, LOSS)
        for data, row, message in (
            (queries, 1, "queries: the model's outputs for query 1 contain NaN"),
            (train, 4, "train: the model's outputs for sample 24 contain NaN"),
        ):
            x = data[-1][0]
            kept = float(x[row, 0])
            x[row, 0] = math.nan
            with pytest.raises(ValueError, match=message):
                hk.influence(E, model, queries, train, LOSS, batch_size=8)
            x[row, 0] = kept


def test_the_host_does_not_wait_for_every_piece() -> None:
    device = played()
    waits = []
    with generators():
        model = mlp().to(device)
        queries = [tuple(t.to(device) for t in samples(3, 2))]
        for count in (40, 400):
            train = [tuple(t.to(device) for t in samples(count))]
            E = hk.kronecker_factors(model, train, LOSS)
            with counting() as counts:
                hk.influence(E, model, queries, train, LOSS, batch_size=4)
            waits.append(counts.reads)
    # Ten times as many pieces: what the host asks for stays what it was.
    assert waits[1] <= waits[0] + 2
