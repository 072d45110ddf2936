"""Input covariances by forward hooks, against loops over samples and the factors of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import layer_factors, relative_error
from input_covariance_cases import Gated, Through, equal, gated, sample_loss, sequences
from networks import CASES, randn, seeded
from torch import Tensor, nn

import hesskern as hk

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings(
    "ignore:left out:UserWarning", "ignore:Using padding='same' with even:UserWarning"
)


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"tied"}))
def test_against_a_loop_over_samples(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    found = hk.input_covariances(model, data, bias=bias)
    assert found.num_samples == 7
    assert {*case.layers} <= {*found}
    for layer in case.layers:
        module = model.get_submodule(layer)
        joint = bias == "joint" and module.bias is not None
        expected = layer_factors(model, data, sample_loss, layer, joint=joint)
        ours = found[layer]
        assert relative_error(ours.input_covariance, expected["input_covariance"]) <= 1e-12
        assert torch.equal(ours.input_covariance, ours.input_covariance.mT)
        assert relative_error(ours.input_mean, expected["input_mean"].mean(1)) <= 1e-12
        assert ours.positions == expected["input_mean"].shape[1]


@pytest.mark.parametrize("name", ["relu", "conv stride", "sequence", "attention", "conv groups"])
def test_one_batch_equals_the_factors_to_the_bit(name: str) -> None:
    case = CASES[name]
    model, data = case.model().float(), case.data()[:1]
    data = [(x.float(), targets) for x, targets in data]
    factors, found = hk.kronecker_factors(model, data, CE), hk.input_covariances(model, data)
    for layer in factors:
        assert torch.equal(found[layer].input_covariance, factors[layer].input_covariance)
    weight = torch.tensor([0.5, 2.0, 1.25, 0.0, 3.0])[: len(data[0][0])]
    factors = hk.kronecker_factors(model, data, CE, sample_weight=weight)
    found = hk.input_covariances(model, data, sample_weight=weight)
    assert found.num_samples == factors.num_samples
    for layer in factors:
        ours, theirs = found[layer].input_covariance, factors[layer].input_covariance
        assert relative_error(ours, theirs) <= 1e-6


def test_data_in_every_form() -> None:
    model, parts = gated(), [sequences(seed=0), sequences(2, seed=1)]
    expected = hk.input_covariances(model, parts)
    whole = torch.cat(parts).reshape(-1, 6)
    assert relative_error(expected["gate"].input_covariance, whole.T @ whole / 5) <= 1e-12
    labels = torch.zeros(3)
    forms: list[Callable[[Tensor], Any]] = [
        lambda x: (x,),
        lambda x: [x, labels],
        lambda x: {"x": x, "labels": labels},
        lambda x: ({"x": x, "labels": labels}, labels),
        lambda x: ((x,), labels, torch.ones(len(x))),
        lambda x: {"x": x, "attention_mask": torch.ones(x.shape[:2], dtype=torch.long)},
    ]
    for form in forms:
        equal(hk.input_covariances(model, map(form, parts)), expected)


def test_labels_stay_where_forward_needs_them() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.layer(x * labels[:, None, None])

    model, x = seeded(Needs()).double(), sequences()
    labels = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = hk.input_covariances(model, [{"x": x, "labels": labels}])
    rows = (x * labels[:, None, None]).reshape(-1, 6)
    assert relative_error(found["layer"].input_covariance, rows.T @ rows / 3) <= 1e-12


def test_a_shared_input_is_summed_once_until_it_is_not_shared() -> None:
    class Sometimes(Gated):
        def forward(self, x: Tensor) -> Tensor:
            other = x if x.shape[1] == 4 else 2 * x
            return self.down(self.gate(x) * self.up(other))

    model = seeded(Sometimes()).double()
    seen = hk.input_covariances(model, [sequences()])
    sums = seen._sums.by_layer
    assert sums["gate"] is sums["up"] is not sums["down"]
    hk.input_covariances(model, [sequences(t=5, seed=1)], accumulate=seen)
    assert sums["gate"] is not sums["up"]
    first, second = sequences().reshape(-1, 6), sequences(t=5, seed=1).reshape(-1, 6)
    for name, factor in (("gate", 1), ("up", 4)):
        expected = (first.T @ first + factor * second.T @ second) / 6
        assert relative_error(seen[name].input_covariance, expected) <= 1e-12


def test_weights_that_are_pieces_of_one_vector() -> None:
    model = seeded(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2))).double()
    x = randn(5, 6)
    expected = hk.input_covariances(model, [x])
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    equal(hk.input_covariances(model, [x]), expected)
    # What reads one of the pieces is still seen, by whatever view.
    through = seeded(Through(lambda layer, x: layer(x) * layer.weight[1])).double()
    flat = nn.utils.parameters_to_vector(through.parameters()).detach()
    nn.utils.vector_to_parameters(flat, through.parameters())
    assert list(hk.input_covariances(through, [randn(5, 4)])) == ["last"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    model = seeded(nn.Linear(6, 3)).to(dtype)
    x = randn(4096, 6, dtype=torch.float32).to(dtype)
    found = hk.input_covariances(model, [x])[""]
    assert found.input_covariance.dtype == found.input_mean.dtype == torch.float32
    wide = x.double()
    assert relative_error(found.input_covariance, wide.T @ wide / 4096) <= 1e-6
    assert relative_error(found.input_mean, wide.mean(0)) <= 1e-5


def test_autocast_reaches_the_model_alone() -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))).float()
    x = randn(64, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = hk.input_covariances(model, [x])
    assert relative_error(found["0"].input_covariance, x.T @ x / 64) <= 1e-6
    assert found["2"].input_covariance.dtype == torch.float32
    assert found.settings["precision"].startswith("float32 model under bfloat16 autocast")
