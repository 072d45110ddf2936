"""Without a checkpoint nothing is looked at for the sake of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from networks import CE, classes, randn, seeded
from torch import nn

import hesskern as hk

MODEL = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
DATA = [(randn(6, 4, seed=n), classes(6, c=3)) for n in range(2)]
WEIGHT = randn(12).abs()
FACTORS = hk.kronecker_factors(MODEL, DATA, CE)

CALLS: dict[str, Callable[[], Any]] = {
    "kronecker_factors": lambda: hk.kronecker_factors(MODEL, DATA, CE, sample_weight=WEIGHT),
    "ekfac": lambda: hk.ekfac(MODEL, DATA, CE, factors=FACTORS),
    "layer_hessians": lambda: hk.layer_hessians(MODEL, DATA, CE, sample_weight=WEIGHT),
    "influence": lambda: hk.influence(FACTORS, MODEL, DATA[:1], DATA, CE),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_bit_of_what_was_given_is_read(call: str) -> None:
    # It would wait for a device, and take seconds for factors of a large network.
    refused = mock.Mock(side_effect=AssertionError("digested"))
    with (
        mock.patch("hesskern.checkpoints.facts.marked_digest", refused),
        mock.patch("hesskern.checkpoints.facts.tensor_digest", refused),
    ):
        CALLS[call]()
