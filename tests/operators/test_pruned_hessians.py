"""Hessians without the samples that do not count: the bound on what is left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import CASES, CE, classes, randn, seeded
from pruned import check_pruned, heavy_tailed
from torch import nn

import hesskern as hk


@given(
    name=st.sampled_from(["relu", "residual", "conv groups", "conv stride", "sequence", "conv1d"]),
    tolerance=st.one_of(st.floats(1e-9, 0.9), st.sampled_from([1e-4, 1e-2, 0.5])),
    tail=st.booleans(),
    seed=st.integers(0, 20),
    budget=st.sampled_from([2**30, 1500]),
)
def test_pruning_bound(name: str, tolerance: float, tail: bool, seed: int, budget: int) -> None:
    case = CASES[name]
    model = seeded(case.build(), seed)
    data = heavy_tailed(case, seed) if tail else case.data()
    exact = hk.layer_hessians(model, data, CE)
    assume(all(H.trace() > 0 for H in exact.values()))
    for layer, H in hk.layer_hessians(
        model, data, CE, tolerance=tolerance, memory_budget=budget
    ).items():
        check_pruned(H, exact[layer].to_dense(), tolerance)


@pytest.mark.parametrize("name", ["linear", "conv groups", "sequence", "conv stride"])
def test_pruning_drops_much_where_few_samples_carry_the_trace(name: str) -> None:
    case = CASES[name]
    model = case.model()
    x = case.inputs(6)
    tail = torch.ones(6, dtype=torch.float64)
    tail[1:] = 1e-4
    data = [(x * tail.reshape(-1, *[1] * (x.dim() - 1)), classes(6, c=3))]
    exact = hk.layer_hessians(model, data, CE)
    first = case.exact[0]
    H = hk.layer_hessians(model, data, CE, tolerance=1e-3)[first]
    check_pruned(H, exact[first].to_dense(), 1e-3)
    assert H.pruning_error > 0
    # One sample of six is left, so the rank is at most its number of root rows.
    assert int(torch.linalg.matrix_rank(H.to_dense(), hermitian=True, rtol=1e-9)) <= 2


def test_spread_gradients_allow_more_than_the_trace_does() -> None:
    # Gradients of 30 classes in many directions: no eigenvalue is near the trace.
    model = seeded(nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 30)), 0)
    data = [(randn(200, 5, seed=1), classes(200, c=30, seed=2))]
    exact = hk.layer_hessians(model, data, CE)
    for name, H in hk.layer_hessians(model, data, CE, tolerance=0.02).items():
        check_pruned(H, exact[name].to_dense(), 0.02)
        assert H.pruned_trace > 0.04 * exact[name].trace()


def test_tolerance_zero_keeps_all() -> None:
    case = CASES["relu"]
    for H in hk.layer_hessians(case.model(), case.data(), CE, tolerance=0).values():
        assert H.pruning_error == 0.0


def test_pruning_everything_negligible_gives_zero_products() -> None:
    # All inputs of the first layer vanish: H is zero, and so is its bound.
    case = CASES["relu"]
    model = case.model()
    data = [(torch.zeros(3, 4).double(), classes(3, c=3))]
    H = hk.layer_hessians(model, data, CE, tolerance=0.5)["0"]
    assert H.pruning_error == 0.0
    assert H.trace() == 0.0
    assert torch.equal(H @ torch.ones(H.shape[0]).double(), torch.zeros(H.shape[0]).double())
    assert torch.equal(H.to_dense(), torch.zeros(H.shape).double())
