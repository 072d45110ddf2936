"""Pickling, deep copies and torch.save: equal to the last bit, and still on the watch."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from certificates import FAST, NET, blobs
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.operators.samples import SampleRows
from hesskern.pacbayes import Protocol, certify
from hesskern.passes.losses import resolve_loss

LOSS = nn.CrossEntropyLoss()


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def pickled_early(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value, protocol=2))


def through_torch(value: Any) -> Any:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS = (pickled, pickled_early, copy.deepcopy, through_torch)
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)))


def images() -> nn.Module:
    return seeded(
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    )


def batches(*shape: int, c: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, *shape, seed=n), classes(n, c=c)) for n in (6, 9, 5)]


def same(one: Any, other: Any) -> bool:
    """Equal in type and to the last bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, nn.Module):
        return same(dict(one.state_dict()), dict(other.state_dict()))
    return one == other


def assert_same_operator(A: Any, B: Any) -> None:
    assert type(A) is type(B)
    assert (A.shape, A.dtype, A.device) == (B.shape, B.dtype, B.device)
    v, V = randn(A.shape[0], seed=1).to(A.dtype), randn(A.shape[0], 3, seed=2).to(A.dtype)
    assert torch.equal(A @ v, B @ v)
    assert torch.equal(A @ V, B @ V)
    assert A.trace() == B.trace()
    assert torch.equal(A.diagonal(), B.diagonal())


def layer(budget: int | None, tolerance: float = 0.0, model: nn.Module | None = None) -> Any:
    return hk.layer_hessians(
        model or network(), batches(5), LOSS, tolerance=tolerance, memory_budget=budget
    )["0"]


def conv(budget: int | None) -> Any:
    found = hk.layer_hessians(images(), batches(2, 6, 6, c=3), LOSS, memory_budget=budget)
    return found["0"]


def factor(name: str = "0") -> Any:
    return hk.kronecker_factors(images(), batches(2, 6, 6, c=3), LOSS)[name]


def full(budget: int | None) -> Any:
    return hk.GaussNewton(network(), batches(5), LOSS, memory_budget=budget)


def position_mean(budget: int | None) -> Any:
    model = seeded(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    data = batches(2, 6, 6, c=3)
    return hk.position_mean_hessian(model, data, LOSS, "0", memory_budget=budget)


OPERATORS = {
    "stored": lambda: layer(None),
    "recomputed": lambda: layer(0),
    "pruned": lambda: layer(None, 0.05),
    "pruned, recomputed": lambda: layer(0, 0.05),
    "grouped convolution": lambda: conv(None),
    "grouped convolution, recomputed": lambda: conv(0),
    "Kronecker": lambda: factor("3").operator(),
    "Kronecker with groups": lambda: factor().operator(),
    "corrected": lambda: hk.eigenvalue_corrected(conv(None), factor().operator()),
    "nearest": lambda: hk.nearest_kronecker(layer(None)),
    "Gauss-Newton": lambda: full(None),
    "Gauss-Newton, recomputed": lambda: full(0),
    "stacked": lambda: full(None).stacked(),
    "position mean": lambda: position_mean(None),
    "position mean, recomputed": lambda: position_mean(0),
    "autograd": lambda: hk.AutogradHessian(network(), batches(5), LOSS, ["0.weight"]),
}


@ways
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_are_equal_to_the_last_bit(kind: str, way: Any) -> None:
    A = OPERATORS[kind]()
    B = way(A)
    assert_same_operator(A, B)
    assert_same_operator(A, way(B))
    plain = {k: v for k, v in vars(A).items() if isinstance(v, (str, int, float, bool, tuple))}
    assert {k: vars(B)[k] for k in plain} == plain


@pytest.mark.parametrize("budget", [None, 0])
def test_a_copied_gauss_newton_matrix_can_be_stacked(budget: int | None) -> None:
    G = full(budget)
    assert_same_operator(G.stacked(), pickled(G).stacked())


@ways
def test_part_of_a_tensor_does_not_take_the_whole_with_it(way: Any) -> None:
    x, s = randn(4000, 5), randn(4000, 2, 4)
    part = SampleRows(x[40:80], s[40:80])
    copied = way(part)
    assert torch.equal(copied.x, part.x)
    assert torch.equal(copied.s, part.s)
    assert copied.x.untyped_storage().nbytes() == part.x.nbytes
    assert copied.s.untyped_storage().nbytes() == part.s.nbytes


def test_factors_are_pickled_once() -> None:
    K = factor().operator()
    assert len(pickle.dumps(K)) < 2 * (K.A.nbytes + K.B.nbytes) + 4096


RERUN = (
    "recomputed",
    "pruned, recomputed",
    "Gauss-Newton, recomputed",
    "position mean, recomputed",
)


def model_of(A: Any) -> nn.Module:
    return A._chunks.model


@ways
@pytest.mark.parametrize("kind", RERUN)
def test_a_copy_notices_that_its_model_changed(kind: str, way: Any) -> None:
    A = OPERATORS[kind]()
    B = way(A)
    v = randn(A.shape[0]).to(A.dtype)
    expected = A @ v
    weight = model_of(B)[0].weight
    assert weight is not model_of(A)[0].weight
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="the model changed since"):
        B @ v
    # That it is unlike the original's is no news to a copy of it.
    with pytest.raises(RuntimeError, match="the model changed since"):
        way(B) @ v
    assert torch.equal(A @ v, expected)


@ways
@pytest.mark.parametrize("kind", RERUN)
def test_a_copy_of_what_had_changed_before_is_refused_as_well(kind: str, way: Any) -> None:
    A = OPERATORS[kind]()
    model_of(A)[0].weight.data = model_of(A)[0].weight.data.clone()
    with pytest.raises(RuntimeError, match="the model changed since"):
        way(A) @ randn(A.shape[0]).to(A.dtype)


def test_stored_samples_need_no_model() -> None:
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: None)
    gone = weakref.ref(model)
    operators = [layer(None, model=model), hk.GaussNewton(model, batches(5), LOSS)]
    for A in operators:
        assert_same_operator(A, pickled(A))
    del model
    assert gone() is None


class Locked(list):
    """Data that can be neither pickled nor copied."""

    def __init__(self, items: Any) -> None:
        super().__init__(items)
        self.lock = threading.Lock()


class LocalRoot:
    """A loss that holds what cannot be pickled."""

    def __init__(self) -> None:
        self.root = lambda outputs: outputs

    def output_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.eye(outputs.shape[1], dtype=outputs.dtype).expand(len(outputs), -1, -1)


KINDS = ("LayerHessian", "GaussNewton", "AutogradHessian", "accumulator")
# An accumulator keeps no data.
HELD = [(k, p) for k in KINDS for p in ("model", "data", "loss") if (k, p) != (KINDS[-1], "data")]


@pytest.mark.parametrize(("kind", "part"), HELD)
def test_what_cannot_be_pickled_is_named(kind: str, part: str) -> None:
    model, data, loss = network(), batches(5), LOSS
    if part == "model":
        model.register_forward_pre_hook(lambda module, inputs: None)
    elif part == "data":
        data = Locked(data)
    else:
        loss = LocalRoot()
    make = {
        "LayerHessian": lambda: hk.layer_hessians(model, data, loss, memory_budget=0)["0"],
        "GaussNewton": lambda: hk.GaussNewton(model, data, loss, memory_budget=0),
        "AutogradHessian": lambda: hk.AutogradHessian(model, data, resolve_loss(loss)),
        "accumulator": lambda: hk.FactorAccumulator(model, loss),
    }[kind]
    held = make()
    with pytest.raises(
        pickle.PicklingError, match=rf"cannot be pickled: its {part}, a \w+, cannot"
    ):
        pickle.dumps(held)
    with pytest.raises(pickle.PicklingError, match=rf"its {part}, a "):
        through_torch(held)
    if part == "data":
        with pytest.raises(TypeError, match=r"cannot be copied: its data, a Locked, cannot .*lock"):
            copy.deepcopy(held)
    else:
        # Functions need no copy.
        copied = copy.deepcopy(held)
        assert type(copied) is type(held)


def test_a_shallow_copy_asks_for_nothing() -> None:
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: None)
    A = hk.AutogradHessian(model, batches(5), LOSS, ["0.weight"])
    assert_same_operator(A, copy.copy(A))
    assert copy.copy(A)._model is model


def test_progress_stays_with_the_original() -> None:
    said = []
    A = hk.AutogradHessian(
        network(), batches(5), LOSS, ["0.weight"], progress=lambda *words: said.append(words)
    )
    B = pickled(A)
    B @ randn(A.shape[0])
    assert said == []
    A @ randn(A.shape[0])
    assert said
    bar = hk.AutogradHessian(network(), batches(5), LOSS, progress=True)
    assert pickled(bar).shape == (74, 74)


@ways
def test_an_accumulator_goes_on(way: Any) -> None:
    first, *rest = batches(5)
    one = hk.FactorAccumulator(network(), LOSS, output="mc", bias="joint", seed=3)
    one.update(*first)
    other = way(one)
    for acc in (one, other):
        acc.consume(rest)
    mine, theirs = one.factors(), other.factors()
    assert list(mine) == list(theirs)
    for name, f in mine.items():
        assert same(f, theirs[name])


@ways
def test_factors_are_equal(way: Any) -> None:
    found = hk.kronecker_factors(images(), batches(2, 6, 6, c=3), LOSS)
    _ = found["0"].input_mean
    copied = way(found)
    assert (copied.num_samples, copied.skipped) == (found.num_samples, found.skipped)
    assert copied.settings == found.settings
    for name, f in found.items():
        assert same(f, copied[name])
        assert torch.equal(f.input_mean, copied[name].input_mean)
    with pytest.raises(KeyError, match="no factors for layer 'x'"):
        copied["x"]


def results() -> dict[str, Any]:
    H, K = layer(None), hk.kronecker_factors(network(), batches(5), LOSS)["0"]
    pairs = hk.eigsh(H, 5)
    return {
        "EigenResult": pairs,
        "Correspondence": hk.eigenvector_correspondence(pairs.vectors, K),
        "DecouplingError": hk.decoupling_error(H, K.operator()),
        "InputAutocorrelation": hk.input_autocorrelation(K),
        "OverlapPrediction": hk.predict_overlap(K, K),
        "SpectralDensity": hk.spectral_density(H),
        "TraceEstimate": hk.hutchpp_trace(H, 6),
        "GradientClusters": hk.gradient_clusters(network(), batches(5), "0"),
        "spec": K.spec,
    }


@ways
def test_results_are_equal(way: Any) -> None:
    for name, result in results().items():
        assert same(result, way(result)), name


@ways
@pytest.mark.parametrize("loss", [LOSS, nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")])
def test_losses_are_equal(loss: nn.Module, way: Any) -> None:
    resolved = resolve_loss(loss)
    assert way(resolved) == resolved


@ways
def test_certificates_are_equal_and_hold(way: Any) -> None:
    model, data = NET.build((1, 3, 4), 3), blobs()
    found = certify(model, model, data, epochs=1, protocol=Protocol(passes=2), settings=FAST)
    copied = way(found)
    assert same(found, copied)
    assert copied.model is not found.model
    copied.verify(data)
    assert copied.digest == found.digest
    copied.model.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(pickle.PicklingError, match=r"its model, a Sequential, cannot"):
        pickle.dumps(copied)
    assert same(replace(copied, model=None), pickled(replace(copied, model=None)))
