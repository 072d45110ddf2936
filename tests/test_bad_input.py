"""One clear error for bad input: it names the argument, what is expected and what came."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import CE, classes, randn, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesskern as hk


class Net(nn.Module):
    """Linear layers ``block.0`` and ``fc``; ``change`` is applied to what it returns."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda outputs: outputs) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.fc = nn.Linear(5, 3)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.fc(self.block(x)))


def net(change: Callable[[Tensor], Any] = lambda outputs: outputs) -> nn.Module:
    return seeded(Net(change))


def data() -> list[tuple[Tensor, Tensor]]:
    return [(randn(4, 4), classes(4, c=3)), (randn(2, 4, seed=1), classes(2, c=3, seed=1))]


def call(function: str, **change: Any) -> Any:
    arguments: dict[str, Any] = {"model": net(), "data": data(), "loss": CE, **change}
    if function == "accumulator":
        source = arguments.pop("data")
        weight = arguments.pop("sample_weight", None)
        stream = hk.FactorAccumulator(**arguments)
        stream.consume(source, sample_weight=weight)
        return stream.factors()
    return getattr(hk, function)(**arguments)


BOTH = ("kronecker_factors", "layer_hessians", "accumulator")
FACTORS = ("kronecker_factors", "accumulator")
Case = tuple[tuple[str, ...], dict[str, Any], type[Exception], str]

ARGUMENTS: dict[str, Case] = {
    "model: function": (
        BOTH,
        {"model": F.relu},
        TypeError,
        r"model must be a torch\.nn\.Module, got function",
    ),
    "model: without layers": (
        BOTH,
        {"model": nn.Sequential(nn.ReLU(), nn.LayerNorm(4))},
        ValueError,
        r"model has no supported layer \(Linear, Conv1d, Conv2d\)",
    ),
    "model: lazy": (
        BOTH,
        {"model": nn.Sequential(nn.LazyLinear(3)), "layers": ["0"]},
        NotImplementedError,
        "'0' is lazy and not initialized",
    ),
    "model: meta device": (
        BOTH,
        {"model": Net().to("meta")},
        ValueError,
        "model must hold values, but it has tensors on the meta device",
    ),
    "model: couples samples": (
        BOTH,
        {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))},
        ValueError,
        "model must not couple the samples of a batch, but '1' is a batch norm without running",
    ),
    "layers: unknown": (
        BOTH,
        {"layers": ["fc", "fc2"]},
        ValueError,
        "layers: the model has no module named 'fc2'; its supported layers are block.0, fc",
    ),
    "layers: unsupported": (
        BOTH,
        {"layers": ["block"]},
        NotImplementedError,
        "layers: 'block' is a Sequential; supported are Linear, Conv1d and Conv2d",
    ),
    "layers: empty": (BOTH, {"layers": []}, ValueError, "layers is empty; name at least one"),
    "layers: number": (BOTH, {"layers": 3}, TypeError, "layers must be names .* got int"),
    "bias": (BOTH, {"bias": "yes"}, ValueError, "bias must be 'none' or 'joint', got 'yes'"),
    "output": (
        FACTORS,
        {"output": "fisher"},
        ValueError,
        "output must be 'exact', 'mc' or 'empirical', got 'fisher'",
    ),
    "mc_samples: zero": (FACTORS, {"mc_samples": 0}, ValueError, "mc_samples must be .* got 0"),
    "mc_samples: float": (FACTORS, {"mc_samples": 2.0}, ValueError, r"mc_samples .* got 2\.0"),
    "mc_samples: bool": (FACTORS, {"mc_samples": True}, ValueError, "mc_samples .* got True"),
    "seed": (FACTORS, {"seed": "a"}, ValueError, "seed must be an integer, got 'a'"),
    "decay: one": (("accumulator",), {"decay": 1.0}, ValueError, r"decay must .*\[0, 1\), got 1"),
    "decay: negative": (("accumulator",), {"decay": -0.1}, ValueError, r"decay must .* got -0\.1"),
    "decay: NaN": (("accumulator",), {"decay": float("nan")}, ValueError, "decay must .* got nan"),
    "decay: text": (("accumulator",), {"decay": "slow"}, TypeError, "decay must be .* got str"),
    "tolerance: one": (
        ("layer_hessians",),
        {"tolerance": 1},
        ValueError,
        r"tolerance must lie in \[0, 1\), got 1",
    ),
    "tolerance: negative": (
        ("layer_hessians",),
        {"tolerance": -1e-3},
        ValueError,
        r"tolerance must lie in \[0, 1\), got -0\.001",
    ),
    "tolerance: NaN": (
        ("layer_hessians",),
        {"tolerance": float("nan")},
        ValueError,
        r"tolerance must lie in \[0, 1\), got nan",
    ),
    "tolerance: None": (
        ("layer_hessians",),
        {"tolerance": None},
        TypeError,
        r"tolerance must be a number in \[0, 1\), got NoneType",
    ),
    "memory_budget: negative": (
        BOTH,
        {"memory_budget": -1},
        ValueError,
        "memory_budget must be non-negative bytes, got -1",
    ),
    "memory_budget: NaN": (
        BOTH,
        {"memory_budget": float("nan")},
        ValueError,
        "memory_budget must be non-negative bytes, got nan",
    ),
    "memory_budget: text": (
        BOTH,
        {"memory_budget": "1GB"},
        TypeError,
        "memory_budget must be a number of bytes, got str",
    ),
    "group": (
        ("kronecker_factors",),
        {"group": object()},
        TypeError,
        r"group must be a torch\.distributed process group such as .*WORLD, got object",
    ),
    "progress": (
        ("kronecker_factors", "layer_hessians"),
        {"progress": 1.5},
        TypeError,
        "progress must be a bool or a callable, got float",
    ),
    "data: number": (BOTH, {"data": 5}, TypeError, "data must be an iterable of .* got int"),
    "data: None": (BOTH, {"data": None}, TypeError, "data must be an iterable of .* got NoneType"),
    "data: tensor": (
        BOTH,
        {"data": randn(4, 4)},
        TypeError,
        r"data must be an iterable of \(inputs, targets\), got Tensor",
    ),
    "data: tensors": (
        BOTH,
        {"data": [randn(4, 4)]},
        TypeError,
        r"data must yield \(inputs, targets\) .* batch 0 is Tensor",
    ),
    "data: dicts": (
        BOTH,
        {"data": [{"x": randn(4, 4), "y": classes(4, c=3)}]},
        TypeError,
        "batch 0 is dict",
    ),
    "data: four": (BOTH, {"data": [(*data()[0], 1, 2)]}, TypeError, "batch 0 is a tuple of 4"),
    "data: later": (
        BOTH,
        {"data": [data()[0], [randn(4, 4)]]},
        TypeError,
        "batch 1 is a list of 1",
    ),
    "data: empty": (BOTH, {"data": []}, ValueError, "data yielded no samples"),
    "data: empty loader": (
        BOTH,
        {"data": DataLoader(TensorDataset(randn(0, 4), classes(0, c=3)), batch_size=4)},
        ValueError,
        "data yielded no samples",
    ),
    "data: empty batches": (
        BOTH,
        {"data": [(randn(0, 4), classes(0, c=3))]},
        ValueError,
        "data yielded no samples",
    ),
    "data: meta device": (
        BOTH,
        {"data": [(randn(4, 4).to("meta"), classes(4, c=3))]},
        ValueError,
        r"data must hold values, got a tensor \[4, 4\] on the meta device",
    ),
    "data: one sample without batch axis": (
        BOTH,
        {"data": [(randn(4), classes(1, c=3)[0])]},
        ValueError,
        r"layer 'block\.0' sees inputs \[1, 4\] while the model returns 3 samples",
    ),
    "sample_weight: list": (
        BOTH,
        {"sample_weight": [1.0] * 6},
        TypeError,
        "sample_weight must be a tensor, got list",
    ),
    "sample_weight: two axes": (
        BOTH,
        {"sample_weight": torch.ones(6, 1)},
        ValueError,
        r"sample_weight must be \[total samples\], got \[6, 1\]",
    ),
    "sample_weight: short": (
        BOTH,
        {"sample_weight": torch.ones(5)},
        ValueError,
        "sample_weight has 5 entries but the data has 6 samples",
    ),
    "sample_weight: long": (
        BOTH,
        {"sample_weight": torch.ones(7)},
        ValueError,
        "sample_weight has 7 entries but the data has 6 samples",
    ),
    "sample_weight: negative": (
        BOTH,
        {"sample_weight": torch.tensor([1.0, 1, 1, 1, -2, 1])},
        ValueError,
        r"sample_weight must be finite and non-negative, got -2\.0 in batch 1",
    ),
    "sample_weight: NaN": (
        BOTH,
        {"sample_weight": torch.tensor([1.0, torch.nan, 1, 1, 1, 1])},
        ValueError,
        "sample_weight must be finite and non-negative, got nan in batch 0",
    ),
    "sample_weight: all zero": (
        BOTH,
        {"sample_weight": torch.zeros(6)},
        ValueError,
        "data yielded no samples",
    ),
    "weight in data: shape": (
        BOTH,
        {"data": [(*data()[0], torch.ones(3))]},
        ValueError,
        r"sample_weight must be \[N\] = \[4\] per batch, got \[3\]",
    ),
    "weight in data: number": (
        BOTH,
        {"data": [(*data()[0], 2.0)]},
        ValueError,
        r"sample_weight must be \[N\] = \[4\] per batch, got float",
    ),
    "sample_weight: complex": (
        BOTH,
        {"sample_weight": torch.ones(6, dtype=torch.cdouble)},
        TypeError,
        r"sample_weight, .* floating point \[N\], got torch.complex128 \[4\], .* its real part",
    ),
    "weight in data: indices": (
        BOTH,
        {"data": [(*data()[0], torch.arange(4))]},
        TypeError,
        r"sample_weight, or the third element of a batch, must be floating point \[N\], got "
        r"torch.int64 \[4\], which looks like indices, groups .* weight.double\(\)\. "
        r"Let the data yield \(inputs, targets\)",
    ),
    "weight in data: groups of another shape": (
        BOTH,
        {"data": [(*data()[0], torch.zeros(4, 2, dtype=torch.uint8))]},
        TypeError,
        r"floating point \[N\], got torch.uint8 \[4, 2\], which looks like indices, groups",
    ),
    "weight in data: mask": (
        BOTH,
        {"data": [(*data()[0], torch.ones(4, dtype=torch.bool))]},
        TypeError,
        r"got torch.bool \[4\], which looks like a mask; .* mask.double\(\)",
    ),
    "weight in data: two axes": (
        BOTH,
        {"data": [(*data()[0], torch.ones(4, 1))]},
        ValueError,
        r"sample_weight must be \[N\] = \[4\] per batch, got \[4, 1\]",
    ),
    "weight in data: sparse": (
        BOTH,
        {"data": [(*data()[0], torch.ones(4).to_sparse())]},
        TypeError,
        r"sample_weight must be dense, got a tensor \[4\] of layout torch.sparse_coo; .*to_dense",
    ),
    "targets: sparse": (
        BOTH,
        {"data": [(data()[0][0], torch.eye(4)[:, :3].to_sparse())]},
        TypeError,
        r"targets must be dense, got a tensor \[4, 3\] of layout torch.sparse_coo; .*to_dense",
    ),
    "targets: sparse, squared error": (
        BOTH,
        {"data": [(data()[0][0], torch.eye(4)[:, :3].to_sparse())], "loss": nn.MSELoss()},
        TypeError,
        "targets must be dense, got a tensor .* of layout torch.sparse_coo",
    ),
    "targets: complex": (
        BOTH,
        {"data": [(data()[0][0], torch.ones(4, 3, dtype=torch.cdouble))], "loss": nn.MSELoss()},
        TypeError,
        "targets must be real for MSELoss, got torch.complex128",
    ),
    "model returns complex numbers": (
        BOTH,
        {"model": net(lambda out: out * 1j), "loss": nn.MSELoss()},
        TypeError,
        "model must return a floating-point tensor, got torch.complex128",
    ),
    "loss: none": (BOTH, {"loss": None}, TypeError, "loss must be .* got None"),
    "targets: none": (
        BOTH,
        {"data": [(randn(4, 4), None)]},
        TypeError,
        "targets must be a tensor, got NoneType",
    ),
    "model returns a tuple": (
        BOTH,
        {"model": net(lambda out: (out, out))},
        TypeError,
        r"model must return a tensor \(or an object with \.logits\), got tuple",
    ),
    "model returns nothing": (
        BOTH,
        {"model": net(lambda out: None)},
        TypeError,
        "model must return a tensor .*, got NoneType",
    ),
    "model returns classes": (
        BOTH,
        {"model": net(lambda out: out.argmax(1))},
        TypeError,
        r"model must return a floating-point tensor, got torch\.int64",
    ),
    "model returns a scalar": (
        BOTH,
        {"model": net(lambda out: out.sum()), "loss": nn.MSELoss()},
        ValueError,
        r"model must return outputs per sample \[N, \.\.\.\], got a scalar",
    ),
    "model loses samples": (
        BOTH,
        {"model": net(lambda out: out[::2]), "data": [(randn(4, 4), classes(2, c=3))]},
        ValueError,
        r"layer 'block\.0' sees rows that are no samples: some of them act on no output",
    ),
    "model returns NaN": (
        BOTH,
        {"model": net(lambda out: out * torch.nan)},
        ValueError,
        "data: the model's outputs contain NaN or Inf in batch 0",
    ),
}


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for name, case in ARGUMENTS.items() for function in case[0]],
)
def test_bad_argument(function: str, name: str) -> None:
    _, change, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message) as caught:
        call(function, **change)
    # One error, not one raised while another was being handled, and no wall of text.
    assert caught.value.__context__ is None
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (randn(4, 3), "shape"),
        (randn(4, 4).float(), "dtype"),
        (classes(4, 4, c=5), "dtype"),
    ],
)
@pytest.mark.parametrize("function", BOTH)
def test_inputs_that_the_model_refuses(function: str, x: Tensor, message: str) -> None:
    # What the model says itself comes through unchanged.
    with pytest.raises(RuntimeError, match=message):
        call(function, data=[data()[0], (x, classes(4, c=3))])


def test_unbatched_images() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(0)))
    with pytest.raises(ValueError, match=r"layer '0' sees inputs \[1, 1, 3, 3\]"):
        hk.kronecker_factors(model, [(randn(1, 3, 3), randn(8))], nn.MSELoss())


def test_what_is_taken_in_the_forms_people_write_it() -> None:
    # Not errors: numbers of bytes as floats, weights of any dtype, named tuples, numpy sizes.
    expected = hk.kronecker_factors(net(), data(), CE)["fc"].output_hessian
    Batch = namedtuple("Batch", ["inputs", "targets"])
    for change in (
        {"memory_budget": 1e9},
        {"memory_budget": float("inf")},
        {"data": [Batch(*batch) for batch in data()]},
        {"data": [[[x], y] for x, y in data()]},
        {"data": [((x,), y) for x, y in data()]},
        {"data": [({"x": x}, y) for x, y in data()]},
        {"data": [(Batch(x, y)[:1], y) for x, y in data()]},
        {"sample_weight": torch.ones(6, dtype=torch.int32)},
        {"sample_weight": torch.ones(6, dtype=torch.bool)},
        {"layers": ("fc",)},
        {"layers": {"fc": None}.keys()},
    ):
        found = call("kronecker_factors", **change)["fc"].output_hessian
        assert torch.allclose(found, expected, rtol=1e-12, atol=0)
        H = call("layer_hessians", **change)["fc"]
        assert H.shape == (15, 15)


def test_inputs_as_a_named_tuple() -> None:
    Pair = namedtuple("Pair", ["first", "second"])

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.fc(first + second)

    model = seeded(Add())
    x, y = randn(4, 4), classes(4, c=3)
    found = hk.kronecker_factors(model, [(Pair(x, 2 * x), y)], CE)["fc"]
    assert torch.allclose(found.input_covariance, 9 * x.T @ x / 4)
