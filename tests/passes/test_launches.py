"""Few operators for every layer of a pass, and no waiting, counted on the CPU as a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from launches import (
    CASES,
    LOSS,
    PASSES,
    Case,
    mlp,
    of_a_batch,
    of_the_model,
    playing_device,
    waits_of_a_pass,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hesskern as hk
from hesskern.ops import foreach

# Of an MC batch beyond the model's own, those for the loss, the weights and the flags included.
PER_LAYER = 15
# Of one more linear layer, and of one layer alone: what a batch takes whatever the number of layers
# does not fit into a single layer's share.
ONE_MORE_LAYER = 3
SINGLE_LAYER = 26
# Where the model is run, forward and backward.
MODEL = ("forward_pass.py", "capture.py")

# Operators of one batch, the model's own forward and backward passes included, with 5% to spare.
LIMITS = {
    ("mlp", "mc"): 66,
    ("mlp", "exact"): 140,
    ("mlp", "hessians"): 134,
    ("cnn", "mc"): 129,
    ("cnn", "exact"): 270,
    ("cnn", "hessians"): 307,
    ("lenet5", "mc"): 102,
    ("lenet5", "exact"): 211,
    ("lenet5", "hessians"): 221,
    ("resnet18", "mc"): 384,
    ("resnet18", "exact"): 702,
    ("resnet18", "hessians"): 838,
}
# The same where only autograd knows the model's operations: nine rows of ten classes, one by one.
ROW_BY_ROW = {
    ("mlp", "exact"): 224,
    ("mlp", "hessians"): 268,
    ("lenet5", "exact"): 394,
    ("lenet5", "hessians"): 555,
    ("resnet18", "exact"): 1682,
    ("resnet18", "hessians"): 2675,
}


@pytest.mark.parametrize(("name", "kind"), LIMITS, ids="-".join)
def test_operators_of_a_batch(name: str, kind: str) -> None:
    assert of_a_batch(CASES[name](), PASSES[kind]).dispatched <= LIMITS[name, kind]


@pytest.mark.parametrize(("name", "kind"), ROW_BY_ROW, ids="-".join)
def test_operators_row_by_row(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesskern.graph.propagation._DEVICES", ())
    assert of_a_batch(CASES[name](), PASSES[kind]).dispatched <= ROW_BY_ROW[name, kind]


class _Copies(TorchDispatchMode):
    """Copies of rows [n, r, ...] of images, and what transposed convolutions take and return."""

    def __init__(self, n: int, r: int) -> None:
        super().__init__()
        self.n, self.r = n, r
        self.copied: list[tuple[int, ...]] = []
        self.rows: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        found = function(*args, **(kwargs or {}))
        if name in ("clone", "copy_", "_to_copy"):
            shape = tuple(found.shape)
            merged = shape[:1] == (self.n * self.r,)
            if len(shape) > 3 and (merged or shape[:2] == (self.n, self.r)):
                self.copied.append(shape)
        if name == "convolution" and args[6]:
            self.rows += [args[0], found]
        return found


def test_rows_keep_their_channels_last() -> None:
    """Between convolutions, ReLUs and poolings nothing copies them."""
    case, n, rows = CASES["cnn"](), 5, 9
    copies = _Copies(n, rows)

    class Watched:
        def __iter__(self) -> Iterator[Any]:
            first, second = case.batches(2, n)
            yield first
            with copies:
                yield second

    with playing_device():
        hk.kronecker_factors(case.model, Watched(), LOSS)
    # Those that come from the linear layer have their channels first.
    assert copies.copied == [(n, rows, 4, 4, 16)]
    assert len(copies.rows) == 10
    for tensor in copies.rows:
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CASES)
def test_operators_beyond_the_models_own(name: str) -> None:
    case = CASES[name]()
    found, own = of_a_batch(case, PASSES["mc"]), of_the_model(case, 1)
    assert found.dispatched - own.dispatched <= PER_LAYER * case.layers
    # Nor more where the model's own is what the pass itself sends through it, which leaves out the
    # weights' gradients.
    sent = sum(n for (line, _), n in found.by_line.items() if line.startswith(MODEL))
    assert found.dispatched - sent <= PER_LAYER * case.layers
    # None of a layer's own but these: what is looked at, masked and added goes for all at once.
    per_layer = [n for (_, operator), n in found.by_line.items() if "_foreach" in operator]
    assert per_layer == [1, 1]


def test_operators_of_few_layers() -> None:
    """One layer alone takes more than a layer's share, two do not."""
    single, two = Case(nn.Linear(784, 10), (784,)), Case(mlp(2), (784,))
    beyond = [
        of_a_batch(case, PASSES["mc"]).dispatched - of_the_model(case, 1).dispatched
        for case in (single, two)
    ]
    assert PER_LAYER < beyond[0] <= SINGLE_LAYER
    assert beyond[1] <= 2 * PER_LAYER


@pytest.mark.parametrize("kind", ["mc", "exact", "hessians"])
def test_operators_of_one_more_layer(kind: str) -> None:
    def beyond(depth: int) -> int:
        case = Case(mlp(depth), (784,))
        rows = 1 if kind == "mc" else 9
        return of_a_batch(case, PASSES[kind]).dispatched - of_the_model(case, rows).dispatched

    # Nine rows together take fewer than nine backward passes: the models' own are more.
    assert beyond(8) - beyond(3) <= (5 * ONE_MORE_LAYER if kind == "mc" else 0)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_waits(name: str, kind: str) -> None:
    assert len(waits_of_a_pass(CASES[name](), PASSES[kind])) <= 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_entry_is_looked_at(bad: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    shapes = [(3,), (2, 5), (), (4, 1, 3)]
    for chosen in range(len(shapes)):
        tensors = [torch.full(shape, -largest, dtype=dtype) for shape in shapes]
        tensors[1] = tensors[1].double()
        tensors[chosen].view(-1)[-1] = bad
        flags, order = foreach.are_finite(tensors)
        found = dict(zip(order, torch.cat(flags).tolist(), strict=True))
        assert found == {i: i != chosen for i in range(len(shapes))}


def test_sums_of_other_dtypes_and_shapes() -> None:
    targets = [torch.ones(2, 2), torch.ones(3).double()]
    foreach.add_(targets, [torch.full((2, 2), 2.0), torch.full((3,), 3.0).double()])
    foreach.scale_(targets, torch.tensor(0.5, dtype=torch.float64))
    foreach.scale_(targets, 4.0)
    assert targets[0].tolist() == [[6.0, 6.0], [6.0, 6.0]]
    assert targets[1].tolist() == [8.0, 8.0, 8.0]


@pytest.mark.filterwarnings("ignore:left out")
def test_the_memory_of_a_batch_is_used_again() -> None:
    """Sums of earlier batches stay what they were, also where layers come later."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) if len(x) > 4 else self.a(x)

    torch.manual_seed(0)
    model = Growing().double()
    data = [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in (4, 3, 2, 5, 6, 7, 1)]
    loss = nn.CrossEntropyLoss()
    together = hk.FactorAccumulator(model, loss)
    together.consume(data)
    alone = [hk.kronecker_factors(model, [batch], loss) for batch in data]
    for name, layer in together.factors().items():
        reached = [f for f in alone if name in f]
        inputs = sum(f[name].input_covariance * f.num_samples for f in reached)
        torch.testing.assert_close(layer.input_covariance, inputs / together.num_samples)
        # The mean over the positions that there are: samples that pass the layer by have none.
        outputs = sum(f[name].output_hessian * f.num_samples for f in reached)
        torch.testing.assert_close(
            layer.output_hessian, outputs / sum(f.num_samples for f in reached)
        )
