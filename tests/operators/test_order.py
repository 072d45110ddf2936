"""Flat vectors in the weight's order, and as matrices [m, d]."""

from __future__ import annotations

import pytest
import torch
from blocks import CE, batches, quietly, sample_loss
from dense import gauss_newton, relative_error
from networks import randn, seeded
from torch import Tensor, nn

import hesskern as hk


class Conv1D(nn.Module):
    """As in transformers: a linear layer that keeps its weight [d, m]."""

    def __init__(self, m: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, m))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


M, D = 5, 4


def test_order_of_flat_vectors() -> None:
    kept = seeded(nn.Sequential(Conv1D(M, D), nn.ReLU(), nn.Linear(M, 3)))
    plain = nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, 3)).double()
    plain.load_state_dict(kept.state_dict() | {"0.weight": kept.state_dict()["0.weight"].T})
    data = batches(6, 4)
    dense = gauss_newton(plain, data, sample_loss, "0")
    H = quietly(hk.layer_hessians, kept, data, CE)["0"]
    f = quietly(hk.kronecker_factors, kept, data, CE)["0"]
    K = torch.kron(f.output_hessian, f.input_covariance)
    v = randn(M, D)
    for operator, matrix in ((H, dense), (f, K)):
        by_output, by_weight = operator.operator(order="output"), operator.operator()
        assert relative_error(by_output.to_dense(), matrix) <= 1e-12
        assert relative_error(by_output @ v.flatten(), matrix @ v.flatten()) <= 1e-12
        product = (by_weight @ v.T.flatten()).reshape(D, M).T.flatten()
        assert relative_error(product, matrix @ v.flatten()) <= 1e-12
        assert by_output.weight_shape == (M, D)
        assert by_weight.weight_shape == (D, M)
        with pytest.raises(ValueError, match="order must be 'weight' or 'output', got 'input'"):
            operator.operator(order="input")
    # What is asked of both together.
    assert H.operator("output").inner(f.operator("output")) == pytest.approx(H.inner(f.operator()))
    assert relative_error(H.operator("output").diagonal(), dense.diagonal()) <= 1e-12
    assert H.transposed
    assert H.operator("weight") is H


def test_of_other_layers_both_orders_are_the_same() -> None:
    model = seeded(nn.Sequential(nn.Linear(D, 3)))
    H = hk.layer_hessians(model, batches(4), CE)["0"]
    assert H.operator("output") is H
    f = hk.kronecker_factors(model, batches(4), CE)["0"]
    assert torch.equal(f.operator("output").to_dense(), f.operator().to_dense())


def test_sums_with_the_hessian_by_autograd_are_in_one_order() -> None:
    """Its vectors are in the order of the parameters' memory."""
    model = seeded(nn.Sequential(Conv1D(M, D), nn.ReLU(), Conv1D(M, M), nn.ReLU(), nn.Linear(M, 3)))
    data = batches(6, 4)
    f = quietly(hk.kronecker_factors, model, data, CE)
    R = hk.AutogradHessian(model, data, CE, ["0.weight"])
    difference = R - f["0"].operator()
    expected = R.to_dense() - f["0"].operator().to_dense()
    assert relative_error(difference.to_dense(), expected) <= 1e-12
    with pytest.raises(ValueError, match="'0' is in the order of the weight"):
        _ = R - f["0"].operator("output")
    names = ["0.weight", "2.weight", "4.weight"]
    whole = hk.AutogradHessian(model, data, CE, names)
    assert (whole - f.operator()).shape == (M * D + M * M + 3 * M,) * 2
    with pytest.raises(ValueError, match="in the order of the weight"):
        _ = f.operator("output") + whole
    with pytest.raises(ValueError, match=r"the same layers in one order, got '2' .* and '0'"):
        _ = hk.AutogradHessian(model, data, CE, [names[1], names[0], names[2]]) - f.operator()
    G = quietly(hk.GaussNewton, model, data, CE)
    assert relative_error((whole - G).to_dense(), whole.to_dense() - G.to_dense()) <= 1e-10


def test_a_bias_is_beside_its_weight_or_behind_it() -> None:
    """A joint block has it as the last column."""
    model = seeded(nn.Sequential(nn.Linear(D, 3)))
    data = batches(4)
    R = hk.AutogradHessian(model, data, CE)
    joint = hk.kronecker_factors(model, data, CE, bias="joint")["0"].operator()
    assert R.shape == joint.shape
    with pytest.raises(ValueError, match=r"got '0' \[3, 4\] and 'layer 0' \[3, 5\]"):
        _ = R - joint
