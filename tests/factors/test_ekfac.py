"""EKFAC in a stream against loops over samples and dense matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import gauss_newton, relative_error
from networks import CASES, CE, sample_loss
from torch import Tensor

import hesskern as hk

pytestmark = [
    # torch's remark on "same" padding of even kernels.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning"),
    # Two biases, one weight: neither bias belongs to all of its calls.
    pytest.mark.filterwarnings("ignore:left out. 'first' has a weight that is also:UserWarning"),
]


def basis(E: Any) -> Tensor:
    """[P, P] with the vectors u_i (x) v_j in its columns."""
    left, right, _ = E.eigenbases
    return torch.block_diag(*(torch.kron(u, v) for u, v in zip(left, right, strict=True))).double()


def along(E: Any, dense: Tensor) -> Tensor:
    """[m, d] curvature of a dense matrix, output first, along the operator's eigenvectors."""
    Q = basis(E)
    return (Q * (dense @ Q)).sum(0).reshape(E.layer_shape)


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", CASES)
def test_exact_rows_against_the_dense_gauss_newton_matrix(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    factors = hk.kronecker_factors(model, data, CE, bias=bias)
    E = hk.ekfac(model, data, CE, output="exact", bias=bias)
    assert list(E) == list(factors)
    assert E.num_samples == 7
    for layer, found in E.items():
        joint = E.specs[layer].joint
        assert joint == (bias == "joint" and model.get_submodule(layer).bias is not None)
        dense = gauss_newton(model, data, sample_loss, layer, joint=joint)
        assert found.shape == dense.shape
        assert found.dtype == torch.float64
        assert relative_error(found.values, along(found, dense)) <= 1e-10
        assert found.trace() == pytest.approx(float(dense.trace()), rel=1e-10)
        Q = basis(found)
        assert relative_error(Q.T @ Q, torch.eye(len(Q)).double()) <= 1e-10
        K = factors[layer].operator().to_dense()
        turned = Q.T @ K @ Q
        assert relative_error(turned.diag().diag(), turned) <= 1e-10
