"""Sums and multiples of operators against those of their dense matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dense import relative_error
from kronecker_cases import LAYERS, kronecker, network, positive, shifted
from networks import randn, small_network
from torch import nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def check(operator: hk.CurvatureOperator, dense: torch.Tensor, bound: float = 1e-11) -> None:
    assert operator.shape == tuple(dense.shape)
    vector, block = randn(len(dense)), randn(len(dense), 3, seed=1)
    dtype = operator.dtype
    assert relative_error(operator @ vector.to(dtype), dense @ vector) <= bound
    assert relative_error(operator @ block.to(dtype), dense @ block) <= bound
    assert relative_error(operator.to_dense(), dense) <= bound
    assert relative_error(operator.diagonal(), dense.diagonal()) <= bound
    assert operator.trace() == pytest.approx(float(dense.trace()), rel=bound, abs=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_layers(dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1e-11
    a, b = LAYERS["plain"](dtype), LAYERS["ekfac"](dtype)
    check(a.operator + b.operator, a.dense + b.dense, bound)
    check(a.operator - 0.5 * b.operator, a.dense - 0.5 * b.dense, bound)
    check(-(a.operator + b.operator) * 3, -3 * (a.dense + b.dense), bound)
    check(sum([a.operator, b.operator, a.operator]), 2 * a.dense + b.dense, bound)
    turned = LAYERS["conv1d"](dtype)
    both = kronecker(positive(3, 30), positive(6, 31), dtype, transposed=True)
    check(turned.operator + both.operator, turned.dense + both.dense, bound)


def test_operators_of_any_kind_are_added() -> None:
    model, data = small_network("linear")
    H = hk.layer_hessians(model, data, LOSS)["0"]
    K = hk.kronecker_factors(model, data, LOSS)["0"].operator()
    check(H - K, H.to_dense() - K.to_dense(), 1e-9)
    check(2 * H, 2 * H.to_dense(), 1e-9)
    G = hk.GaussNewton(model, data, LOSS)
    K_all = hk.kronecker_factors(model, data, LOSS).operator()
    check(G - K_all, G.to_dense() - K_all.to_dense(), 1e-9)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_multiple_keeps_the_eigenvectors(name: str, decomposed: bool) -> None:
    made = LAYERS[name](torch.float64)
    if decomposed:
        made.operator.logdet(1.0)
    vector = randn(len(made.dense))
    for factor in (3, np.float64(0.25), np.float32(0.5)):
        scaled = factor * made.operator
        assert type(scaled) is type(made.operator)
        assert isinstance(scaled, (hk.KroneckerOperator, hk.CorrectedOperator))
        check(scaled, float(factor) * made.dense)
        expected = torch.linalg.solve(shifted(float(factor) * made.dense, 0.1), vector)
        assert relative_error(scaled.solve(vector, 0.1), expected) <= 1e-10
    check(-made.operator, -made.dense)
    check(0 * made.operator, 0 * made.dense)


def test_sums_of_networks_take_every_form() -> None:
    names = ("plain", "conv1d", "ekfac groups")
    (K, dense), (other, _) = network(torch.float64, *names), network(torch.float64, *names)
    E = other.power(0.5)
    total, expected = K + 2.0 * E, dense + 2 * E.to_dense()
    check(total, expected)
    scaled = 3.0 * K
    assert isinstance(scaled, hk.NetworkOperator)
    check(scaled, 3 * dense)
    vectors = randn(len(dense), 2, seed=4)
    product = total @ K.split(vectors)  # type: ignore[operator]
    assert relative_error(K.flat(product), expected @ vectors) <= 1e-11


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ("plain", "one output", ValueError, r"agree in shape, got \(20, 20\) and \(6, 6\)"),
    ("conv1d", "plain of conv1d", ValueError, r"alike, but 'layer 0' is in the order of the wei"),
    ("conv1d", "ekfac groups", ValueError, r"got 'layer 0' \[3, 6\] and 'layer 0' \[6, 3\]"),
]


@pytest.mark.parametrize(("left", "right", "error", "message"), BAD)
def test_what_does_not_fit_is_refused(
    left: str, right: str, error: type[Exception], message: str
) -> None:
    def layer(name: str) -> hk.CurvatureOperator:
        if name == "plain of conv1d":
            return kronecker(positive(3), positive(6), torch.float64).operator
        return LAYERS[name](torch.float64).operator

    with pytest.raises(error, match=message):
        _ = layer(left) + layer(right)


def test_other_bad_terms() -> None:
    K = LAYERS["plain"](torch.float64).operator
    with pytest.raises(ValueError, match=r"dtype, got torch.float64 and torch.float32"):
        _ = K + LAYERS["plain"](torch.float32).operator
    far = hk.KroneckerOperator(*(f.to("meta") for f in (K.A, K.B)))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="device, got cpu and meta"):
        _ = K + far
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"factor of an operator must be finite, got {bad}"):
            _ = bad * K
    for other in (torch.eye(20).double(), 1.0, None, "K"):
        with pytest.raises(TypeError):
            _ = K + other
        with pytest.raises(TypeError):
            _ = K - other
    for factor in (torch.tensor(2.0), True, None, "2"):
        with pytest.raises(TypeError):
            _ = K * factor
        with pytest.raises(TypeError):
            _ = factor * K
    with pytest.raises(TypeError, match="terms must be operators, got Tensor"):
        hk.SumOperator([(1.0, torch.eye(2))])
    with pytest.raises(ValueError, match="terms must hold at least one operator"):
        hk.SumOperator([])
    with pytest.raises(TypeError, match="vectors must be a tensor, got dict"):
        _ = (K + K) @ {"a": torch.ones(4, 5)}
    with pytest.raises(AttributeError):
        (K + K).solve  # type: ignore[attr-defined] # noqa: B018


def test_networks_of_other_layers_are_not_added() -> None:
    a, _ = network(torch.float64, "plain", "ekfac")
    b = hk.NetworkOperator(dict(reversed(a.layers.items())))
    with pytest.raises(ValueError, match=r"one order, got 'plain' \[4, 5\] and 'ekfac' \[4, 5\]"):
        _ = a + b
    whole = kronecker(positive(8), positive(5), torch.float64).operator
    with pytest.raises(ValueError, match="the same layers"):
        _ = a + whole
