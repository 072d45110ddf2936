"""A product over samples in files, beside reading them alone and computing in memory.

``python benchmarks/spill.py [--samples N] [--width D] [--folder DIR] [--rounds R]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import hesskern as hk


def forget(folder: Path) -> None:
    """Has the system let go of what it keeps of the files, so that they are read anew."""
    for path in folder.glob("*/*.samples"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(folder: Path) -> int:
    """Reads all files, into memory that is used again."""
    buffer, total = bytearray(2**25), 0
    for path in sorted(folder.glob("*/*.samples")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Where files go.  [default: $TMPDIR]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spill-", dir=options.folder) as folder:
        tempfile.tempdir = folder
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Prints the times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(options.width, 32), nn.ReLU(), nn.Linear(32, 4))
    data = [
        (torch.randn(n, options.width), torch.arange(n) % 4)
        for n in [1000] * (options.samples // 1000)
    ]
    loss = nn.CrossEntropyLoss()
    inside = hk.layer_hessians(model, data, loss, layers="0")["0"]
    outside = hk.layer_hessians(model, data, loss, layers="0", memory_budget=0, spill="disk")["0"]
    v = torch.randn(inside.shape[0], options.columns)
    inside @ v, outside @ v
    times: dict[str, list[float]] = {"memory": [], "reading": [], "spilled": [], "cached": []}
    for _ in range(options.rounds):
        times["memory"].append(seconds(lambda: inside @ v))
        forget(folder)
        times["reading"].append(seconds(lambda: read(folder)))
        forget(folder)
        times["spilled"].append(seconds(lambda: outside @ v))
        read(folder)
        times["cached"].append(seconds(lambda: outside @ v))
    found = {name: statistics.median(values) for name, values in times.items()}
    print(f"{read(folder) / 2**20:.0f} MiB in files")
    for name, value in found.items():
        print(f"{name:8} {value:.3f} s (least {min(times[name]):.3f})")
    for how, of in (("medians", statistics.median), ("least", min)):
        slowest = max(of(times["memory"]), of(times["reading"]))
        print(f"ratio of {how}: {of(times['spilled']) / slowest:.2f}")


if __name__ == "__main__":
    main()
