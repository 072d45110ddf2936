"""layer_hessians goes on from its checkpoint and the samples stored beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Attention, Between, ResidualConv, classes, randn, seeded
from resumed import Seen, broken_off
from torch import Tensor, nn

import hesskern as hk

BATCHES = 4


def batches(*shape: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [
        (randn(3, *shape, seed=i, dtype=dtype), classes(3, c=3, seed=i)) for i in range(BATCHES)
    ]


def model(kind: Callable[[], nn.Module] | None = None) -> nn.Module:
    return seeded(Between(torch.relu) if kind is None else kind()).float()


def padded(inputs: Tensor) -> Tensor:
    return (inputs[..., 0] > -1).float()


CASES: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "exact": lambda: (model(), batches(4), {}),
    "drawn in float64": lambda: (
        model().double(),
        batches(4, dtype=torch.float64),
        {"output": "mc", "bias": "joint"},
    ),
    "images": lambda: (model(ResidualConv), batches(2, 4, 4), {}),
    "positions": lambda: (model(Attention), batches(4, 4), {"sample_weight": randn(12).abs()}),
    "masks": lambda: (model(Attention), batches(4, 4), {"position_mask": padded}),
    "pruned": lambda: (model(), batches(4), {"tolerance": 0.3}),
    # Some layers stay, the largest run again.
    "little memory": lambda: (model(), batches(4), {"memory_budget": 900}),
    "little memory, pruned": lambda: (
        model(),
        batches(4),
        {"memory_budget": 900, "tolerance": 0.3},
    ),
}


def assert_same_bits(found: hk.LayerHessians, whole: hk.LayerHessians) -> None:
    assert list(found) == list(whole)
    assert found.skipped == whole.skipped
    for name, H in whole.items():
        other = found[name]
        v = randn(H.shape[0], 3, seed=1).to(H.dtype)
        assert torch.equal(other @ v, H @ v)
        assert torch.equal(other.diagonal(), H.diagonal())
        for attribute in ("num_samples", "cached", "pruning_error", "pruned_trace", "checked"):
            assert getattr(other, attribute) == getattr(H, attribute), attribute
        assert other.is_exact == H.is_exact


@pytest.mark.filterwarnings("ignore:the Gauss-Newton block")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("after", [2, BATCHES])
def test_bits(case: str, after: int, tmp_path: Path) -> None:
    net, data, settings = CASES[case]()
    call = partial(hk.layer_hessians, net, data, CE, **settings)
    whole = call()
    path = tmp_path / "pass.checkpoint"
    broken_off(call, path, 1)
    broken_off(call, path, after)
    seen = Seen()
    found = call(checkpoint=path, progress=seen)
    assert [done for _, done in seen] == list(range(after + 1, BATCHES + 1))
    assert_same_bits(found, whole)
    assert list(tmp_path.iterdir()) == []


def test_some_layers_exceed_the_budget() -> None:
    # Of the cases above: what they are to say is only said where both kinds are there.
    net, data, settings = CASES["little memory"]()
    cached = [H.cached for H in hk.layer_hessians(net, data, CE, **settings).values()]
    assert sorted(cached) == [False, True]


def test_samples_are_written_once(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    call = partial(hk.layer_hessians, net, data, CE)
    broken_off(call, path, 1)
    (first,) = tmp_path.glob("*.part*")
    before = os.stat(first).st_ino, first.read_bytes()
    broken_off(call, path, 3)
    parts = sorted(tmp_path.glob("*.part*"))
    assert [part.name for part in parts] == [f"pass.checkpoint.part{i}" for i in range(3)]
    assert (os.stat(first).st_ino, first.read_bytes()) == before


def test_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    calls = []

    def forward(module: nn.Module, args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    whole = hk.layer_hessians(net, data, CE, memory_budget=1000)
    handle = net.register_forward_pre_hook(forward)
    # The pass begins anew with a quarter of the budget, and so does its checkpoint.
    call = partial(hk.layer_hessians, net, data, CE, memory_budget=4000)
    found = call(checkpoint=path, checkpoint_every=0)
    handle.remove()
    assert_same_bits(found, whole)
    calls.clear()
    handle = net.register_forward_pre_hook(forward)
    broken_off(call, path, 3)
    handle.remove()
    assert_same_bits(call(checkpoint=path), whole)
