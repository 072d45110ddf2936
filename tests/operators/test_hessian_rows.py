"""``layer_hessians(output=)``: Hessians of drawn and empirical rows against dense loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import gauss_newton, relative_error, rows_hessian
from drawn_rows import single_target_rows
from networks import CASES, CE, Shaped, classes, randn, sample_loss, seeded
from torch import Tensor, nn

import hesskern as hk

ROWS = ["mc", "empirical"]


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("output", ROWS)
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence", "attention", "twice"])
@pytest.mark.filterwarnings("error")
def test_against_the_dense_matrix(name: str, output: Any, budget: int | None, bias: Any) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    found = hk.layer_hessians(
        model, data, CE, output=output, bias=bias, mc_samples=3, seed=5, memory_budget=budget
    )
    rows = single_target_rows(model, data, sample_loss, output, 3, 5)
    assert set(found) == set(case.layers)
    for layer, H in found.items():
        joint = bias == "joint" and model.get_submodule(layer).bias is not None
        dense = rows_hessian(model, data, rows, layer, joint=joint)
        assert H.cached == (budget is None)
        vector = randn(len(dense), seed=9)
        # Layers that run the model again draw the same targets each time.
        for _ in range(2):
            assert relative_error(H @ vector, dense @ vector) <= 1e-10
        assert relative_error(H.to_dense(), dense) <= 1e-10
        assert H.trace() == pytest.approx(float(dense.trace()), rel=1e-10)
        assert not H.is_exact
        assert f"output={output!r}" in str(H.inexact_reason)


def test_weights_and_terms_of_a_mean() -> None:
    """Of a mean over T terms the gradient of their sum is divided by sqrt(T)."""
    model = seeded(Shaped((4, 5)))
    data = [(randn(3, 3, seed=i), classes(3, 5, c=4, seed=i)) for i in (1, 2)]
    weights = [torch.tensor([1.0, 0.5, 0.0]).double(), torch.tensor([2.0, 1.0, 3.0]).double()]

    def summed(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs.reshape(-1, 4, 5), target, reduction="sum") / 5**0.5

    rows = single_target_rows(model, data, summed, "empirical")
    weight = torch.cat(weights)
    found = hk.layer_hessians(model, data, CE, output="empirical", sample_weight=weight)
    for layer, H in found.items():
        dense = rows_hessian(model, data, rows, layer, weights=weights)
        assert relative_error(H.to_dense(), dense) <= 1e-10
    mean = hk.kronecker_factors(model, data, CE, output="empirical", sample_weight=weight)
    for layer, H in found.items():
        # Of one position per sample E[M] is the trace over the inputs of E[M (x) 1].
        ones = hk.layer_hessians(
            model, data, CE, output="empirical", sample_weight=weight, bias="joint"
        )[layer]
        m, d = ones.layer_shape
        corner = ones.to_dense().reshape(m, d, m, d)[:, -1, :, -1]
        assert relative_error(corner, mean[layer].output_hessian) <= 1e-10
        assert H.num_samples == 7.5


def test_many_draws_approach_the_exact_matrix() -> None:
    model, data = CASES["relu"].model(), CASES["relu"].data()
    found = hk.layer_hessians(model, data, CE, output="mc", mc_samples=4000)
    for layer, H in found.items():
        dense = gauss_newton(model, data, sample_loss, layer)
        assert relative_error(H.to_dense(), dense) <= 0.1


@pytest.mark.parametrize("budget", [None, 0])
def test_pruned_hessians_of_drawn_rows(budget: int | None) -> None:
    model, data = CASES["relu"].model(), CASES["relu"].data()
    given: dict[str, Any] = {"output": "mc", "mc_samples": 2, "tolerance": 0.3}
    rows = single_target_rows(model, data, sample_loss, "mc", 2)
    for layer, H in hk.layer_hessians(model, data, CE, memory_budget=budget, **given).items():
        lost = rows_hessian(model, data, rows, layer) - H.to_dense()
        assert H.pruned_trace == pytest.approx(float(lost.trace()), rel=1e-10)
        assert H.pruned_trace > 0
        assert float(torch.linalg.matrix_norm(lost, 2)) <= H.pruning_error * (1 + 1e-10)
        assert H.cached == (budget is None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": "sampled"}, "output must be 'exact', 'mc' or 'empirical', got 'sampled'"),
        ({"output": "mc", "mc_samples": 0}, "mc_samples must be a positive integer, got 0"),
        ({"output": "mc", "seed": 1.5}, "seed must be an integer, got 1.5"),
    ],
)
def test_bad_input(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hk.layer_hessians(nn.Linear(4, 3), CASES["linear"].data(torch.float32), CE, **given)
