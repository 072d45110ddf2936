"""The algebra on a device: one that the CPU plays, and a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import relative_error
from devices import needs_cuda
from kronecker_cases import network, shifted
from networks import generator, randn
from played_device import OnDevice, counting, generators, played
from torch import Tensor

import hesskern as hk

NAMES = ("plain", "conv1d", "groups", "low rank")


def moved(K: hk.NetworkOperator, move: Any) -> hk.NetworkOperator:
    layers = {}
    for name, layer in K.layers.items():
        assert isinstance(layer, hk.KroneckerOperator)
        layers[name] = hk.KroneckerOperator.of_symmetric(
            move(layer.A), move(layer.B), transposed=layer.transposed
        )
    return hk.NetworkOperator(layers)


def fetched(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, OnDevice)
    return tensor.inner


def test_on_a_device_that_the_cpu_plays() -> None:
    played()
    here, dense = network(torch.float32, *NAMES)
    there = moved(here, OnDevice)
    flat = randn(len(dense), 3).float()
    expected = here.solve(flat, 0.1)
    with counting() as first:
        assert torch.equal(fetched(there.solve(OnDevice(flat), 0.1)), expected)
    with counting() as again:
        there.solve(OnDevice(flat), 0.1)
    with counting() as by_layer:
        matrices = there.solve(there.split(OnDevice(flat)), 0.1)
    # The factors are looked at once; then the vectors alone, all at once.
    assert again.asked.total() == by_layer.asked.total() == 1
    assert first.asked.total() > 1
    assert again.uploads == by_layer.uploads == 0
    for name, matrix in here.split(expected).items():
        assert relative_error(fetched(matrices[name]), matrix) <= 1e-6
    assert there.logdet(0.1) == pytest.approx(here.logdet(0.1), rel=1e-6)
    raised = there.power(-0.5, 0.1) @ OnDevice(flat)
    assert relative_error(fetched(raised), here.power(-0.5, 0.1) @ flat) <= 1e-6


def test_draws_are_those_of_the_generators_device() -> None:
    played()
    here, _ = network(torch.float32, *NAMES)
    there = moved(here, OnDevice)
    expected = here.sample(4, 0.1, generator(3))
    with generators():
        # Of the host's: the same numbers, sent there.
        assert torch.equal(fetched(there.sample(4, 0.1, generator(3))), expected)
        source = torch.Generator(device="played").manual_seed(3)
        assert torch.equal(fetched(there.sample(4, 0.1, source)), expected)
        first = there.layers["plain"]
        source = torch.Generator(device="played").manual_seed(3)
        assert torch.equal(fetched(first.sample(4, 0.1, source)), expected[:20])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(device: str, dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1e-11
    here, dense = network(dtype, *NAMES)
    there = moved(here, lambda factor: factor.to(device))
    flat = randn(len(dense), 3)
    inverse = torch.linalg.inv(shifted(dense, 0.1))
    given = flat.to(device, dtype)
    assert relative_error(there.solve(given, 0.1).cpu(), inverse @ flat) <= bound
    matrices = there.solve(there.split(given), 0.1)
    assert relative_error(there.flat(matrices).cpu(), inverse @ flat) <= bound
    assert relative_error((there @ given).cpu(), dense @ flat) <= bound
    assert there.logdet(0.1) == pytest.approx(here.logdet(0.1), rel=1e-6)
    assert torch.equal(
        there.sample(4, 0.1, generator(3)).cpu(), there.sample(4, 0.1, generator(3)).cpu()
    )
    source = torch.Generator(device=device).manual_seed(3)
    again = torch.Generator(device=device).manual_seed(3)
    assert torch.equal(there.sample(4, 0.1, source), there.sample(4, 0.1, again))
    inverted = there.factored_inverse(0.1)
    expected = here.factored_inverse(0.1) @ flat.to(dtype)
    assert relative_error((inverted @ given).cpu(), expected) <= bound
