"""Factors.operator() of real models: order of flat vectors, joint biases, groups; launches."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from blocks import CE, quietly
from dense import layer_factors, relative_error
from kronecker_cases import dense_kronecker, network, permutation, shifted
from launches import Operators
from networks import classes, generator, randn, sample_loss, seeded
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


class Mixed(nn.Module):
    """A grouped convolution, a layer that keeps its weight [d, m], and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 2, groups=2)
        self.kept = Conv1D(5, 6)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).flatten(2).mean(2)
        return self.head(torch.relu(self.kept(h)))


DATA = [(randn(7, 4, 3, 3), classes(7, c=3)), (randn(4, 4, 3, 3, seed=1), classes(4, c=3, seed=1))]


def factors(bias: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, hk.Factors]:
    model = seeded(Mixed()).to(dtype)
    data = [(x.to(dtype), y) for x, y in DATA]
    return model, quietly(hk.kronecker_factors, model, data, CE, bias=bias)


def dense_of(found: hk.Factors, order: str) -> Tensor:
    blocks = []
    for name, f in found.items():
        A, B = f.output_hessian.double(), f.input_covariance.double()
        R = permutation(*f.layer_shape, transposed=name == "kept" and order == "weight")
        blocks.append(R @ dense_kronecker(A, B) @ R.T)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["weight", "output"])
@pytest.mark.parametrize("bias", ["none", "joint"])
def test_operator_of_factors(bias: str, order: Any, dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    _, found = factors(bias, dtype)
    K, dense = found.operator(order), dense_of(found, order)
    assert list(K.layers) == list(found)
    vectors = randn(len(dense), 2, seed=3)
    number = 0.1 * float(dense.trace()) / len(dense)
    inverse = torch.linalg.inv(shifted(dense, number))
    given = vectors.to(dtype)
    assert relative_error(K @ given, dense @ vectors) <= bound
    assert relative_error(K.solve(given, number), inverse @ vectors) <= bound
    logdet = float(torch.linalg.slogdet(shifted(dense, number)).logabsdet)
    assert K.logdet(number) == pytest.approx(logdet, rel=1e-5)
    matrices = K.solve(K.split(given), number)
    assert relative_error(K.flat(matrices), inverse @ vectors) <= bound
    for name, f in found.items():
        assert matrices[name].shape == (2, *f.layer_shape)
        assert K.layers[name].name == name


def test_flat_vectors_are_those_of_the_weights_and_of_gauss_newton() -> None:
    model, found = factors("none")
    K = found.operator()
    G = quietly(hk.GaussNewton, model, DATA, CE)
    assert K.slices == G.slices
    flat = torch.cat([model.get_parameter(f"{n}.weight").detach().flatten() for n in found])
    for name, matrix in K.split(flat).items():
        weight = model.get_parameter(f"{name}.weight").detach()
        assert torch.equal(matrix, weight.T if name == "kept" else weight.flatten(1))
        assert torch.equal(matrix, G.split(flat)[name])


def test_against_a_loop_over_samples() -> None:
    """From the layers' inputs and outputs of every sample alone to the answer."""
    model, found = factors("joint")
    dense = []
    for name in ("conv", "head"):
        own = layer_factors(model, DATA, sample_loss, name, joint=True)
        dense.append(dense_kronecker(own["output_hessian"], own["input_covariance"]))
    K = hk.NetworkOperator({name: found[name].operator() for name in ("conv", "head")})
    whole = torch.block_diag(*dense)
    vector = randn(len(whole))
    expected = torch.linalg.solve(shifted(whole, 0.05), vector)
    assert relative_error(K.solve(vector, 0.05), expected) <= 1e-9


def test_corrected_operators_of_a_network() -> None:
    model, found = factors("none")
    hessians = quietly(hk.layer_hessians, model, DATA, CE)
    layers = {
        name: hk.eigenvalue_corrected(hessians[name], f.operator()) for name, f in found.items()
    }
    E = hk.NetworkOperator(layers)
    dense = torch.block_diag(*(layer.to_dense() for layer in layers.values()))
    vector = randn(len(dense))
    expected = torch.linalg.solve(shifted(dense, 0.05), vector)
    assert relative_error(E.solve(vector, 0.05), expected) <= 1e-9
    assert E.trace() == pytest.approx(sum(H.trace() for H in hessians.values()), rel=1e-9)


def test_bad_order() -> None:
    with pytest.raises(ValueError, match="order must be 'weight' or 'output', got 'input'"):
        factors("none")[1].operator("input")  # type: ignore[arg-type]


# Launches: the CPU plays a device, whose values nobody looks at one by one.


def operators_of(call: Any) -> tuple[int, dict[str, int]]:
    """Launches of a call, and how often each operator was called."""
    call()
    counted = Operators()
    with mock.patch("hesskern.operators.vectors.on_host", return_value=False), counted:
        call()
    names: dict[str, int] = {}
    for (_, name), n in counted.by_line.items():
        names[name] = names.get(name, 0) + n
    return counted.launches, names


GROUPED = ("grouped_kron_matmul", "grouped_kron_eigen_matmul")


@pytest.mark.parametrize("form", ["flat", "block", "by layer"])
def test_solve_is_one_grouped_product_whatever_the_number_of_layers(form: str) -> None:
    launches = []
    for names in (("plain", "ekfac"), ("plain", "ekfac", "single", "one output", "low rank")):
        K, dense = network(torch.float32, *names)
        flat = randn(len(dense), 3).float()
        v: Any = {"flat": flat[:, 0], "block": flat, "by layer": K.split(flat)}[form]
        count, calls = operators_of(lambda K=K, v=v: K.solve(v, 0.1))
        assert [calls.get(name, 0) for name in GROUPED] == [0, 1]
        launches.append(count)
        # Another damping takes a sum and a division for all layers.
        dampings = iter((0.2, 0.3))
        fresh, _ = operators_of(lambda K=K, v=v, given=dampings: K.solve(v, next(given)))
        assert fresh - count == 2
    assert launches[0] == launches[1] <= 5


def test_products_and_samples_are_one_grouped_product_of_a_kind() -> None:
    K, dense = network(torch.float32)
    vector = torch.ones(len(dense))
    _, calls = operators_of(lambda: K @ vector)
    assert [calls.get(name, 0) for name in GROUPED] == [1, 1]
    _, calls = operators_of(lambda: K.sample(2, 0.1, generator()))
    assert [calls.get(name, 0) for name in GROUPED] == [1, 0]
    raised = K.power(-0.5, 0.1)
    _, calls = operators_of(lambda: raised @ vector)
    assert [calls.get(name, 0) for name in GROUPED] == [0, 1]
