"""Weights inside a loss: what the errors and docs/losses.md advise gives torch's Hessian."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import relative_error
from networks import Shaped, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk


def documented() -> dict[str, Any]:
    """What the code in docs/losses.md defines."""
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    return names


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.25]).double()


def test_class_weights_as_sample_weights() -> None:
    model, x, y = seeded(Shaped((3,))), randn(8, 3), classes(8, c=3)
    torchs = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    given = {"sample_weight": CLASS_WEIGHTS[y]}
    found = hk.layer_hessians(
        model, [(x[:5], y[:5]), (x[5:], y[5:])], nn.CrossEntropyLoss(), **given
    )
    for layer, H in found.items():
        assert relative_error(H.to_dense(), whole_hessian(model, x, y, torchs, layer)) <= 1e-10


def whole_hessian(model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module, layer: str) -> Tensor:
    """torch's second derivative of the loss of the whole batch in a layer's weight, [P, P]."""
    weight = model.get_parameter(f"{layer}.weight")

    def value(flat: Tensor) -> Tensor:
        changed = {f"{layer}.weight": flat.reshape(weight.shape)}
        return loss(torch.func.functional_call(model, changed, (x,)), y)

    return torch.autograd.functional.hessian(value, weight.detach().flatten())


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)], ids=["classes", "tokens", "pixels"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore", [False, True])
def test_class_weights_by_the_advice(shape: tuple[int, ...], reduction: str, ignore: bool) -> None:
    model, x, y = seeded(Shaped(shape)), randn(8, 3), classes(8, *shape[1:], c=3)
    if ignore and len(shape) > 1:
        y[2].flatten()[::2] = -100
        y[1].flatten()[1] = -100
    torchs = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction=reduction)
    with pytest.raises(NotImplementedError, match=r"docs/losses\.md"):
        hk.layer_hessians(model, [(x, y)], torchs)
    loss = documented()["WeightedCrossEntropy"](CLASS_WEIGHTS, mean=reduction == "mean")
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = hk.layer_hessians(model, data, loss)
    totals = (CLASS_WEIGHTS[y.clamp(min=0)] * (y != -100)).reshape(8, -1).sum(1)
    whole = hk.layer_hessians(model, data, loss, sample_weight=totals)
    for layer, H in found.items():
        alone = torch.stack(
            [whole_hessian(model, x[n : n + 1], y[n : n + 1], torchs, layer) for n in range(8)]
        )
        assert relative_error(H.to_dense(), alone.mean(0)) <= 1e-10
        R = hk.AutogradHessian(model, data, loss, params=[f"{layer}.weight"])
        assert relative_error(R.to_dense(), alone.mean(0)) <= 1e-10
        if reduction == "mean":
            together = whole_hessian(model, x, y, torchs, layer)
            assert relative_error(whole[layer].to_dense(), together) <= 1e-10
    hk.kronecker_factors(model, data, loss, output="empirical")


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)], ids=["one", "labels", "pixels"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("option", ["weight", "pos_weight", "both"])
def test_binary_weights_by_the_advice(shape: tuple[int, ...], reduction: str, option: str) -> None:
    model, x, y = seeded(Shaped(shape)), randn(8, 3), classes(8, *shape, c=2).double()
    sizes = shape or (1,)
    w = randn(*sizes, seed=3).abs() + 0.1 if option != "pos_weight" else None
    w1 = randn(*sizes, seed=4).abs() + 0.1 if option != "weight" else None
    torchs = nn.BCEWithLogitsLoss(w, pos_weight=w1, reduction=reduction)
    with pytest.raises(NotImplementedError, match=r"docs/losses\.md"):
        hk.layer_hessians(model, [(x, y)], torchs)
    loss = documented()["WeightedBinaryCrossEntropy"](w, w1, mean=reduction == "mean")
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    for layer, H in hk.layer_hessians(model, data, loss).items():
        alone = torch.stack(
            [whole_hessian(model, x[n : n + 1], y[n : n + 1], torchs, layer) for n in range(8)]
        )
        assert relative_error(H.to_dense(), alone.mean(0)) <= 1e-10
        R = hk.AutogradHessian(model, data, loss, params=[f"{layer}.weight"])
        assert relative_error(R.to_dense(), alone.mean(0)) <= 1e-10
    hk.kronecker_factors(model, data, loss, output="empirical")
