"""The script of docs/parallel.md under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from group_cases import check_same, taken_apart

import hesskern as hk

ROOT = Path(__file__).resolve().parents[2]
BEFORE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

torch.manual_seed(0)
model, loss = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
dataset = TensorDataset(torch.randn(101, 5), torch.randint(0, 3, (101,)))
queries = [dataset[:3]]
"""


def test_its_script_gives_what_one_process_gives(here: Path) -> None:
    script, more, sharded = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "parallel.md").read_text(), re.S
    )
    script = script.replace("dist.destroy", more + sharded + "dist.destroy")
    (here / "script.py").write_text(BEFORE + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "script.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    found = taken_apart(hk.load_factors("factors.safetensors"))
    known: dict[str, object] = {}
    exec(BEFORE, known)
    model, data, loss = known["model"], known["dataset"], known["loss"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(data, torch.utils.data.Dataset)
    want = taken_apart(hk.kronecker_factors(model, [data[:]], loss))
    check_same(found, want, 1e-6)
