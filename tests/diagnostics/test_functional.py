"""The functional term: the Hessian minus its Gauss-Newton block."""

import pytest
import torch
from dense import gauss_newton, loss_hessian
from networks import classes, randn, seeded, tanh_problem
from torch import nn

import hesskern as hk


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_share_by_its_definition(activation):
    model, data, loss = tanh_problem(activation)
    found = hk.functional_share(model, data, loss, "0")
    H, G = loss_hessian(model, data, loss, "0"), gauss_newton(model, data, loss, "0")
    assert found.spectral == pytest.approx(
        float(torch.linalg.matrix_norm(H - G, 2) / torch.linalg.matrix_norm(H, 2)), rel=1e-6
    )
    assert found.frobenius == pytest.approx(float((H - G).norm() / H.norm()), rel=1e-6)
    assert found.frobenius > 0.01


def test_no_share_behind_piecewise_linear_operations():
    model, data, loss = tanh_problem(nn.ReLU)
    assert hk.functional_share(model, data, loss, "0").frobenius < 1e-7
    model, data, loss = tanh_problem(nn.Tanh)
    assert hk.functional_share(model, data, loss, "2").frobenius < 1e-7


def test_share_in_weights_that_are_no_modules_and_in_tied_ones():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            h = self.attention(x, x, x, need_weights=False)[0].mean(1)
            return self.head(self.one(h).tanh() + self.two(h))

    model = seeded(Attends())
    data, loss = [(randn(6, 3, 4), classes(6, c=3))], nn.CrossEntropyLoss()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for name in ("attention.in_proj", "two"):
            found = hk.functional_share(model, data, loss, name)
            H, G = loss_hessian(model, data, loss, name), gauss_newton(model, data, loss, name)
            assert found.frobenius == pytest.approx(float((H - G).norm() / H.norm()), rel=1e-6)
