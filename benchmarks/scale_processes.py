"""Factors on 1, 2 and 4 gloo processes of this machine: strong and weak scaling, overhead."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scale_tables import table
from torch import nn

import hesskern as hk
from hesskern.apps.bench.machine import facts

__all__ = ["processes"]

SIZES = (1, 2, 4)
SAMPLES, BATCH = 8192, 512


def processes(repeats: int, samples: int = SAMPLES) -> str:
    """A table; every process computes with one thread.

    Strong: ``samples`` shared by all. Weak: as many for each. CPU: processor time of all processes
    together, which other work on the machine changes little; alone: of the same calls without the
    group.
    """
    rows, alone = [], 0.0
    for size in SIZES:
        strong, weak = (_measured(size, n, repeats) for n in (samples // size, samples))
        alone = alone or strong.seconds
        rows.append(
            [
                str(size),
                f"{1e3 * strong.seconds:,.0f}",
                f"{alone / strong.seconds:.2f}x",
                f"{1e3 * strong.cpu:,.0f}",
                f"{1e3 * strong.cpu_alone:,.0f}",
                f"{1e3 * weak.seconds:,.0f}",
                f"{100 * alone / weak.seconds:.0f} %",
                f"{1e3 * weak.cpu:,.0f}",
                f"{1e3 * weak.cpu_alone:,.0f}",
            ]
        )
    headings = ("ms", "speed-up", "CPU, ms", "alone", "weak: ms", "efficiency", "CPU, ms", "alone")
    cpu, load = facts(1)["cpu"], os.getloadavg()[0]
    about = f"{cpu}; load average at the end {load:.2f}"
    return f"{table(['processes, strong:', *headings], rows)}\n\n{about}"


@dataclass(frozen=True)
class _Times:
    """Medians over the rounds.

    Attributes:
        seconds: of a call, the slowest process's.
        cpu: processor seconds of all processes.
        cpu_alone: the same, without a group.
    """

    seconds: float
    cpu: float
    cpu_alone: float


def _measured(size: int, samples: int, repeats: int) -> _Times:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "store")
        with context.Pool(size) as pool:
            given = [(rank, size, place, samples, repeats) for rank in range(size)]
            found = pool.starmap(_child, given, chunksize=1)
    rounds = list(zip(*found, strict=True))
    median = statistics.median
    return _Times(
        median(max(each[0] for each in processes) for processes in rounds),
        median(sum(each[1] for each in processes) for processes in rounds),
        median(sum(each[2] for each in processes) for processes in rounds),
    )


def _child(
    rank: int, size: int, place: str, samples: int, repeats: int
) -> list[tuple[float, float, float]]:
    """Of every round: seconds and processor seconds in the group, and those without it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(place, size), rank=rank, world_size=size)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )
    torch.manual_seed(rank)
    inputs, targets = torch.randn(samples, 784), torch.randint(10, (samples,))
    data = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    rounds = []
    for _ in range(repeats + 1):
        seconds, cpu = _timed(model, data, dist.group.WORLD)
        rounds.append((seconds, cpu, _timed(model, data, None)[1]))
    dist.destroy_process_group()
    # The first warms up.
    return rounds[1:]


def _timed(model: nn.Module, data: Any, group: Any) -> tuple[float, float]:
    dist.barrier()
    started, before = time.perf_counter(), time.process_time()
    hk.kronecker_factors(model, data, nn.CrossEntropyLoss(), group=group)
    return time.perf_counter() - started, time.process_time() - before
