"""The nearest Kronecker product against the rearranged dense matrix's singular pair."""

import pytest
import torch
from torch import nn

import hesskern as hk


def hessian(model, x, name, classes=4):
    torch.manual_seed(1)
    y = torch.randint(classes, (len(x),))
    return hk.layer_hessians(model.double(), [(x.double(), y)], nn.CrossEntropyLoss(), [name])[name]


def van_loan(dense, m, d):
    """Best A (x) B of a dense [m d, m d] matrix, from the SVD of its rearrangement [m m, d d]."""
    rearranged = dense.reshape(m, d, m, d).permute(0, 2, 1, 3).reshape(m * m, d * d)
    left, values, right = torch.linalg.svd(rearranged)
    best = values[0] * torch.outer(left[:, 0], right[0])
    return best.reshape(m, m, d, d).permute(0, 2, 1, 3).reshape(m * d, m * d)


@pytest.mark.parametrize("kind", ["linear", "conv", "sequence"])
def test_equals_van_loan(kind):
    torch.manual_seed(0)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
        H = hessian(model, torch.randn(30, 7), "0")
    elif kind == "conv":
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
        H = hessian(model, torch.randn(12, 2, 4, 4), "0")
    else:
        model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
        H = hessian(model, torch.randn(12, 2, 9), "0")
    K = hk.nearest_kronecker(H, tol=1e-12)
    expected = van_loan(H.to_dense(), *H.layer_shape)
    assert (K.to_dense() - expected).norm() <= 1e-8 * expected.norm()


def test_no_farther_than_the_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x, y = torch.randn(30, 7).double(), torch.randint(4, (30,))
    H = hk.layer_hessians(model, [(x, y)], nn.CrossEntropyLoss())["0"]
    factors = hk.kronecker_factors(model, [(x, y)], nn.CrossEntropyLoss())["0"]
    best = hk.decoupling_error(H, hk.nearest_kronecker(H)).frobenius
    assert best < hk.decoupling_error(H, factors.operator()).frobenius


def test_bad_input():
    torch.manual_seed(0)
    with pytest.raises(TypeError, match="H must be a LayerHessian, got Tensor"):
        hk.nearest_kronecker(torch.eye(4))
    grouped = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 4))
    H = hessian(grouped, torch.randn(5, 2, 2, 2), "0")
    with pytest.raises(NotImplementedError, match="2 groups"):
        hk.nearest_kronecker(H)
    linear = hessian(nn.Sequential(nn.Linear(7, 4)), torch.zeros(5, 7), "0")
    with pytest.raises(ValueError, match="H is zero"):
        hk.nearest_kronecker(linear)
