"""Factors from a stream: pieces, merging, decay, resuming, and batches that fail."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import layer_factors, relative_error
from networks import CASES, CE, classes, randn, routed_data, sample_loss, seeded
from torch import Tensor, nn

import hesskern as hk

FACTORS = ("input_covariance", "output_hessian")


def assert_same(a: hk.Factors, b: hk.Factors, bound: float = 0.0) -> None:
    assert list(a) == list(b)
    for layer in a:
        for factor in FACTORS:
            x, y = getattr(a[layer], factor), getattr(b[layer], factor)
            assert torch.equal(x, y) if bound == 0 else relative_error(x, y) <= bound
        assert a[layer].num_samples == pytest.approx(b[layer].num_samples, rel=1e-12)
        assert a[layer].positions == pytest.approx(b[layer].positions, rel=1e-12)
        if a[layer].input_images is not None:
            x, y = a[layer].input_mean, b[layer].input_mean
            assert torch.equal(x, y) if bound == 0 else relative_error(x, y) <= bound


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence", "twice", "dict", "linear"])
def test_pieces_make_the_whole(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    stream = hk.FactorAccumulator(model, CE, bias=bias)
    for x, y in data:
        stream.update(x, y)
    assert stream.num_samples == 7
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE, bias=bias))
    again = hk.FactorAccumulator(model, CE, bias=bias)
    again.consume(data)
    assert_same(again.factors(), stream.factors())


def test_the_split_into_batches_does_not_matter() -> None:
    case = CASES["conv stride"]
    model = case.model()
    x, y = case.inputs(7), classes(7, c=3)
    whole = hk.kronecker_factors(model, [(x, y)], CE)
    for size in (1, 2, 5):
        stream = hk.FactorAccumulator(model, CE)
        for i in range(0, 7, size):
            stream.update(x[i : i + size], y[i : i + size])
        assert_same(stream.factors(), whole, 1e-12)


def test_looking_in_between_changes_nothing() -> None:
    case = CASES["conv groups"]
    model, data = case.model(), case.data()
    stream = hk.FactorAccumulator(model, CE, bias="joint")
    stream.update(*data[0])
    first = stream.factors()
    before = {layer: first[layer].output_hessian.clone() for layer in first}
    assert_same(first, hk.kronecker_factors(model, data[:1], CE, bias="joint"))
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE, bias="joint"))
    for layer in first:
        assert torch.equal(first[layer].output_hessian, before[layer])
        # What was handed out is the caller's: changing it does not reach the accumulator.
        first[layer].output_hessian.zero_()
        first[layer].input_covariance.zero_()
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE, bias="joint"))


def test_nothing_seen_yet() -> None:
    stream = hk.FactorAccumulator(CASES["relu"].model(), CE)
    assert stream.num_samples == 0
    with pytest.raises(ValueError, match="no samples"):
        stream.factors()


# Merging


@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence"])
def test_merging_equals_one_pass(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    parts = [hk.FactorAccumulator(model, CE, bias="joint", seed=i) for i in range(2)]
    for part, (x, y) in zip(parts, data, strict=True):
        part.update(x, y)
    other = parts[1].factors()
    parts[0].merge(parts[1])
    assert_same(parts[0].factors(), hk.kronecker_factors(model, data, CE, bias="joint"), 1e-14)
    assert_same(parts[1].factors(), other)
    # Both go on by themselves.
    parts[1].update(*data[0])
    assert_same(parts[0].factors(), hk.kronecker_factors(model, data, CE, bias="joint"), 1e-14)
    empty = hk.FactorAccumulator(model, CE, bias="joint")
    empty.merge(parts[0])
    assert_same(empty.factors(), parts[0].factors())
    empty.update(*data[0])
    assert_same(parts[0].factors(), hk.kronecker_factors(model, data, CE, bias="joint"), 1e-14)


def test_merging_what_does_not_belong_together() -> None:
    model = CASES["relu"].model()
    stream = hk.FactorAccumulator(model, CE)
    with pytest.raises(TypeError, match="other must be a FactorAccumulator, got dict"):
        stream.merge({})  # type: ignore[arg-type]
    for other in (
        hk.FactorAccumulator(model, CE, bias="joint"),
        hk.FactorAccumulator(model, CE, output="mc"),
        hk.FactorAccumulator(model, CE, decay=0.5),
    ):
        with pytest.raises(ValueError, match="other was made with settings"):
            stream.merge(other)
    for layers in (["0"], ["0", "2"]):
        with pytest.raises(ValueError, match="other has other layers"):
            stream.merge(hk.FactorAccumulator(model, CE, layers=layers))


# Moving averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence"])
def test_decay_against_a_moving_average_by_hand(name: str, decay: float) -> None:
    case = CASES[name]
    model = case.model()
    data = [(case.inputs(n, seed), classes(n, c=3, seed=seed)) for seed, n in enumerate((3, 5, 2))]
    stream = hk.FactorAccumulator(model, CE, decay=decay, bias="joint")
    averages: dict[str, dict[str, Tensor]] = {}
    for step, (x, y) in enumerate(data, 1):
        stream.update(x, y)
        found = stream.factors()
        for layer in found:
            joint = model.get_submodule(layer).bias is not None
            batch = layer_factors(model, [(x, y)], sample_loss, layer, joint=joint)
            old = averages.setdefault(layer, {k: torch.zeros_like(v) for k, v in batch.items()})
            for key, value in batch.items():
                old[key] = decay * old[key] + (1 - decay) * value
            # Without the correction the first average would be (1 - decay) times too small.
            start_up = 1 - decay**step
            f = found[layer]
            assert relative_error(f.output_hessian, old["output_hessian"] / start_up) <= 1e-12
            assert relative_error(f.input_covariance, old["input_covariance"] / start_up) <= 1e-12
            mean = f.input_mean if f.input_mean.dim() == 2 else f.input_mean[:, None]
            assert relative_error(mean, old["input_mean"] / start_up) <= 1e-12
            assert f.positions == pytest.approx(mean.shape[1])


def test_decay_takes_weighted_batch_means_and_skips_batches_without_weight() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    weights = [randn(4, seed=1).abs(), randn(3, seed=2).abs()]
    stream = hk.FactorAccumulator(model, CE, decay=0.8)
    stream.update(*data[0], sample_weight=torch.zeros(4))
    with pytest.raises(ValueError, match="no samples"):
        stream.factors()
    stream.update(*data[0], sample_weight=weights[0])
    stream.update(*data[1], sample_weight=torch.zeros(3))
    stream.update(*data[1], sample_weight=10 * weights[1])
    for layer, f in stream.factors().items():
        first, second = (
            layer_factors(model, [batch], sample_loss, layer, weights=[w])
            for batch, w in zip(data, weights, strict=True)
        )
        for factor in FACTORS:
            expected = (0.8 * 0.2 * first[factor] + 0.2 * second[factor]) / (1 - 0.8**2)
            assert relative_error(getattr(f, factor), expected) <= 1e-12


# Stopping and going on


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_state_dict_round_trip_and_resume(output: str, decay: float | None) -> None:
    case = CASES["conv groups"]
    model = case.model()
    data = [(case.inputs(n, seed), classes(n, c=3, seed=seed)) for seed, n in enumerate((3, 4, 2))]

    def make() -> hk.FactorAccumulator:
        return hk.FactorAccumulator(
            model, CE, output=output, decay=decay, bias="joint", mc_samples=2, seed=4
        )

    whole, first = make(), make()
    for batch in data:
        whole.update(*batch)
    first.update(*data[0])
    first.update(*data[1])
    state = first.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed.factors(), first.factors())
    resumed.update(*data[2])
    assert_same(resumed.factors(), whole.factors())
    # The state is a copy, both ways.
    untouched = make()
    untouched.load_state_dict(state)
    first.update(*data[2])
    again = make()
    again.load_state_dict(state)
    again.update(*data[2])
    assert_same(again.factors(), whole.factors())
    untouched.update(*data[2])
    assert_same(untouched.factors(), whole.factors())


def test_states_that_do_not_belong_here_change_nothing() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    stream = hk.FactorAccumulator(model, CE)
    stream.update(*data[0])
    before = stream.factors()
    foreign = hk.FactorAccumulator(CASES["residual"].model(), CE)
    foreign.update(*CASES["residual"].data()[0])
    wider = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    wider = hk.FactorAccumulator(seeded(wider), CE)
    wider.update(*data[0])
    partial = stream.state_dict()
    del partial["count"]
    for state, message in (
        (foreign.state_dict(), "state has a layer '.*' that this accumulator lacks"),
        (
            wider.state_dict(),
            r"state has layer '0' with \(m, d\) = \(7, 4\), the model has \(6, 4\)",
        ),
        (hk.FactorAccumulator(model, CE, seed=9).state_dict(), "state was made with settings"),
        (hk.FactorAccumulator(model, CE, decay=0.5).state_dict(), "state was made with settings"),
        (partial, r"state must come from state_dict\(\); it lacks count"),
        ({}, r"state must come from state_dict\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(state)
        assert_same(stream.factors(), before)
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE))


# Layers that some batches do not reach


class Routed(nn.Module):
    """One of two experts per batch, by the sign of the first entry; ``unused`` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.positive = nn.Linear(4, 3)
        self.negative = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        return self.positive(h) if x[0, 0] > 0 else self.negative(h)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.filterwarnings("ignore:left out")
def test_layers_reached_in_some_batches_count_with_zeros_elsewhere(order: tuple[int, ...]) -> None:
    model = seeded(Routed())
    data = [routed_data()[i] for i in order]
    stream = hk.FactorAccumulator(model, CE)
    for x, y in data:
        stream.update(x, y)
    whole = hk.kronecker_factors(model, data, CE)
    assert_same(stream.factors(), whole)
    assert list(whole) == ["stem", "positive", "negative"]
    assert whole.skipped == {"unused": "was never reached in the forward pass"}
    for layer, sign in (("positive", 1), ("negative", -1)):
        rows = torch.cat([F.relu(model.stem(x)) for x, _ in data if sign * x[0, 0] > 0]).detach()
        f = whole[layer]
        assert relative_error(f.input_covariance, rows.T @ rows / 9) <= 1e-12
        assert f.positions == pytest.approx(len(rows) / 9)
    merged = hk.FactorAccumulator(model, CE)
    for x, y in data:
        part = hk.FactorAccumulator(model, CE)
        part.update(x, y)
        merged.merge(part)
    assert_same(merged.factors(), whole, 1e-14)
    assert merged.factors().skipped == whole.skipped


def test_a_layer_asked_for_by_name_may_come_late_but_must_come() -> None:
    model, data = seeded(Routed()), routed_data()
    assert list(hk.kronecker_factors(model, data, CE, layers=["positive"])) == ["positive"]
    stream = hk.FactorAccumulator(model, CE, layers=["positive"])
    stream.update(*data[0])
    with pytest.raises(ValueError, match="layers: 'positive' was never reached"):
        stream.factors()
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data[:2], CE, layers=["positive"]))
    with pytest.raises(ValueError, match="layers: 'unused' was never reached"):
        hk.kronecker_factors(model, data, CE, layers=["stem", "unused"])


def test_a_model_that_reaches_no_layer() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    with pytest.raises(ValueError, match="no layer of the model has factors: 'fc' was never"):
        hk.kronecker_factors(Bypass(), [(torch.ones(2, 3), torch.zeros(2, 3))], nn.MSELoss())
    with pytest.raises(ValueError, match="no layer of the model has a Hessian: 'fc' was never"):
        hk.layer_hessians(Bypass(), [(torch.ones(2, 3), torch.zeros(2, 3))], nn.MSELoss())


def test_a_layer_beside_the_output_has_a_zero_output_hessian() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.side = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.side(x)
            return self.fc(x)

    data = [(randn(3, 4), classes(3, c=3))]
    f = hk.kronecker_factors(seeded(Side()), data, CE)["side"]
    assert torch.equal(f.output_hessian, torch.zeros(2, 2).double())
    assert relative_error(f.input_covariance, data[0][0].T @ data[0][0] / 3) <= 1e-14


def test_frozen_layers_count() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    expected = hk.kronecker_factors(model, data, CE)
    model[0].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    assert_same(hk.kronecker_factors(model, data, CE), expected)
    model.requires_grad_(False)
    assert_same(hk.kronecker_factors(model, data, CE), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_gradient_mode_does_not_matter(context: Any) -> None:
    case = CASES["conv stride"]
    model, data = case.model(), case.data()
    expected = hk.kronecker_factors(model, data, CE, bias="joint")
    stream = hk.FactorAccumulator(model, CE, bias="joint")
    with context():
        stream.update(*data[0])
        stream.update(*(t.clone() for t in data[1]))
        found = stream.factors()
    assert_same(found, expected)
    stream.update(*data[0])
    assert torch.is_grad_enabled()


# Batches that fail


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


# Layers whose inputs do not count the samples


class Positional(nn.Module):
    """``b(relu(a(x)) + p(table))``: p sees the 4 rows of a table, whatever the batch.

    With ``switching``, p sees the samples of batches of 4.
    """

    switching = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.b = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 3)
        self.register_buffer("table", torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.switching and len(x) == 4:
            return self.b(torch.relu(self.a(x)) + self.p(x[:, :2]))
        return self.b(torch.relu(self.a(x)) + self.p(self.table).mean(0))


def positional(*sizes: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    data = [(randn(n, 3, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate(sizes)]
    return seeded(Positional()), data


# A batch of 4 looks as if it was counted by p's table; what is skipped stays so.
@pytest.mark.parametrize("sizes", [(6, 5), (6, 4), (6, 4, 5)])
def test_layers_that_do_not_count_samples_are_skipped(sizes: tuple[int, ...]) -> None:
    model, data = positional(*sizes)
    with pytest.warns(UserWarning, match="left out: 'p' sees inputs"):
        found = hk.kronecker_factors(model, data, CE)
    with pytest.warns(UserWarning, match="left out: 'p' sees inputs"):
        hessians = hk.layer_hessians(model, data, CE)
    assert list(found) == list(hessians) == ["a", "b"]
    assert "sees inputs [4, 2] while the model returns 6 samples" in found.skipped["p"]
    assert hessians.skipped == found.skipped
    expected = hk.kronecker_factors(model, data, CE, layers=["a", "b"])
    assert_same(found, hk.Factors(dict(expected), expected.num_samples, {}, {}))
    for function in (hk.kronecker_factors, hk.layer_hessians):
        with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
            function(model, data, CE, layers=["a", "p"])


@pytest.mark.parametrize("first", [4, 1])
def test_as_many_rows_as_samples_are_not_taken_for_samples(first: int) -> None:
    model, data = positional(first, 4)
    with pytest.warns(UserWarning, match="left out: 'p' sees rows that are no samples"):
        found = hk.layer_hessians(model, data[first == 1 :], CE)
    assert list(found) == ["a", "b"]
    for layer in ("a", "b"):
        expected = hk.layer_hessians(model, data[first == 1 :], CE, layers=[layer])[layer]
        assert relative_error(found[layer].to_dense(), expected.to_dense()) <= 1e-13


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("budget", [0, 2**30])
def test_hessians_beside_a_skipped_layer(budget: int) -> None:
    model, data = positional(6, 5)
    found = hk.layer_hessians(model, data, CE, memory_budget=budget)
    expected = hk.layer_hessians(model, data, CE, layers=["a", "b"])
    for name, H in expected.items():
        assert relative_error(found[name].to_dense(), H.to_dense()) <= 1e-13


@pytest.mark.filterwarnings("ignore:left out")
def test_skipped_layers_stay_skipped_in_a_stream() -> None:
    model, data = positional(6, 4)
    acc = hk.FactorAccumulator(model, CE)
    acc.update(*data[0])
    resumed = hk.FactorAccumulator(model, CE)
    resumed.load_state_dict(acc.state_dict())
    merged = hk.FactorAccumulator(model, CE)
    merged.merge(acc)
    for stream in (acc, resumed, merged):
        stream.update(*data[1])
        assert list(stream.factors()) == ["a", "b"]
        assert "[4, 2]" in stream.factors().skipped["p"]
        assert stream.num_samples == 10


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("way", ["update", "consume"])
def test_a_layer_that_has_sums_is_not_skipped(way: str) -> None:
    """It would be lost: the batch is refused, and everything before it stays."""
    model, data = positional(4, 6)
    model.switching = True
    acc = hk.FactorAccumulator(model, CE)
    acc.update(*data[0])
    before = acc.factors()
    assert list(before) == ["a", "p", "b"]
    with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
        acc.update(*data[1]) if way == "update" else acc.consume(data[1:])
    assert_same(acc.factors(), before)
    other = hk.FactorAccumulator(model, CE)
    other.update(*data[1])
    for one, another in ((acc, other), (other, acc)):
        state = one.factors()
        with pytest.raises(ValueError, match="other does not fit: layer 'p' sees inputs"):
            one.merge(another)
        assert_same(one.factors(), state)
    with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
        hk.kronecker_factors(model, data, CE)
    with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
        hk.layer_hessians(model, data, CE)


@pytest.mark.filterwarnings("ignore:left out")
def test_a_batch_that_fits_no_layer_is_refused() -> None:
    model, data = positional(5)
    acc = hk.FactorAccumulator(model, CE)
    with pytest.raises(ValueError, match=r"layer 'a' sees inputs \[1, 3\]"):
        acc.update(data[0][0][0], data[0][1][0])
    acc.update(*data[0])
    assert list(acc.factors()) == ["a", "b"]


# Weights that do not fit the data


@pytest.mark.parametrize("length", [0, 1, 10, 12, 40])
@pytest.mark.parametrize("kind", ["list", "loader", "generator"])
def test_weights_of_another_length_add_nothing(kind: str, length: int) -> None:
    model, data = seeded(nn.Linear(3, 3)), [(randn(n, 3), classes(n, c=3)) for n in (4, 5, 2)]
    make = {
        "list": lambda: data,
        "loader": lambda: torch.utils.data.DataLoader(data, batch_size=None),
        "generator": lambda: iter(data),
    }[kind]
    acc = hk.FactorAccumulator(model, CE, output="mc")
    acc.update(*data[0])
    before, state = acc.factors(), acc.state_dict()
    with pytest.raises(ValueError, match=f"sample_weight has {length} entries but the data has"):
        acc.consume(make(), sample_weight=torch.ones(length))
    assert_same(acc.factors(), before)
    assert acc.state_dict()["batches"] == 1
    assert torch.equal(acc.state_dict()["generator"], state["generator"])
    acc.consume(make(), sample_weight=torch.full((11,), 2.0))
    assert acc.num_samples == 4 + 22


def test_weights_of_another_length_are_found_before_the_first_batch() -> None:
    calls: list[int] = []
    model = seeded(nn.Linear(3, 3))
    model.register_forward_hook(lambda *_: calls.append(1))
    data = [((randn(4, 3),), classes(4, c=3)), ({"input": randn(5, 3)}, classes(5, c=3))]
    for function in (hk.kronecker_factors, hk.layer_hessians):
        with pytest.raises(ValueError, match="sample_weight has 8 entries but the data has 9"):
            function(model, data, CE, sample_weight=torch.ones(8))
    assert calls == []
    hk.kronecker_factors(model, data, CE, sample_weight=torch.ones(9))
    assert len(calls) == 2


def test_consume_keeps_the_batches_before_a_bad_one_unless_weights_are_given() -> None:
    model, good, bad = seeded(nn.Linear(3, 3)), randn(4, 3), torch.full((4, 3), torch.nan).double()
    data = [(good, classes(4, c=3)), (bad, classes(4, c=3))]
    for weight, count in ((None, 4), (torch.ones(8), 0)):
        acc = hk.FactorAccumulator(model, CE)
        with pytest.raises(ValueError, match="NaN or Inf in batch 1"):
            acc.consume(data, sample_weight=weight)
        assert acc.num_samples == count
