"""Losses that users bring: a root of the curvature, with a value or without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import loss_hessian, relative_error
from loss_cases import LOSSES, softmax_root
from networks import Shaped, randn, seeded
from torch import Tensor

import hesskern as hk


class RootLoss:
    def output_root(self, outputs: Tensor, targets: Any) -> Tensor:
        return softmax_root(outputs, targets)


class RootLossWithValue(RootLoss):
    def per_sample(self, outputs: Tensor, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")


def test_custom_root_as_function_and_object_equals_the_loss_it_belongs_to() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    expected = hk.layer_hessians(model, data, case.loss)
    factors = hk.kronecker_factors(model, data, case.loss)
    for arguments in ({"output_root": softmax_root}, {"loss": RootLoss()}):
        found = hk.layer_hessians(model, data, **arguments)
        found_factors = hk.kronecker_factors(model, data, **arguments)
        for layer in expected:
            assert relative_error(found[layer].to_dense(), expected[layer].to_dense()) <= 1e-12
            assert (
                relative_error(found_factors[layer].output_hessian, factors[layer].output_hessian)
                <= 1e-12
            )
    stream = hk.FactorAccumulator(model, output_root=softmax_root)
    for x, y in data:
        stream.update(x, y)
    found = stream.factors()["a"].output_hessian
    assert relative_error(found, factors["a"].output_hessian) <= 1e-12


def test_custom_root_on_outputs_with_positions_and_any_targets() -> None:
    # 1/2 Σ w (f - t)² with targets (t, w) as a tuple: curvature w.
    model = seeded(Shaped((2, 3)))
    x = randn(4, 3)
    targets = (randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2).abs())

    def root(outputs: Tensor, both: Any) -> Tensor:
        return torch.diag_embed(both[1].sqrt().flatten(1)).unflatten(2, (2, 3))

    def sample(outputs: Tensor, weight: Tensor) -> Tensor:
        return 0.5 * (weight * outputs.square()).sum()

    for layer, H in hk.layer_hessians(model, [(x, targets)], output_root=root).items():
        expected = loss_hessian(model, [(x, targets[1])], sample, layer)
        assert relative_error(H.to_dense(), expected) <= 1e-10


def test_custom_loss_with_a_value_works_with_autograd_and_empirically() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    loss = RootLossWithValue()
    R = hk.AutogradHessian(model, data, loss, params="a.weight").to_dense()
    expected = loss_hessian(model, data, case.sample_loss, "a")
    assert relative_error(R, expected) <= 1e-10
    found = hk.kronecker_factors(model, data, loss, output="empirical")
    own = hk.kronecker_factors(model, data, case.loss, output="empirical")
    for layer in own:
        assert relative_error(found[layer].output_hessian, own[layer].output_hessian) <= 1e-12


def test_custom_loss_without_a_value_says_what_is_missing() -> None:
    case = LOSSES["cross-entropy"]
    model, data = seeded(Shaped((4,))), case.data()
    R = hk.AutogradHessian(model, data, RootLoss(), params="a.weight")
    with pytest.raises(NotImplementedError, match=r"per_sample\(outputs, targets\) -> \[N\]"):
        _ = R @ torch.ones(12).double()
    with pytest.raises(NotImplementedError, match="output='empirical'"):
        hk.kronecker_factors(model, data, RootLoss(), output="empirical")


@pytest.mark.parametrize(
    ("root", "error", "message"),
    [
        (lambda f, t: None, TypeError, "output_root must return a tensor, got NoneType"),
        (lambda f, t: f, ValueError, r"output_root must return \[N, r, .*4\], got \[5, 4\]"),
        (lambda f, t: f[:, :, None].expand(5, 4, 5), ValueError, r"got \[5, 4, 5\]"),
        (lambda f, t: f[:3, None], ValueError, r"got \[3, 1, 4\]"),
        (lambda f, t: f[:, None] * float("nan"), ValueError, "contain NaN or Inf in batch 0"),
    ],
)
def test_bad_custom_roots(root: Any, error: type[Exception], message: str) -> None:
    model = seeded(Shaped((4,)))
    data = LOSSES["cross-entropy"].data()
    with pytest.raises(error, match=message):
        hk.kronecker_factors(model, data, output_root=root)
    with pytest.raises(error, match=message):
        hk.layer_hessians(model, data, output_root=root)


def test_output_root_that_is_not_callable() -> None:
    model, data = seeded(Shaped((4,))), LOSSES["cross-entropy"].data()
    with pytest.raises(TypeError, match="output_root must be callable, got int"):
        hk.kronecker_factors(model, data, output_root=3)
