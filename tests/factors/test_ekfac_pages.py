"""What README and docs/ekfac.md show of EKFAC runs, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import relative_error
from networks import classes, randn
from torch import nn

import hesskern as hk

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    """Python code of a page that speaks of EKFAC."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [code for code in found if "hk.ekfac(" in code]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(6, 8))
    model.add_module("relu", nn.ReLU())
    model.add_module("fc2", nn.Linear(8, 3))
    loader = [(randn(16, 6, seed=i).float(), classes(16, c=3, seed=i)) for i in range(3)]
    loss = nn.CrossEntropyLoss()
    loss(model(loader[0][0]), loader[0][1]).backward()
    gradients = {n: model.get_submodule(n).weight.grad for n in ("fc1", "fc2")}
    return {"hk": hk, "model": model, "loader": loader, "loss": loss, "gradients": gradients}


def check(E: hk.EKFAC, vectors: dict[str, Any], solved: dict[str, Any]) -> None:
    for name, layer in E.items():
        dense = layer.to_dense().double()
        damping = 0.1 * float(dense.trace()) / len(dense)
        again = dense @ solved[name].flatten().double() + damping * solved[name].flatten()
        assert relative_error(again, vectors[name].flatten()) <= 1e-4


def test_readme(names: dict[str, Any]) -> None:
    code = next(code for code in blocks("README.md") if "load_ekfac" in code)
    assert len(code.splitlines()) == 5
    code = code.replace("eigsh(20)", "eigsh(3)")
    exec(code, names)
    assert isinstance(names["E"], hk.EKFAC)
    check(names["E"], names["gradients"], names["natural"])
    fresh = hk.ekfac(names["model"], names["loader"], names["loss"])
    assert all(torch.equal(fresh[n].values, names["E"][n].values) for n in fresh)


def test_page(names: dict[str, Any]) -> None:
    first, second = blocks("docs/ekfac.md")
    exec(first, names)
    E = names["E"]
    check(E, {n: E[n].values for n in E}, names["natural"])
    exec(second, names)
    assert names["again"].settings["output"] == "empirical"
    assert names["again"].settings["factors"]["output"] == "mc"
    assert names["again"].specs["fc1"].joint


def test_one_matrix_over_all_layers(names: dict[str, Any]) -> None:
    E = hk.ekfac(*(names[n] for n in ("model", "loader", "loss")))
    dense = torch.block_diag(*(E[n].to_dense() for n in E))
    vector = randn(len(dense), dtype=torch.float32)
    assert relative_error(E @ vector, dense @ vector) <= 1e-5
    assert E.trace() == pytest.approx(float(dense.trace()), rel=1e-5)
    assert relative_error(E.diagonal(), dense.diagonal()) <= 1e-5
    shifted = dense.double() + 0.1 * torch.eye(len(dense)).double()
    assert E.logdet(0.1) == pytest.approx(float(torch.logdet(shifted)), rel=1e-5)
    root = E.power(-0.5, 0.1)
    assert relative_error(root @ (root @ vector), E.solve(vector, 0.1)) <= 1e-5
    draws = E.sample(3, 0.1, torch.Generator().manual_seed(0))
    assert draws.shape == (len(dense), 3)
    with pytest.raises(ValueError, match="order must be 'weight' or 'output', got 'memory'"):
        E.operator("memory")  # type: ignore[arg-type]
