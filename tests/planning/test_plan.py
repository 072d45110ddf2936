"""Plans against what the allocator hands out when the same call is really made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measured_peaks import Call, Loaded, measured
from torch import nn

import hesskern as hk
from hesskern.zoo.models import build

CE = nn.CrossEntropyLoss()
ROOM = 2**40

CALLS: dict[str, Call] = {
    "factors": lambda model, data: hk.kronecker_factors(model, data, CE),
    "ekfac": lambda model, data: hk.ekfac(model, data, CE),
    "hessians": lambda model, data: hk.layer_hessians(model, data, CE),
    "inputs": lambda model, data: hk.input_covariances(model, ((x,) for x, _ in data)),
}
# Name of a network, shape of its inputs, samples of a batch.
NETWORKS = {
    "mlp": ("f64x2", (1, 16, 16), 96),
    "lenet5": ("lenet5", (3, 32, 32), 24),
    "resnet18": ("resnet18-w16", (3, 32, 32), 8),
    "vgg11": ("vgg11-w16", (3, 32, 32), 16),
}


def batch_of(network: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    spec, shape, samples = NETWORKS[network]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *shape, generator=generator)
    return build(spec, shape, 10), (inputs, torch.arange(samples) % 10)


def assert_alike(one: hk.Plan, other: hk.Plan) -> None:
    """Equal, but for what waits for Python's collector at the peak."""
    assert one.peak == pytest.approx(other.peak, rel=1e-3)
    assert replace(one, peak=0, at_peak={}) == replace(other, peak=0, at_peak={})


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("network", NETWORKS)
def test_peaks(network: str, what: str) -> None:
    model, batch = batch_of(network)
    samples = len(batch[0])
    plan = hk.plan(model, batch, CE, what=what, num_samples=2 * samples, timing=False)
    assert plan.peak == pytest.approx(measured(CALLS[what], model, Loaded(batch, 2)), rel=0.1)
    assert sum(plan.at_peak.values()) == plan.peak


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("network", ["signals", "tokens", "groups"])
def test_peaks_of_corrections_of_many_rows(network: str, bias: Any) -> None:
    # What the kernels hold inside counts most where all root rows go together.
    model, shape = {
        "signals": (
            nn.Sequential(
                nn.Conv1d(2, 16, 9, stride=4),
                nn.Tanh(),
                nn.Conv1d(16, 32, 5, stride=2),
                nn.Tanh(),
                nn.Conv1d(32, 32, 3, stride=3),
                nn.Flatten(),
                nn.Linear(32 * 15, 10),
            ),
            (2, 400),
        ),
        "tokens": (
            nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8), nn.Flatten(), nn.Tanh()),
            (40, 32),
        ),
        "groups": (
            nn.Sequential(
                nn.Conv2d(8, 32, 3, groups=8), nn.Tanh(), nn.Flatten(), nn.Linear(32 * 36, 10)
            ),
            (8, 8, 8),
        ),
    }[network]
    if network == "tokens":
        model.append(nn.Linear(320, 10))
    batch = torch.randn(16, *shape), torch.arange(16) % 10

    def call(model: nn.Module, data: Iterable[Any]) -> Any:
        return hk.ekfac(model, data, CE, output="exact", bias=bias)

    plan = hk.plan(
        model, batch, CE, what="ekfac", output="exact", bias=bias, num_samples=32, timing=False
    )
    assert plan.peak == pytest.approx(measured(call, model, Loaded(batch, 2)), rel=0.1)


class Attention(nn.Module):
    """A head behind attention: its root rows go backwards one by one."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        out: torch.Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("what", ["factors", "ekfac"])
@pytest.mark.parametrize("classes", [30, 100])
def test_peaks_of_many_single_rows(what: str, classes: int) -> None:
    model = Attention(32, classes)
    batch = torch.randn(16, 40, 32), torch.arange(16) % classes
    function: Any = hk.ekfac if what == "ekfac" else hk.kronecker_factors

    def call(model: nn.Module, data: Iterable[Any]) -> Any:
        return function(model, data, CE, output="exact")

    given: Any = {"what": what, "output": "exact", "num_samples": 32}
    plan = hk.plan(model, batch, CE, timing=False, **given)
    assert plan.blocks == 0
    assert plan.peak == pytest.approx(measured(call, model, Loaded(batch, 2)), rel=0.1)


def test_one_sample_is_enough() -> None:
    model, (inputs, targets) = batch_of("lenet5")
    one = inputs[:1], targets[:1]
    given = hk.plan(model, (inputs, targets), CE, available=ROOM, timing=False)
    found = hk.plan(model, one, CE, batch_size=len(inputs), available=ROOM, timing=False)
    assert_alike(found, given)


def test_a_model_on_the_meta_device() -> None:
    model, batch = batch_of("lenet5")
    there = hk.plan(model, batch, CE, available=ROOM, timing=False)
    meta = hk.plan(model.to("meta"), tuple(t.to("meta") for t in batch), CE, available=ROOM)
    assert not meta.seconds
    assert_alike(meta, there)


@pytest.mark.parametrize("output", ["exact", "mc"])
def test_stored_samples_grow_with_the_data(output: Any) -> None:
    model, batch = batch_of("mlp")
    samples = len(batch[0])
    plan = hk.plan(
        model, batch, CE, what="hessians", output=output, num_samples=6 * samples, timing=False
    )

    def call(model: nn.Module, data: Iterable[Any]) -> Any:
        return hk.layer_hessians(model, data, CE, output=output)

    assert plan.peak == pytest.approx(measured(call, model, Loaded(batch, 6)), rel=0.1)
    stored = sum(c.nbytes for H in call(model, Loaded(batch, 6)).values() for c in H._chunks)
    assert plan.kept == sum(layer.samples for layer in plan.layers) == stored


def test_a_budget_that_some_layers_exceed() -> None:
    model, batch = batch_of("mlp")
    samples = len(batch[0])
    budget = 5 * 2**18
    plan = hk.plan(
        model,
        batch,
        CE,
        what="hessians",
        num_samples=5 * samples,
        memory_budget=budget,
        timing=False,
    )

    def call(model: nn.Module, data: Iterable[Any]) -> Any:
        return hk.layer_hessians(model, data, CE, memory_budget=budget)

    result = call(model, Loaded(batch, 5))
    anew = [name for name, H in result.items() if not H.cached]
    assert 0 < len(anew) < len(result)
    assert [layer.name for layer in plan.layers if layer.recomputed] == anew
    assert plan.peak == pytest.approx(measured(call, model, Loaded(batch, 5)), rel=0.1)
    assert any("memory_budget=" in text for text in plan.advice)


def test_layers_hold_what_the_result_holds() -> None:
    model, batch = batch_of("vgg11")
    factors = hk.kronecker_factors(model, [batch], CE, bias="joint")
    plan = hk.plan(model, batch, CE, bias="joint", timing=False)
    assert plan.kept == sum(layer.factors for layer in plan.layers)
    for layer in plan.layers:
        own = factors[layer.name]
        images = sum(image.nbytes for image in own.input_images or ())
        assert layer.shape == own.layer_shape
        assert layer.factors == own.input_covariance.nbytes + own.output_hessian.nbytes + images
        assert layer.positions == own.positions
    conv = next(layer for layer in plan.layers if layer.kind == "conv")
    assert conv.rows == 9 * len(batch[0]) * conv.positions * conv.shape[0] * 4


def test_what_does_not_fit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    batch = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    peak = hk.plan(model, batch, CE, timing=False).peak
    room = int(0.8 * peak)
    tight = hk.plan(model, batch, CE, available=room)
    assert not tight.fits
    assert not tight.seconds
    assert any("output='mc'" in text for text in tight.advice)
    (smaller,) = (text for text in tight.advice if text.startswith("batches of"))
    size = int(smaller.split()[2])
    again = hk.plan(model, batch, CE, batch_size=size, available=room, timing=False)
    assert again.fits
    assert "does NOT fit" in str(tight)
    assert hk.plan(model, batch, CE, available=2 * peak, timing=False).fits


def test_operations_of_a_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    batch = torch.randn(7, 5), torch.zeros(7, dtype=torch.long)
    plan = hk.plan(model, batch, CE, num_samples=70, timing=False)
    forward, rows = 2 * 7 * 5 * 3, 7 * 2 * 3 * 4
    covariance = 7 * 5 * 6
    assert sum(plan.operations.values()) == 10 * (forward + rows + covariance)


def test_time() -> None:
    model, batch = batch_of("mlp")
    plan = hk.plan(model, batch, CE, what="ekfac", num_samples=10 * len(batch[0]))
    assert set(plan.seconds) == {"Kronecker factors", "Eigenvalue corrections", "once"}
    assert sum(plan.seconds.values()) > 0


def test_the_model_comes_back_as_it_was() -> None:
    model, batch = batch_of("lenet5")
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hk.plan(model, batch, CE, diagonal=True, timing=False)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_words_and_json() -> None:
    model, batch = batch_of("mlp")
    plan = hk.plan(model, batch, CE, timing=False)
    text = str(plan)
    for layer in plan.layers:
        assert layer.name in text
    found = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert found["peak"] == plan.peak
    assert [layer["name"] for layer in found["layers"]] == [la.name for la in plan.layers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "factor"}, "what must be"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_samples": 1.5}, "num_samples must be an int"),
        ({"available": -1}, "non-negative"),
        ({"output": "all"}, "output must be"),
        ({"layers": "nothing"}, "nothing"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model, batch = batch_of("mlp")
    with pytest.raises((ValueError, TypeError), match=message):
        hk.plan(model, batch, CE, **options)
