"""All that takes a device, on one that the CPU plays: the CPU's numbers, and few questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from device_calls import CALLS, DENSE, NETWORKS, OPERATORS, Data, same
from devices import moved
from played_device import generators, played
from torch import nn


@pytest.fixture(autouse=True)
def made() -> Iterator[None]:
    played()
    with generators():
        yield


def check(call: Callable[[nn.Module, Data], Any], network: str) -> None:
    build, data = NETWORKS[network]
    expected = call(build(), data)
    same(call(build().to("played"), moved(data, "played")), expected, "played")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("call", CALLS | OPERATORS)
def test_numbers_are_the_cpus(call: str, network: str) -> None:
    check((CALLS | OPERATORS)[call], network)


@pytest.mark.parametrize("call", DENSE)
def test_numbers_of_dense_networks_are_the_cpus(call: str) -> None:
    check(DENSE[call], "mlp")
