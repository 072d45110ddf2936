"""Sums in files: every bit is that of sums in memory, in one process and in several."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from group_cases import GROUP_CASES, check_same, factors_of, part, taken_apart
from processes import run
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*never reached:UserWarning")


def _factors(group: Any, spill: Any) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, case in GROUP_CASES.items():
        batches = case.data()
        mine = batches if group is None else part(batches, group.rank(), group.size())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = taken_apart(factors_of(case, mine, group, spill=spill))
    return found


def test_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    want, found = _factors(None, None), _factors(None, "disk")
    for name in GROUP_CASES:
        check_same(found[name], want[name], 0)
    assert not list(tmp_path.glob("hesskern-spill-*"))


def test_in_several_processes() -> None:
    want = run(_factors, 3, None)
    found = run(_factors, 3, "disk")
    for rank in range(3):
        for name in GROUP_CASES:
            check_same(found[rank][name], want[rank][name], 0)
            assert any(bool(tensor.any()) for tensor in found[rank][name].values())


def test_rows_in_several_blocks() -> None:
    for name in ("mlp", "conv groups", "mask"):
        case = GROUP_CASES[name]
        want, found = (
            factors_of(case, case.data(), memory_budget=0, spill=spill) for spill in (None, "disk")
        )
        check_same(taken_apart(found), taken_apart(want), 0)
        assert isinstance(found.num_samples, float)
        assert torch.equal(found.operator().diagonal(), want.operator().diagonal())
