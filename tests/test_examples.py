"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("gptq", monkeypatch)


@pytest.fixture
def flipped_labels(monkeypatch: pytest.MonkeyPatch) -> Any:
    return loaded("flipped_labels", monkeypatch)


def test_gptq_beats_rounding_to_nearest_in_every_layer(gptq: Any, capsys: Any) -> None:
    errors = gptq.compare(steps=20)
    assert len(errors) == 2 * 7 + 1
    for nearest, ours in errors.values():
        assert 0 < ours < 0.95 * nearest
    assert "loss GPTQ" in capsys.readouterr().out


def test_gptq_on_few_columns_is_near_the_best_of_all(gptq: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    weight = torch.randn(1, 4, generator=generator)
    covariance = inputs.T @ inputs / 50
    grid = gptq.Grid.of(weight, 2, 4)
    found = gptq.gptq(weight, covariance, grid, damping=1e-9)
    values = (torch.arange(4.0) - grid.zero[0, 0]) * grid.step[0, 0]
    assert all(bool((values - v).abs().min() < 1e-6) for v in found.flatten())
    every = torch.cartesian_prod(*[values] * 4)
    error = [gptq.output_error(q[None] - weight, weight, covariance) for q in every]
    ours = gptq.output_error(found - weight, weight, covariance)
    nearest = gptq.output_error(grid.nearest(weight) - weight, weight, covariance)
    assert min(error) - 1e-6 <= ours <= nearest
    # Without correlations there is nothing to make up for.
    plain = gptq.gptq(weight, torch.eye(4), grid)
    assert torch.allclose(plain, grid.nearest(weight))


def test_a_grid_has_its_values_and_zero(gptq: Any) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    grid = gptq.Grid.of(weight, 3, 4)
    rounded = grid.nearest(weight)
    assert float(((rounded - weight).abs() / grid.step).max()) <= 1.0 + 1e-5
    for part in rounded.split(4, 1):
        assert all(len(row.unique()) <= 8 for row in part)
    assert torch.equal(grid.nearest(torch.zeros(5, 7)), torch.zeros(5, 7))


def test_wrong_labels_are_found(
    flipped_labels: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("HESSKERN_DATA", raising=False)
    problem = flipped_labels.load(None, 1000, 0.05)
    assert "Taking scikit-learn's digits instead" in capsys.readouterr().out
    wrong = problem.flipped
    assert 30 < int(wrong.sum()) < 70
    clean = flipped_labels.data.load("digits", limit=1000).targets
    assert torch.equal(problem.train.targets != clean, wrong)
    areas = flipped_labels.compare(problem, "f32x1", 15)
    assert areas["clean queries"] > 0.9
    assert areas["self-influence"] > 0.95
    assert all(0.5 < value <= 1 for value in areas.values())


def test_the_area_is_a_probability(flipped_labels: Any) -> None:
    source = torch.Generator().manual_seed(0)
    suspicion = torch.randint(0, 6, (40,), generator=source)
    wrong = torch.rand(40, generator=source) < 0.3
    pairs = suspicion[wrong][:, None] - suspicion[~wrong][None]
    expected = float(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean())
    assert flipped_labels.area(suspicion, wrong) == pytest.approx(expected)
