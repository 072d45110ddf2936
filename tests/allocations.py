"""Bytes that torch's allocators hand out: the CPU's during a call, and those of a GPU in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


def gpu_with(
    monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, reserved: int, allocated: int
) -> None:
    """What torch says of a GPU's memory, in bytes, whether there is one or not."""
    stats = {
        f"{what}_bytes": {"all": {"current": count}}
        for what, count in (("reserved", reserved), ("allocated", allocated))
    }
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes in use at a time beyond those before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    del result
    held = peak = 0
    events = watched.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
