"""Has passes killed, in processes of their own, and holds their results against each other."""

from __future__ import annotations

import multiprocessing
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from kills.ways import WAYS

__all__ = ["CHECKPOINT", "Killed", "child", "kill_often", "run"]

# The last is there while the result is written, which is no work of a pass.
CHECKPOINT, RESULT, UNFINISHED = "pass.checkpoint", "result", "unfinished"

# The server imports once what every process needs.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hesskern", "kills.ways", "torch._dynamo"])


@dataclass
class Killed:
    """What came of a way whose passes were killed.

    Attributes:
        kills: processes that were killed before their end.
        results: passes that came to their end, killed or not on the way.
        wrong: those whose result had other bits than that of a pass that was never killed.
        went_on: kills that left a state to go on from.
        in_writes: kills that left a file half written.
        errors: what else was wrong: how processes ended by themselves, and what they left.
    """

    kills: int = 0
    results: int = 0
    wrong: int = 0
    went_on: int = 0
    in_writes: int = 0
    errors: list[str] = field(default_factory=list)


def child(
    way: str, folder: Path, every: float, before: Callable[..., None] | None, *args: Any
) -> None:
    """Makes a pass, which leaves its result in the folder.

    Args:
        way: which.
        folder: of its checkpoint and result.
        every: as ``checkpoint_every``.
        before: called first, with ``args``: it may set what kills this process.
        args: for that.
    """
    # Whoever runs the tests in the background may have it ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    how: dict[str, Any] = {"checkpoint": folder / CHECKPOINT, "checkpoint_every": every}
    if before is not None:
        how.update(before(*args) or {})
    found = WAYS[way](folder, **how)
    (folder / UNFINISHED).write_bytes(found)
    (folder / UNFINISHED).replace(folder / RESULT)


def start(way: str, folder: Path, every: float = 0.0, *before: Any) -> Any:
    """The process of one pass."""
    process = CONTEXT.Process(target=child, args=(way, folder, every, *(before or (None,))))
    process.start()
    return process


def undisturbed(way: str) -> tuple[bytes, float]:
    """The result of a pass that is not killed, and the seconds that its process took."""
    with tempfile.TemporaryDirectory() as name:
        begin = time.monotonic()
        process = start(way, Path(name))
        process.join()
        assert process.exitcode == 0, f"{way} ended with {process.exitcode}"
        return (Path(name) / RESULT).read_bytes(), time.monotonic() - begin


def kill_often(way: str, count: int, seed: int = 0) -> Killed:
    """Kills passes -9 at random moments until ``count`` were killed.

    A pass is killed again and again, and goes on from its checkpoint each time, until it comes to
    its end.
    """
    # The first one also finds files and pages that the others find in memory.
    whole, seconds = min((undisturbed(way) for _ in range(3)), key=lambda found: found[1])
    draws = random.Random(f"{way} {seed}")
    found = Killed()
    while found.kills < count:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            while not (folder / RESULT).exists():
                process = start(way, folder)
                if found.kills < count:
                    # Whatever is at work then.
                    process.join(draws.uniform(0.0, seconds))
                    process.kill()
                process.join()
                if process.exitcode == 0:
                    continue
                if process.exitcode != -9:
                    found.errors.append(f"a process ended with {process.exitcode}")
                    break
                found.kills += 1
                found.went_on += (folder / CHECKPOINT).exists()
                found.in_writes += any(folder.glob(".*.tmp"))
            if (folder / RESULT).exists():
                found.results += 1
                found.wrong += (folder / RESULT).read_bytes() != whole
                # Neither checkpoint nor parts nor anything half written.
                left = [p.name for p in folder.iterdir() if "result" not in p.name]
                left = [name for name in left if name != UNFINISHED]
                found.errors += [f"files were left: {left}"] if left else []
    return found


def run(count: int, seed: int, ways: list[str], out: TextIO) -> bool:
    """Kills every way so often, and tells what came of it; whether all was right."""
    right = True
    for way in ways:
        begin = time.monotonic()
        found = kill_often(way, count, seed)
        good = not found.wrong and not found.errors
        right = right and good
        print(
            f"{way}: {found.kills} kills, {found.went_on} of them behind a state to go on from and "
            f"{found.in_writes} inside a write; {found.results} passes came to their end, "
            f"{found.results - found.wrong} with the bits of one that was never killed; "
            f"{len(found.errors)} other errors; {time.monotonic() - begin:.0f} s",
            file=out,
            flush=True,
        )
        for error in found.errors:
            print(f"  {error}", file=out, flush=True)
    return right
