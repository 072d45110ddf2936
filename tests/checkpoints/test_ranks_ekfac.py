"""EKFAC of two ranks that end in different passes, and go on together."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Between, classes, randn, seeded
from processes import outcomes, run
from torch.utils.data import DataLoader, TensorDataset

import hesskern as hk
from hesskern import files
from hesskern.checkpoints import checkpoint, file
from hesskern.factors import eigenbases

# Of each rank.
BATCHES = 4, 3


class Seen(list[str]):
    """The passes that batches were run through the model in."""

    def __call__(self, description: str, done: int, total: int | None) -> None:
        self.append(description)


def data(rank: int, shuffled: bool) -> Any:
    if not shuffled:
        return [
            (randn(3, 4, seed=10 * rank + i, dtype=torch.float32), classes(3, c=3, seed=rank + i))
            for i in range(BATCHES[rank])
        ]
    x = randn(3 * BATCHES[rank], 4, seed=rank, dtype=torch.float32)
    torch.manual_seed(rank)
    return DataLoader(TensorDataset(x, classes(len(x), c=3, seed=rank)), batch_size=3, shuffle=True)


def ends_at(rename: int, folder: Path, rank: int) -> None:
    """Kills this process before its rename of that number; not before the other has come as far."""
    real, calls = os.replace, 0

    def counting(*args: Any, **given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == rename:
            (folder / f"there {rank}").touch()
            while not (folder / f"there {1 - rank}").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **given)

    files.os.replace = counting


def both(group: Any, folder: Path, renames: tuple[int, int] | None, how: dict[str, Any]) -> Any:
    """The bits of the result, how often matrices were decomposed, and the passes that ran."""
    rank, seen, given = group.rank(), Seen(), dict(how)
    if renames:
        ends_at(renames[rank], folder, rank)
    batches = data(rank, given.pop("shuffled", False))
    model = seeded(Between(torch.relu)).float()
    calls, decompose = [0], eigenbases.eigenpairs

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return decompose(*args)

    eigenbases.eigenpairs = counted
    if given.pop("factors", False):
        given["factors"] = hk.kronecker_factors(model, data(0, False), CE)
    E = hk.ekfac(model, batches, CE, group=group, progress=seen, **given)
    E.save(folder / f"result{rank}")
    return (folder / f"result{rank}").read_bytes(), calls[0], seen


# Renames of a rank: one behind every batch and one at the end of the first pass, two of the second
# pass's first state (its eigenvectors, and what names them), and one behind every batch.
FIRST = 4 + 1, 3 + 1
PASSES = ("Kronecker factors", "Eigenvalue corrections")
MOMENTS: dict[str, tuple[tuple[int, int], tuple[str | None, str], dict[str, Any]]] = {
    "one ahead": ((FIRST[0] + 2 + 3, FIRST[1] + 1), (PASSES[1], PASSES[0]), {}),
    "the other": ((FIRST[0] + 2, FIRST[1] + 4), (PASSES[0], PASSES[1]), {"output": "exact"}),
    "shuffled": ((FIRST[0] + 1, FIRST[1] + 4), (PASSES[0], PASSES[1]), {"shuffled": True}),
    "given factors": ((1, 4), (None, PASSES[1]), {"factors": True}),
}


def stage(path: Path) -> Any:
    return file.read(path)[0]["stage"] if path.exists() else None


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_bits_of_two_ranks_in_different_passes(moment: str, tmp_path: Path) -> None:
    renames, stages, how = MOMENTS[moment]
    whole = [bits for bits, *_ in run(both, 2, tmp_path, None, how)]
    assert whole[0] == whole[1]
    kept = {**how, "checkpoint": tmp_path / "both.checkpoint"}
    for outcome in outcomes(both, 2, tmp_path, renames, {**kept, "checkpoint_every": 0}):
        assert outcome.exitcode == -signal.SIGKILL, outcome.trace
    assert tuple(stage(tmp_path / f"both.rank{r}of2.checkpoint") for r in (0, 1)) == stages
    again = run(both, 2, tmp_path, None, kept)
    assert [bits for bits, *_ in again] == whole
    # Nothing is decomposed again, and no batch of the first pass run again.
    assert [calls for _, calls, _ in again] == [0, 0]
    assert {name for *_, seen in again for name in seen} <= {"Eigenvalue corrections"}
    assert not list(tmp_path.glob("both*"))


def at_the_end(group: Any, folder: Path, killed: bool) -> Any:
    """Rank 1 may end when all is done, and its file still there."""
    if killed and group.rank() == 1:
        checkpoint.Checkpoint.remove = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    how = {"checkpoint": folder / "both.checkpoint", "checkpoint_every": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = both(group, folder, None, how)
    return found[0], [str(w.message) for w in caught if "begin anew" in str(w.message)]


def test_a_rank_without_a_file_has_all_begin_anew(tmp_path: Path) -> None:
    whole = outcomes(at_the_end, 2, tmp_path, True)
    assert whole[1].exitcode == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.glob("*.checkpoint"))] == ["both.rank1of2.checkpoint"]
    again = run(at_the_end, 2, tmp_path, False)
    for bits, messages in again:
        assert bits == whole[0].value[0]
        assert messages == [
            "checkpoint: there is none of rank 0, while rank 1 was in the second pass; all begin "
            "anew"
        ]


def test_files_of_different_calls(tmp_path: Path) -> None:
    end = FIRST[0] + 3, FIRST[1] + 3
    for name, shuffled in (("a", False), ("b", True)):
        folder = tmp_path / name
        folder.mkdir()
        how = {"checkpoint": folder / "both.checkpoint", "checkpoint_every": 0}
        outcomes(both, 2, folder, end, {**how, "shuffled": shuffled})
    for path in (tmp_path / "b").glob("both.rank1of2*"):
        path.replace(tmp_path / "a" / path.name)
    how = {"checkpoint": tmp_path / "a" / "both.checkpoint", "shuffled": False}
    for outcome in outcomes(both, 2, tmp_path / "a", None, how):
        assert "those of rank 0 and rank 1 hold other eigenvectors" in outcome.message
