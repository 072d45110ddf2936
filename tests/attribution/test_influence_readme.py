"""The README's lines about influence run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from networks import classes, randn
from torch import nn

import hesskern as hk

README = Path(__file__).resolve().parents[2] / "README.md"


def test_its_lines_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "hk.influence" in block]
    assert len(block.splitlines()) == 5
    torch.manual_seed(0)
    given = {
        "hk": hk,
        "model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(),
        "loader": [(randn(12, 4, seed=i), classes(12, c=3, seed=i)) for i in range(3)],
        "queries": [(randn(2, 4, seed=9), classes(2, c=3, seed=9))],
        "loss": nn.CrossEntropyLoss(),
    }
    exec(block, given)
    assert "torch.Size([2, 36])" in capsys.readouterr().out
    assert (here / "influence.safetensors").is_file()
