"""Row space of the weights behind a layer, and the closed-form output Hessian."""

import pytest
import torch
from networks import randn
from torch import nn

import hesskern as hk


def test_weight_product():
    W = [randn(5, 7, seed=1), randn(3, 5, seed=2)]
    torch.testing.assert_close(hk.weight_product(W), W[1] @ W[0])
    assert torch.equal(hk.weight_product([], 3), torch.eye(3).double())
    with pytest.raises(ValueError, match=r"weights\[1\] must be \[m, 5\] to follow"):
        hk.weight_product([W[0], randn(3, 4)])
    with pytest.raises(ValueError, match="outputs must be given"):
        hk.weight_product([])


def test_closed_form_is_exact_where_half_of_the_units_are_open_at_random():
    # z -> relu -> W: with signs of z independent of the logits' Hessian A,
    # E[D W^T A W D] is S^T E[A] S / 4 off the diagonal.
    S, A = randn(3, 6, seed=3), randn(3, 3, seed=4)
    A = A @ A.T
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 6)
    mean = torch.stack([torch.diag(d) @ S.T @ A @ S @ torch.diag(d) for d in masks]).mean(0)
    found = hk.closed_form_output_hessian(S, A, 1)
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(found[off], mean[off])
    torch.testing.assert_close(found.diagonal() * 2, mean.diagonal())
    torch.testing.assert_close(hk.closed_form_output_hessian(S, A, 2), found / 4)
    with pytest.raises(ValueError, match=r"logit_hessian must be \[c, c\] = \[3, 3\]"):
        hk.closed_form_output_hessian(S, torch.eye(4), 1)
    with pytest.raises(ValueError, match="layers must not be negative, got -1"):
        hk.closed_form_output_hessian(S, A, -1)


def test_overlap_by_projectors():
    S, M = randn(4, 9, seed=5), randn(9, 9, seed=6)
    M = M @ M.T
    top = torch.linalg.eigh(M).eigenvectors[:, -3:]
    rows = torch.linalg.pinv(S) @ S
    one = S.sum(0) / S.sum(0).norm()
    orthogonal = rows - torch.outer(one, one)
    centred = S - S.mean(0)
    centred = torch.linalg.pinv(centred) @ centred
    found = hk.row_space_overlap(S, M)
    assert found.orthogonal == pytest.approx(float((top.T @ orthogonal @ top).trace()) / 3)
    assert found.centred == pytest.approx(float((top.T @ centred @ top).trace()) / 3)
    assert abs(found.orthogonal - found.centred) > 1e-3


def test_range_of_the_closed_form_is_the_centred_row_space():
    S = randn(4, 9, seed=5)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    M = hk.closed_form_output_hessian(S, p.diag() - p.outer(p), 1)
    assert hk.row_space_overlap(S, M).centred == pytest.approx(1.0)


def test_last_layer_lies_in_its_row_space_entirely():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    data = [(randn(30, 5), torch.arange(30) % 4)]
    M = hk.kronecker_factors(model, data, nn.CrossEntropyLoss())["2"].output_hessian
    found = hk.row_space_overlap(hk.weight_product([], 4), M)
    assert found.orthogonal == pytest.approx(1.0)
    assert found.centred == pytest.approx(1.0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"S must be \[c, m\] with 2 <= c <= m, got \[5, 4\]"):
        hk.row_space_overlap(randn(5, 4), torch.eye(4))
    with pytest.raises(ValueError, match=r"output_hessian must be \[4, 4\], got \[3, 3\]"):
        hk.row_space_overlap(randn(3, 4), torch.eye(3))
    with pytest.raises(ValueError, match="S must have rank c"):
        hk.row_space_overlap(torch.ones(3, 4), torch.eye(4))
