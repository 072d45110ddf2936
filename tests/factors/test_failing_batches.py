"""Batches that fail leave no trace in the sums, in the model or in anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import CE, classes, randn, seeded
from same_factors import assert_same
from torch import Tensor, nn

import hesskern as hk


class Fragile(nn.Module):
    """Does on demand what can go wrong inside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(5, 4)
        self.c = nn.Linear(4, 3)
        self.fault: Callable[[Tensor], Tensor] = lambda h: h
        self.wrap: Callable[[Tensor], Any] = lambda outputs: outputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.drop(F.relu(self.norm(self.a(x)))))
        return self.wrap(self.c(self.fault(h)))


def raises(error: type[BaseException]) -> Callable[[Tensor], Tensor]:
    def fault(h: Tensor) -> Tensor:
        raise error("on demand")

    return fault


class _FailsBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyboardInterrupt("on demand")


def root_of_zero(h: Tensor) -> Tensor:
    """Finite, but its derivative at zero is infinite."""
    return (h * 0).abs().sqrt() + h


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a pass must leave as it was."""
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "tensors": [t.clone() for t in (*model.parameters(), *model.buffers())],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "ids": [id(p) for p in model.parameters()],
        "mode": torch.is_grad_enabled(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for key in ("modes", "flags", "hooks", "ids", "mode"):
        assert after[key] == before[key], key
    for a, b in zip(after["tensors"], before["tensors"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(after["gradients"], before["gradients"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def fragile() -> Fragile:
    """In an unusual state: half of it training, half frozen, gradients and a user's hook."""
    model = seeded(Fragile())
    model.train()
    model.norm.eval()
    model.b.weight.requires_grad_(False)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    model.b.register_forward_hook(lambda *_: None)
    model.c.register_forward_pre_hook(lambda *_: None)
    return model


def fragile_data() -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, 4, seed=n), classes(n, c=3, seed=n)) for n in (4, 3, 5)]


def _bad(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 2] = value
    return x


FAULTS: dict[str, tuple[Callable[[Fragile, Tensor, Tensor], Any], type[BaseException], str]] = {
    "NaN input": (
        lambda m, x, y: (_bad(x, torch.nan), y),
        ValueError,
        "inputs of layer 'a' contain NaN or Inf in batch 2",
    ),
    "infinite input": (
        lambda m, x, y: (_bad(x, -torch.inf), y),
        ValueError,
        "inputs of layer 'a' contain NaN or Inf in batch 2",
    ),
    "input with an infinite square": (
        lambda m, x, y: (_bad(x, 1e200), y),
        ValueError,
        "squared inputs of layer 'a' contain NaN or Inf in batch 2",
    ),
    "NaN inside": (
        lambda m, x, y: (setattr(m, "fault", lambda h: h / 0 * 0), (x, y))[1],
        ValueError,
        "inputs of layer 'c' contain NaN or Inf in batch 2",
    ),
    "infinite derivative": (
        lambda m, x, y: (setattr(m, "fault", root_of_zero), (x, y))[1],
        ValueError,
        "output gradients of layer '[ab]' contain NaN or Inf in batch 2",
    ),
    "target out of range": (
        lambda m, x, y: (x, y + 3),
        ValueError,
        r"targets must lie in \[0, 3\)",
    ),
    "too few targets": (
        lambda m, x, y: (x, y[1:]),
        ValueError,
        r"targets must be \[5\], got \[4\]",
    ),
    "shape": (lambda m, x, y: (x[:, :3], y), RuntimeError, "shape"),
    "error in the model": (
        lambda m, x, y: (setattr(m, "fault", raises(ZeroDivisionError)), (x, y))[1],
        ZeroDivisionError,
        "on demand",
    ),
    "interrupt in the model": (
        lambda m, x, y: (setattr(m, "fault", raises(KeyboardInterrupt)), (x, y))[1],
        KeyboardInterrupt,
        "on demand",
    ),
    "interrupt in the backward pass": (
        lambda m, x, y: (setattr(m, "fault", _FailsBackwards.apply), (x, y))[1],
        KeyboardInterrupt,
        "on demand",
    ),
    "tuple of outputs": (
        lambda m, x, y: (setattr(m, "wrap", lambda out: (out, x)), (x, y))[1],
        TypeError,
        "model must return a tensor .*, got tuple",
    ),
    "samples lost": (
        lambda m, x, y: (setattr(m, "fault", lambda h: h[1:]), (x, y[1:]))[1],
        ValueError,
        "layer 'a' sees inputs .* while the model returns 4 samples",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("output", ["exact", "empirical"])
def test_a_batch_that_fails_leaves_no_trace(name: str, output: str) -> None:
    spoil, error, message = FAULTS[name]
    model, data = fragile(), fragile_data()
    stream = hk.FactorAccumulator(model, CE, output=output, bias="joint")
    stream.update(*data[0])
    stream.update(*data[1])
    before = stream.factors()
    x, y = spoil(model, *data[2])
    state = snapshot(model)
    with pytest.raises(error, match=message):
        stream.update(x, y)
    assert_untouched(model, state)
    assert_same(stream.factors(), before)
    assert stream.num_samples == 7
    with pytest.raises(error, match=message):
        stream.consume([(x, y)])
    assert_untouched(model, state)
    assert_same(stream.factors(), before)
    # It can go on.
    model.fault = lambda h: h
    model.wrap = lambda outputs: outputs
    stream.update(*data[2])
    assert_same(
        stream.factors(), hk.kronecker_factors(model, data, CE, output=output, bias="joint")
    )


@pytest.mark.parametrize("layer", ["a", "b", "c"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(layer: str, value: float) -> None:
    model, data = fragile(), fragile_data()
    stream = hk.FactorAccumulator(model, CE)
    stream.update(*data[0])
    before = stream.factors()
    weight = model.get_submodule(layer).weight
    good = weight.detach().clone()
    weight.data[0, 0] = value
    following = {"a": "inputs of layer 'b'", "b": "inputs of layer 'c'", "c": "the model's outputs"}
    with pytest.raises(ValueError, match=f"{following[layer]} contain NaN or Inf in batch 1"):
        stream.update(*data[1])
    assert_same(stream.factors(), before)
    weight.data.copy_(good)
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data[:2], CE))


def test_float32_overflow_in_squares() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Flatten())).float()
    x = randn(3, 2, 2, 2, dtype=torch.float32)
    stream = hk.FactorAccumulator(model, nn.MSELoss())
    stream.update(x, torch.zeros(3, 2))
    before = stream.factors()
    with pytest.raises(ValueError, match="squared inputs of layer '0' contain NaN or Inf"):
        stream.update(1e25 * x, torch.zeros(3, 2))
    assert_same(stream.factors(), before)


Call = Callable[[nn.Module, Any], Any]
CALLS: dict[str, Call] = {
    "factors": lambda m, data: hk.kronecker_factors(m, data, CE, bias="joint"),
    "sampled factors": lambda m, data: hk.kronecker_factors(m, data, CE, output="mc"),
    "ekfac": lambda m, data: hk.ekfac(m, data, CE, output="exact", bias="joint"),
    "corrections": lambda m, data: hk.ekfac(
        m, data, CE, output="exact", factors=hk.kronecker_factors(m, fragile_data()[:1], CE)
    ),
    "hessians": lambda m, data: hk.layer_hessians(m, data, CE),
    "pruned hessians": lambda m, data: hk.layer_hessians(m, data, CE, tolerance=0.1),
    "autograd": lambda m, data: (
        hk.AutogradHessian(m, data, CE, params=["b.weight", "a.bias"]) @ torch.ones(25).double()
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_model_comes_back_as_it_was(call: str) -> None:
    model = fragile()
    before = snapshot(model)
    CALLS[call](model, fragile_data())
    assert_untouched(model, before)


# Double backward takes what it is given and looks at no layer's inputs; only the input covariance
# squares them.
UNSEEN = {
    "autograd": {
        "NaN input",
        "infinite input",
        "input with an infinite square",
        "NaN inside",
        "infinite derivative",
        "samples lost",
    },
    "hessians": {"input with an infinite square"},
    "pruned hessians": {"input with an infinite square"},
}


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call in CALLS for name in FAULTS if name not in UNSEEN.get(call, ())],
)
def test_the_model_comes_back_as_it_was_after_an_error(call: str, name: str) -> None:
    spoil, error, _ = FAULTS[name]
    model, data = fragile(), fragile_data()
    data[2] = spoil(model, *data[2])
    before = snapshot(model)
    with pytest.raises(error):
        CALLS[call](model, data)
    assert_untouched(model, before)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_data_that_fail_midway(call: str, error: type[BaseException]) -> None:
    class Breaks:
        def __iter__(self) -> Iterator[Any]:
            yield fragile_data()[0]
            raise error("disk gone")

    model = fragile()
    before = snapshot(model)
    with pytest.raises(error, match="disk gone"):
        CALLS[call](model, Breaks())
    assert_untouched(model, before)


def test_data_that_fail_midway_keep_whole_batches() -> None:
    def broken() -> Iterator[Any]:
        yield from fragile_data()[:2]
        raise KeyboardInterrupt

    model = fragile()
    stream = hk.FactorAccumulator(model, CE)
    with pytest.raises(KeyboardInterrupt):
        stream.consume(broken())
    assert_same(stream.factors(), hk.kronecker_factors(model, fragile_data()[:2], CE))
    stream.consume(fragile_data()[2:])
    assert_same(stream.factors(), hk.kronecker_factors(model, fragile_data(), CE))


def test_a_progress_callback_that_fails() -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model = fragile()
    before = snapshot(model)
    for call in (hk.kronecker_factors, hk.layer_hessians):
        with pytest.raises(KeyboardInterrupt):
            call(model, fragile_data(), CE, progress=stop)
        assert_untouched(model, before)


def test_sampling_goes_on_as_if_the_failed_batch_had_not_been() -> None:
    model, data = fragile(), fragile_data()
    stream = hk.FactorAccumulator(model, CE, output="mc", seed=3)
    stream.update(*data[0])
    model.fault = root_of_zero
    with pytest.raises(ValueError, match="contain NaN or Inf"):
        stream.update(*data[1])
    model.fault = lambda h: h
    stream.update(*data[1])
    expected = hk.kronecker_factors(model, data[:2], CE, output="mc", seed=3)
    assert_same(stream.factors(), expected)


def test_a_graph_that_the_caller_holds_survives() -> None:
    # Factors are taken in the middle of a training step.
    model, data = seeded(Fragile()).train(), fragile_data()
    model.drop.p = 0.0
    model.norm.eval()
    expected = torch.autograd.grad(CE(model(data[0][0]), data[0][1]), list(model.parameters()))
    loss = CE(model(data[0][0]), data[0][1])
    stream = hk.FactorAccumulator(model, CE)
    stream.update(*data[0])
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
