"""What docs/algebra.md shows runs, and does what it says."""

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


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Names that the page's code defines, run from top to bottom on a small network."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(6, 8))
    model.add_module("relu", nn.ReLU())
    model.add_module("fc2", nn.Linear(8, 3))
    loader = [(randn(16, 6, seed=i).float(), classes(16, c=3, seed=i)) for i in range(4)]
    loss = nn.CrossEntropyLoss()
    loss(model(loader[0][0]), loader[0][1]).backward()
    names: dict[str, Any] = {"model": model, "loader": loader, "loss": loss}
    text = (Path(__file__).parents[2] / "docs" / "algebra.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        exec(code, names)
    return names


def test_first_example(page: dict[str, Any]) -> None:
    K, gradient = page["K"], page["gradient"]
    dense = K.to_dense().double()
    flat = K.flat(gradient).double()
    means = [
        torch.full((layer.shape[0],), 0.1 * layer.trace() / layer.shape[0])
        for layer in K.layers.values()
    ]
    expected = torch.linalg.solve(dense + torch.diag(torch.cat(means).double()), flat)
    assert relative_error(K.flat(page["natural"]), expected) <= 1e-5
    shifted = dense + 0.1 * torch.eye(len(dense)).double()
    values, vectors = torch.linalg.eigh(shifted)
    whitened = vectors @ (values.rsqrt() * (vectors.T @ flat))
    assert relative_error(K.flat(page["whitened"]), whitened) <= 1e-5
    assert page["logdet"] == pytest.approx(float(values.log().sum()), rel=1e-5)
    assert {name: tuple(x.shape) for name, x in page["draws"].items()} == {
        "fc1": (5, 8, 6),
        "fc2": (5, 3, 8),
    }


def test_second_example(page: dict[str, Any]) -> None:
    assert isinstance(page["posterior"], hk.NetworkOperator)
    dense = 60_000 * page["K"].to_dense().double() + torch.eye(page["K"].shape[0])
    evidence = -0.5 * float(torch.linalg.slogdet(dense).logabsdet)
    assert page["evidence"] == pytest.approx(evidence, rel=1e-5)
    assert page["weights"]["fc2"].shape == (10, 3, 8)
    assert isinstance(page["preconditioner"].layers["fc1"], hk.KroneckerOperator)


def test_sums(page: dict[str, Any]) -> None:
    assert page["both"].num_samples == 64 + 32
    gap = page["K"].to_dense() - page["half"].operator().to_dense()
    assert relative_error(page["difference"].to_dense(), gap) <= 1e-6
