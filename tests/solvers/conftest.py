"""A device that the CPU plays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device_operators import played_device
from played_device import Counts


@pytest.fixture
def device() -> Iterator[Counts]:
    with played_device() as counts:
        yield counts
