"""Commands in two processes: one voice, the numbers of one process, errors that both learn of."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import differences
from typed import typed

from hesskern.apps import processes
from hesskern.apps.processes import Place, place
from hesskern.files import write_files
from hesskern.passes.sample_numbers import numbered
from hesskern.zoo import data

ANALYZE = "analyze --model f8x1 --top 5 --limit 101 --epochs 1 --dtype float64".split()
# Six digits are written; eigenpairs are those of residuals within 1e-4, so their values' squares.
CLOSE = 2e-5


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def undrawn(_: Any, result: Any, folder: Path, others: Any) -> list[Path]:
    """A report without its figures, which take most of the time."""
    return write_files(folder, {"result.json": json.dumps(result).encode(), **others})


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("analyzed")
    replaced = {"hesskern.apps.commands:write_report": undrawn}
    one = typed([*ANALYZE, "--output", "one"], folder, ranks=1, replaced=replaced)
    two = typed([*ANALYZE, "--output", "two"], folder, replaced=replaced)
    return folder, one, two


class TestAnalyze:
    def test_it_says_and_writes_once(self, analyzed: Any) -> None:
        folder, (alone,), (first, second) = analyzed
        assert (alone.code, first.code, second.code) == (0, 0, 0), first.err + second.err
        assert first.out.replace("two/", "one/") == alone.out
        assert "Kronecker factors" in first.err
        assert (second.out, second.err) == ("", "")
        assert files(folder / "two") == files(folder / "one") != set()

    def test_the_numbers_are_those_of_one_process(self, analyzed: Any) -> None:
        folder = analyzed[0]
        one, two = (json.loads((folder / k / "result.json").read_text()) for k in ("one", "two"))
        assert two["data"]["samples"] == 101
        # How many products a solver takes hangs on rounding.
        but = "seconds /times /versions matvecs residuals /command"
        assert differences(one, two, but, CLOSE) == []


def fails(original: Any, *arguments: Any, **options: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise ValueError("no such file on this machine")
    return original(*arguments, **options)


def diverges(original: Any, *arguments: Any, **options: Any) -> Any:
    raise ValueError("training diverged in epoch 1")


def interrupts_both(original: Any, *arguments: Any, **options: Any) -> Any:
    """The first process's training: Ctrl-C comes to all processes while the others wait for it."""
    other = Path("pid")
    while not other.exists():
        time.sleep(0.01)
    os.kill(int(other.read_text()), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("not interrupted")


def tells_its_pid(original: Any, *arguments: Any, **options: Any) -> Any:
    # Once: the interrupt must not find a second one half-written.
    if not Path("pid").exists():
        Path("pid.new").write_text(str(os.getpid()))
        os.replace("pid.new", "pid")
    return original(*arguments, **options)


class TestErrors:
    def test_a_wrong_option(self, tmp_path: Path) -> None:
        first, second = typed([*ANALYZE, "--top", "many"], tmp_path)
        assert (first.code, second.code) == (2, 2)
        assert first.err.count("'many' is not a valid integer") == 1
        assert second.err == ""

    def test_one_that_all_have(self, tmp_path: Path) -> None:
        first, second = typed([*ANALYZE, "--data", "mnist", "--root", "missing"], tmp_path)
        assert (first.code, second.code) == (1, 1)
        assert first.err.startswith("Error: MNIST: found no file")
        assert second.err == ""
        assert files(tmp_path) == set()

    def test_one_that_another_process_has(self, tmp_path: Path) -> None:
        found = typed(ANALYZE, tmp_path, replaced={"hesskern.zoo.data:load": fails})
        assert [one.code for one in found] == [1, 1]
        assert found[0].err == (
            "Error: rank 1 of 2 failed in reading the data: ValueError: no such file on this "
            "machine\n"
        )
        assert found[1].err == ""
        assert files(tmp_path) == set()

    def test_one_of_what_the_first_does_for_all(self, tmp_path: Path) -> None:
        found = typed(ANALYZE, tmp_path, replaced={"hesskern.zoo.training:train": diverges})
        assert [one.code for one in found] == [1, 1]
        assert found[0].err.splitlines()[-1] == "Error: training diverged in epoch 1"
        assert found[1].err == ""

    def test_ctrl_c(self, tmp_path: Path) -> None:
        replaced = {
            "hesskern.zoo.training:train": interrupts_both,
            "hesskern.parallel.first:_wait": tells_its_pid,
        }
        found = typed(ANALYZE, tmp_path, replaced=replaced)
        assert [one.code for one in found] == [130, 130]
        assert found[0].err.splitlines()[-1] == "Interrupted; no file was left half-written."
        assert found[1].err == ""
        assert files(tmp_path) == {"pid"}

    def test_the_others_speak_where_the_first_does_not(self, tmp_path: Path) -> None:
        replaced = {"hesskern.apps.processes:_ended": unheard}
        found = typed([*ANALYZE, "--top", "many"], tmp_path, replaced=replaced)
        assert found[1].err.startswith("rank 1 of 2: Usage:")


def unheard(original: Any, here: Place, words: str) -> None:
    processes._SAID = processes.timedelta(seconds=0.2)
    if here.rank > 0:
        original(here, words)


class TestPlaces:
    VARIABLES = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )

    def of(self, monkeypatch: pytest.MonkeyPatch, **given: str) -> Place | None:
        for name in self.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return place()

    def test_of_one_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.of(monkeypatch) is None
        assert self.of(monkeypatch, RANK="3") is None
        assert self.of(monkeypatch, RANK="0", WORLD_SIZE="1") is None

    def test_of_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
        found = self.of(monkeypatch, RANK="5", WORLD_SIZE="8", **there)
        assert found == Place(5, 8, 5, 8)
        local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
        assert self.of(monkeypatch, RANK="5", WORLD_SIZE="8", **there, **local) == Place(5, 8, 1, 4)

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ({"RANK": "8", "WORLD_SIZE": "8"}, r"RANK must be in \[0, WORLD_SIZE\) = \[0, 8\)"),
            ({"RANK": "one", "WORLD_SIZE": "8"}, "RANK must be a whole number, got 'one'"),
            ({"RANK": "0", "WORLD_SIZE": "8"}, "MASTER_ADDR, MASTER_PORT not: start .* torchrun"),
        ],
    )
    def test_that_cannot_be(
        self, given: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ValueError, match=match):
            self.of(monkeypatch, **given)

    @pytest.mark.parametrize(
        ("device", "gpus", "backend", "own"),
        [
            ("cpu", 8, "gloo", None),
            ("cuda", 0, "gloo", None),
            ("cuda", 4, "cpu:gloo,cuda:nccl", 3),
            # More processes than GPUs share them.
            ("cuda", 2, "gloo", 1),
            ("cuda:1", 4, "gloo", None),
        ],
    )
    def test_nccl_where_each_process_has_a_gpu(
        self,
        device: str,
        gpus: int,
        backend: str,
        own: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert processes._backend(Place(7, 8, 3, 4), device) == backend
        assert chosen == ([] if own is None else [own])


@pytest.mark.parametrize(("samples", "ranks"), [(101, 2), (10, 3), (2, 4)])
def test_parts_are_all_samples_once_and_known_by_number(samples: int, ranks: int) -> None:
    digits = data.load("digits", limit=samples)
    seen = []
    for rank in range(ranks):
        for (inputs, targets), known in numbered(digits.part(4, rank, ranks)):
            assert len(inputs) <= 4
            assert known is not None
            rows = torch.from_numpy(known.values)
            assert torch.equal(inputs, digits.inputs[rows])
            assert torch.equal(targets, digits.targets[rows])
            seen += rows.tolist()
    assert seen == list(range(samples))
