"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gptq", EXAMPLES / "gptq.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gptq", module)
    spec.loader.exec_module(module)
    return module


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
