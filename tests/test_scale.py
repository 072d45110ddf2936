"""docs/scale.md says what its script computes, and calls send what is computed from shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hesskern as hk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_page_has_the_tables_of_its_script() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("click")
    script = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "tables"]
    found = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    tables, page = found.strip().split("\n\n"), (ROOT / "docs" / "scale.md").read_text()
    assert len(tables) == 6
    assert [table for table in tables if table not in page] == []


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("size", [2, 7, 1024])
def test_a_rank_sends_the_triangles_twice_but_for_its_part(size: int) -> None:
    from equal_ranks import equal_ranks

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    data, loss = [(torch.randn(8, 30), torch.randint(10, (8,)))], nn.CrossEntropyLoss()
    alone = hk.kronecker_factors(model, data, loss)
    with equal_ranks(size) as group:
        found = hk.kronecker_factors(model, data, loss, group=group)
    for name, factors in found.items():
        torch.testing.assert_close(factors.input_covariance, alone[name].input_covariance)
        torch.testing.assert_close(factors.output_hessian, alone[name].output_hessian)
    triangles = 4 * sum(n * (n + 1) // 2 for n in (30, 20, 20, 10))
    means = 8 * (30 + 20)
    # Buckets are filled up to a multiple of the ranks: a number for each of two at most.
    least = 2 * (triangles + means) * (size - 1) / size
    sent = sum(group.sent.values())
    assert least <= sent <= least + 2 * 2 * 8 * size
    # An exchange and a gathering for each dtype.
    assert sum(group.messages.values()) == 4 * (size - 1)
    # Whatever the number of ranks, the first asks the store as often.
    assert sum(group.store.calls.values()) < 100


@pytest.mark.usefixtures("benchmarks")
def test_work_goes_to_whoever_has_least() -> None:
    from scale_shapes import longest_share, shares

    assert shares([5, 4, 3, 3, 3], 2) == [10, 8]
    assert longest_share([5, 1, 1], 8) == 5
