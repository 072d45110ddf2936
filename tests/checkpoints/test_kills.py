"""Processes that end by a signal in the middle of a pass; another one goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills.runner import CHECKPOINT, RESULT, start, undisturbed
from networks import CE, Between, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor

import hesskern as hk
from hesskern import files
from hesskern.checkpoints import file


def ended(number: int) -> None:
    """Ends this process by a signal, at once."""
    os.kill(os.getpid(), number)


def at_call(holder: Any, name: str, number: int, signaled: int, half: bool = False) -> None:
    """Has a function end the process at its call of that number; with half of its work done."""
    real, calls = getattr(holder, name), [0]

    def counting(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            if half:
                real(*args, **settings)
                with open(args[0], "r+b") as opened:
                    opened.truncate(os.path.getsize(args[0]) // 2)
            ended(signaled)
        return real(*args, **settings)

    setattr(holder, name, counting)


def renaming(number: int, signaled: int = signal.SIGKILL) -> None:
    """Ends the process when a file is complete, and before it takes its place."""
    at_call(files.os, "replace", number, signaled)


def writing(number: int, signaled: int = signal.SIGKILL) -> None:
    """Ends the process when half of a file is written."""
    at_call(file, "write_tensors", number, signaled, half=True)


def at_work(description: str, batch: int) -> dict[str, Any]:
    """Ends the process behind a batch."""

    def progress(what: str, done: int, total: int | None) -> None:
        if what == description and done == batch:
            ended(signal.SIGKILL)

    return {"progress": progress}


# Where each way's process ends: of ekfac between the eigenvectors' file and the one that names it.
MOMENTS: dict[str, tuple[Any, ...]] = {
    "factors": (writing, 9),
    "ekfac": (renaming, 12),
    "influence": (at_work, "Influence: samples", 9),
    "layer_hessians": (renaming, 9),
}


@pytest.mark.parametrize("way", MOMENTS)
def test_killed(way: str, tmp_path: Path) -> None:
    whole, _ = undisturbed(way)
    process = start(way, tmp_path, 0.0, *MOMENTS[way])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / CHECKPOINT).exists()
    # What it had begun to write is of no use to anybody.
    assert bool(list(tmp_path.glob(".*.tmp"))) == (way != "influence")
    process = start(way, tmp_path, 60.0)
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / RESULT).read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} <= {RESULT, "result-file"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "ctrl-c"])
@pytest.mark.parametrize("moment", [writing, renaming])
def test_other_signals_inside_a_write(
    number: int, moment: Callable[..., None], tmp_path: Path
) -> None:
    process = start("factors", tmp_path, 0.0, moment, 3, number)
    process.join()
    # Python turns one into an exception, and takes away what was half written.
    interrupted = number == signal.SIGINT
    assert process.exitcode == (1 if interrupted else -number)
    assert bool(list(tmp_path.glob(".*.tmp"))) == (not interrupted)
    process = start("factors", tmp_path, 60.0)
    process.join()
    assert (tmp_path / RESULT).read_bytes() == undisturbed("factors")[0]


def part(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Of two ranks one has five batches, the other three."""
    return [
        (randn(3, 4, seed=10 * rank + i, dtype=torch.float32), classes(3, c=3, seed=10 * rank + i))
        for i in range(5 - 2 * rank)
    ]


def together(
    group: Any, folder: Path, killed: int | None, batch: int, bad: bool = False
) -> tuple[bytes, list[int]]:
    """Factors of both ranks' parts; a rank may end before one of its batches, or find it bad."""
    rank, seen = group.rank(), []
    inputs = part(rank)

    def given() -> Any:
        for i, (x, y) in enumerate(inputs):
            if rank == killed and i == batch and not bad:
                ended(signal.SIGKILL)
            yield (x * torch.nan if rank == killed and i == batch else x), y

    net = seeded(Between(torch.relu)).float()
    net.register_forward_pre_hook(
        lambda module, args: seen.extend(i for i, (x, _) in enumerate(inputs) if x is args[0])
    )
    how = {} if batch < 0 else {"checkpoint": folder / "both.checkpoint", "checkpoint_every": 0}
    found = hk.kronecker_factors(net, given(), CE, output="mc", group=group, **how)
    path = folder / f"result{rank}"
    found.save(path)
    return path.read_bytes(), sorted(set(seen))


@pytest.mark.parametrize(("killed", "batch"), [(1, 2), (0, 4)])
def test_one_of_two_ranks_is_killed(killed: int, batch: int, tmp_path: Path) -> None:
    whole = [result for result, _ in run(together, 2, tmp_path, None, -1)]
    assert whole[0] == whole[1]
    failed = outcomes(together, 2, tmp_path, killed, batch, timeout=5.0)
    assert failed[killed].exitcode == -signal.SIGKILL
    assert f"rank {killed} of 2" in failed[1 - killed].message
    names = {path.name for path in tmp_path.glob("*.checkpoint")}
    assert names == {"both.rank0of2.checkpoint", "both.rank1of2.checkpoint"}
    again = run(together, 2, tmp_path, None, batch)
    assert [result for result, _ in again] == whole
    # The one that was killed goes on; the other, which had waited for it, has nothing left to do.
    assert again[killed][1] == list(range(batch, 5 - 2 * killed))
    assert again[1 - killed][1] == []
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_what_one_of_two_ranks_cannot_go_on_with(tmp_path: Path) -> None:
    whole = [result for result, _ in run(together, 2, tmp_path, None, -1)]
    failed = outcomes(together, 2, tmp_path, 1, 2, True, timeout=5.0)
    assert "NaN" in failed[1].message
    assert "rank 1 of 2 failed" in failed[0].message
    files = {path: path.read_bytes() for path in tmp_path.glob("both.rank*")}
    assert len(files) == 2
    torn = tmp_path / "both.rank1of2.checkpoint"
    torn.write_bytes(files[torn][:-1])
    failed = outcomes(together, 2, tmp_path, None, 2, timeout=5.0)
    assert f"'{torn}' is not a readable checkpoint" in failed[1].message
    assert "rank 1 of 2 failed" in failed[0].message
    assert f"'{torn}' is not a readable checkpoint" in failed[0].message
    torn.write_bytes(files[torn])
    # What was there before is there still.
    assert {path: path.read_bytes() for path in files} == files
    again = run(together, 2, tmp_path, None, 2)
    assert [result for result, _ in again] == whole
    assert [seen for _, seen in again] == [[], [2]]
