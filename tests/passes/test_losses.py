"""Curvature of losses: closed forms and torch's own second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import gauss_newton, loss_hessian, relative_error
from loss_cases import LOSSES
from networks import Shaped, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes.losses import resolve_loss


@pytest.mark.parametrize("name", LOSSES)
def test_against_torchs_second_derivatives(name: str) -> None:
    case = LOSSES[name]
    model, data = seeded(Shaped(case.shape)), case.data()
    weights = case.weights()
    for layer, H in hk.layer_hessians(model, data, case.loss).items():
        block = gauss_newton(model, data, case.sample_loss, layer, weights=weights)
        hessian = loss_hessian(model, data, case.sample_loss, layer, weights=weights)
        assert relative_error(block, hessian) <= 1e-10
        assert relative_error(H.to_dense(), hessian) <= 1e-10
        assert H.num_samples == float(torch.cat(weights).sum())
        R = hk.AutogradHessian(model, data, case.loss, params=[f"{layer}.weight"])
        assert relative_error(R.to_dense(), hessian) <= 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_output_hessian_is_the_mean_curvature(name: str) -> None:
    # A Linear layer that puts out the model's outputs directly: its output Hessian is E[A].
    case = LOSSES[name]
    size = math.prod(case.shape)

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, size)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).reshape(len(x), *case.shape)

    model, data = seeded(Direct()), case.data()
    expected = torch.zeros(size, size, dtype=torch.float64)
    count = 0.0
    for (x, targets), weight in zip(data, case.weights(), strict=True):
        for n in range(len(x)):
            logits = model(x[n : n + 1]).detach().flatten()
            target = targets[n : n + 1]
            expected += weight[n] * torch.autograd.functional.hessian(
                lambda f, t=target: case.sample_loss(f.reshape(1, *case.shape), t), logits
            )
            count += float(weight[n])
    found = hk.kronecker_factors(model, data, case.loss)["fc"]
    assert relative_error(found.output_hessian, expected / count) <= 1e-12
    assert found.num_samples == count


def test_closed_forms() -> None:
    # One input that is one: the layer's Hessian is the mean curvature itself.
    logits = randn(4, seed=1)
    model = nn.Linear(1, 4, bias=False).double()
    model.weight.data.copy_(logits[:, None])
    one = torch.ones(1, 1).double()

    def curvature(loss: nn.Module, target: Tensor) -> Tensor:
        return hk.layer_hessians(model, [(one, target)], loss)[""].to_dense()

    p, sigma = logits.softmax(0), logits.sigmoid()
    label, values = torch.tensor([2]), torch.rand(1, 4).double()
    softmax = torch.diag(p) - torch.outer(p, p)
    assert relative_error(curvature(nn.CrossEntropyLoss(), label), softmax) <= 1e-14
    assert (
        relative_error(curvature(nn.CrossEntropyLoss(label_smoothing=0.5), label), softmax) <= 1e-14
    )
    eye = torch.eye(4).double()
    assert relative_error(curvature(nn.MSELoss(), values), eye / 2) <= 1e-14
    assert relative_error(curvature(nn.MSELoss(reduction="sum"), values), 2 * eye) <= 1e-14
    logistic = torch.diag(sigma * (1 - sigma))
    assert relative_error(curvature(nn.BCEWithLogitsLoss(), values), logistic / 4) <= 1e-14
    assert (
        relative_error(curvature(nn.BCEWithLogitsLoss(reduction="sum"), values), logistic) <= 1e-14
    )


@pytest.mark.parametrize(
    "logits",
    [
        [50.0, 0.0, -50.0, 1.0],
        [0.0, 50.0, 50.0, -80.0],
        [-35.0, -35.0, 35.0, 0.0],
        [20.0, 10.0, 0.0, -10.0],
        [-1000.0, 1000.0, 0.0, 999.0],
    ],
)
def test_confident_predictions_keep_their_digits(logits: list[float]) -> None:
    values = torch.tensor(logits).double()
    p = values.softmax(0)
    expected = torch.diag(p) - torch.outer(p, p)
    # p - p^2 loses the digits of a probability near one; its complement has them.
    top = int(p.argmax())
    rest = [i for i in range(4) if i != top]
    expected[top, top] = p[top] * p[rest].sum()
    model = nn.Linear(1, 4, bias=False)
    model.weight.data.copy_(values[:, None])
    data = [(torch.ones(1, 1), torch.tensor([0]))]
    found = hk.layer_hessians(model, data, nn.CrossEntropyLoss())[""].to_dense()
    assert torch.isfinite(found).all()
    assert relative_error(found, expected) <= 1e-5
    factor = hk.kronecker_factors(model, data, nn.CrossEntropyLoss())[""].output_hessian
    assert relative_error(factor, expected) <= 1e-5


# Rows made a few at a time


@pytest.mark.parametrize(
    "name", ["cross-entropy", "label smoothing", "ignore_index", "two classes"]
)
def test_rows_of_classes_made_a_few_at_a_time_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LOSSES[name]
    outputs, targets = randn(5, *case.shape).mul_(3), case.targets(5, 5)
    together = resolve_loss(case.loss).exact(outputs, targets)
    for size in (0, 2 * outputs.nbytes):
        monkeypatch.setattr("hesskern.passes.losses._TOGETHER_BYTES", size)
        few = resolve_loss(case.loss).exact(outputs, targets)
        assert together.count == few.count == case.shape[0] - 1
        for j in (*range(together.count), 0):
            assert torch.equal(together.row(j), few.row(j))


# Too many rows


def linear_outputs(*shape: int) -> tuple[nn.Module, Tensor]:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).reshape(-1, *(1,) * len(shape)).expand(-1, *shape)

    return seeded(Wide()), randn(2, 2)


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "rows"),
    [
        (nn.CrossEntropyLoss(), (2**16 + 2,), torch.zeros(2, dtype=torch.long), "65,537"),
        (nn.CrossEntropyLoss(), (501, 500), torch.zeros(2, 500, dtype=torch.long), "250,000"),
        (nn.MSELoss(), (257, 256), torch.zeros(2, 257, 256), "65,792"),
        (nn.BCEWithLogitsLoss(), (2**16 + 1,), torch.zeros(2, 2**16 + 1), "65,537"),
    ],
)
def test_more_exact_rows_than_anybody_waits_for(
    loss: nn.Module,
    shape: tuple[int, ...],
    targets: Tensor,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = linear_outputs(*shape)

    def backward(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("no backward pass may have begun")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", backward)
        for call in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
            with pytest.raises(
                ValueError, match=rf"{rows} root rows per sample .* limit is 65,536\. .*output='mc'"
            ):
                call(model, [(x, targets)], loss)
    for output in ("mc", "empirical"):
        hk.kronecker_factors(model, [(x, targets)], loss, output=output)


def test_the_limit_of_rows_itself_is_taken() -> None:
    outputs = randn(1, 2**16 + 1)
    loss = resolve_loss(nn.CrossEntropyLoss())
    assert loss.exact(outputs, torch.zeros(1, dtype=torch.long)).count == 2**16


def test_a_custom_root_may_have_any_number_of_rows() -> None:
    root = torch.ones(1, 1, 1).double().expand(1, 2**16 + 1, 2)
    assert resolve_loss(None, lambda f, t: root).exact(randn(1, 2), None).count == 2**16 + 1


# Classes in the wrong axis


@pytest.mark.parametrize(
    ("shape", "found", "message"),
    [
        (
            (4, 3),
            (4,),
            r"\[5, 4\] fit outputs \[5, 4, 3\] .* last axis; .* logits.transpose\(1, 2\)",
        ),
        ((2, 4, 3), (2, 4), r"\[5, 2, 4\] fit outputs \[5, 2, 4, 3\] .* logits.movedim\(-1, 1\)"),
        ((3, 3), (3,), r"\[5, 3\] fit outputs \[5, 3, 3\] whether .* targets.unsqueeze\(-1\)"),
        ((3, 3, 3), (3, 3), r"fit outputs \[5, 3, 3, 3\] whether .* logits.movedim\(-1, 1\)"),
    ],
)
def test_classes_in_the_last_axis(
    shape: tuple[int, ...], found: tuple[int, ...], message: str
) -> None:
    model = seeded(Shaped(shape))
    data = [(randn(5, 3), classes(5, *found, c=3))]
    for call in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        with pytest.raises(ValueError, match=message):
            call(model, data, nn.CrossEntropyLoss())
    R = hk.AutogradHessian(model, data, nn.CrossEntropyLoss(), params=["a.weight"])
    with pytest.raises(ValueError, match=message):
        _ = R @ torch.ones(12).double()


class Changed(nn.Module):
    """A model with something done to its logits."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 3)])
def test_the_way_out_of_an_ambiguous_class_axis(last: bool, shape: tuple[int, ...]) -> None:
    model, loss = seeded(Shaped(shape)), nn.CrossEntropyLoss()
    x, targets = randn(5, 3), classes(5, *shape[1:], c=3)

    def moved(logits: Tensor) -> Tensor:
        return logits.movedim(-1, 1) if last else logits

    wrapped = Changed(model, lambda logits: moved(logits).unsqueeze(-1))
    found = hk.layer_hessians(wrapped, [(x, targets.unsqueeze(-1))], loss)
    for layer in "ab":
        expected = gauss_newton(model, [(x, targets)], lambda f, t: loss(moved(f), t), layer)
        H = found[f"inner.{layer}"]
        assert relative_error(H.to_dense(), expected) <= 1e-10
