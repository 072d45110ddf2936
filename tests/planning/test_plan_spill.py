"""Plans of passes that put tensors elsewhere, against what the allocator hands out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from console import run
from measured_peaks import Loaded, measured
from spilled_files import small_files
from torch import Tensor, nn

import hesskern as hk
from hesskern.spill.read_ahead import ring_bytes
from hesskern.zoo.models import build

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go; what waits and what goes together is little."""
    return small_files(tmp_path, monkeypatch, 2**18)


def wide() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(200, 200), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(200, 10)), (torch.randn(8, 200), torch.arange(8) % 10)


def lenet() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return build("lenet5", (3, 32, 32), 10), (torch.randn(12, 3, 32, 32), torch.arange(12) % 10)


@pytest.mark.parametrize("options", [{"output": "mc"}, {"bias": "joint"}, {"diagonal": True}])
@pytest.mark.parametrize("problem", [wide, lenet])
def test_factors(problem: Any, options: dict[str, Any], folder: Path) -> None:
    model, batch = problem()
    more = {"num_samples": 2 * len(batch[0]), "timing": False, **options}
    plan = hk.plan(model, batch, CE, spill="disk", **more)
    assert not list(folder.glob("hesskern-spill-*"))
    found = hk.kronecker_factors(model, [batch], CE, spill="disk", **options)

    def call(model: nn.Module, data: Any) -> Any:
        return hk.kronecker_factors(model, data, CE, spill="disk", **options)

    assert plan.peak == pytest.approx(measured(call, model, Loaded(batch, 2)), rel=0.1)
    assert sum(plan.at_peak.values()) == plan.peak
    assert all(layer.spilled for layer in plan.layers)
    held = sum(layer.factors for layer in plan.layers)
    assert held == sum(
        t.nbytes
        for f in found.values()
        for t in (f.input_covariance, f.output_hessian, *(f.input_images or ()))
    )
    assert plan.kept == 0
    # Running sums, and beside them those of a batch or the factors; with a joint bias one layer's
    # covariance twice.
    assert 1.9 * held < plan.elsewhere < 2.7 * held
    plain = hk.plan(model, batch, CE, **more)
    assert plain.elsewhere == 0
    assert plain.kept == held
    assert plain.peak > plan.peak
    assert [layer.factors for layer in plain.layers] == [layer.factors for layer in plan.layers]


# Of a few batches all are run on shapes; of many, what they hold is known.
@pytest.mark.parametrize(
    ("problem", "budget", "batches"),
    [(wide, 0, 12), (wide, 2**20, 8), (wide, 2**23, 70), (lenet, 0, 6), (lenet, 2**21, 8)],
)
def test_samples(problem: Any, budget: int, batches: int, folder: Path) -> None:
    model, batch = problem()
    n = batches * len(batch[0])
    given: dict[str, Any] = {"memory_budget": budget, "spill": "disk"}
    plan = hk.plan(model, batch, CE, what="hessians", num_samples=n, timing=False, **given)
    assert not list(folder.glob("hesskern-spill-*"))
    found: list[hk.LayerHessians] = []

    def call(model: nn.Module, data: Any) -> Any:
        found.append(hk.layer_hessians(model, data, CE, **given))
        return found[-1]

    assert plan.peak == pytest.approx(measured(call, model, Loaded(batch, batches)), rel=0.1)
    assert sum(plan.at_peak.values()) == plan.peak
    for layer in plan.layers:
        assert layer.spilled == found[0][layer.name].spilled
        assert not layer.recomputed
    there = sum(path.stat().st_size for path in folder.glob("*/*"))
    # Inputs that pieces over rows have in common are written with each of them.
    assert plan.elsewhere <= there
    if budget > 2**21:
        assert plan.elsewhere == pytest.approx(there, rel=0.1)
    assert plan.kept == sum(layer.samples for layer in plan.layers if not layer.spilled)
    assert plan.kept <= budget
    assert plan.read_ahead == 3 * 2**18
    rings = [ring_bytes(H._chunks._files) for H in found[0].values() if H.spilled]
    # Files are smaller where layers take turns in waiting.
    assert 0 < max(rings) <= 1.01 * plan.read_ahead


def test_budgets_advise_it() -> None:
    model, batch = wide()
    plan = hk.plan(model, batch, CE, output="mc", available=2**20, num_samples=24, timing=False)
    assert not plan.fits
    with_it = hk.plan(model, batch, CE, output="mc", spill="disk", num_samples=24, timing=False)
    assert with_it.peak <= 2**20
    assert plan.advice[0].startswith("spill='disk' has a peak of ")
    whole = [layer.factors for layer in with_it.layers]
    assert f"{with_it.elsewhere / 2**20:.3g} MiB in files" in plan.advice[0]
    assert with_it.elsewhere > sum(whole)
    again = hk.plan(model, batch, CE, output="mc", spill="disk", available=2**10, timing=False)
    assert not any("spill" in text for text in again.advice)
    hessians = hk.plan(
        model, batch, CE, what="hessians", num_samples=160, available=2**20, timing=False
    )
    assert any("spill='disk'" in text for text in hessians.advice)


def test_it_is_printed(folder: Path) -> None:
    model, batch = wide()
    text = str(hk.plan(model, batch, CE, spill="disk", timing=False))
    assert "KiB spilled" in text
    assert "In files: " in text
    given: dict[str, Any] = {"memory_budget": 0, "spill": "disk", "timing": False}
    plan = hk.plan(model, batch, CE, what="hessians", num_samples=80, **given)
    assert "a product reads into 768 KiB" in str(plan)
    assert plan.to_dict()["elsewhere"] == plan.elsewhere


def test_on_the_command_line() -> None:
    small = ["f16x1", "--input-shape", "1x6x6", "--batch-size", 8, "--no-timing", "--json"]
    done = run("plan", *small, "--spill", "disk")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.output)
    assert plan["spill"] == "disk"
    assert plan["kept"] == 0 < plan["elsewhere"]
    done = run("plan", *small, "--spill", "cpu")
    assert done.exit_code == 1
    assert "spill='cpu' takes sums from a GPU" in done.output


def test_two_batches_are_timed_with_it(folder: Path) -> None:
    model, batch = wide()
    plan = hk.plan(model, batch, CE, spill="disk")
    assert sum(plan.seconds.values()) > 0
    assert not list(folder.glob("hesskern-spill-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "ekfac", "spill": "disk"}, "spill must be None for what='ekfac'"),
        ({"what": "inputs", "spill": "disk"}, "spill must be None for what='inputs'"),
        ({"spill": "tape"}, "spill must be None, 'cpu' or 'disk', got 'tape'"),
        ({"spill": "cpu"}, "spill='cpu' takes sums from a GPU"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model, batch = wide()
    with pytest.raises(ValueError, match=message):
        hk.plan(model, batch, CE, **options)
