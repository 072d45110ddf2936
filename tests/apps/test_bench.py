"""The benchmark's machinery on a case that takes no time; nothing here asserts on a time."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from hesskern.apps.bench import cases, command, memory, report, runner, suites
from hesskern.apps.bench.contenders import Contender, Problem, relative_difference
from hesskern.apps.bench.machine import installed_version
from hesskern.apps.bench.results import Group, Row, quartiles
from hesskern.apps.bench.settings import Settings
from hesskern.apps.bench.suites import SUITES, Suite, sum_over
from hesskern.progress import Progress

_QUIET = Settings(quick=True, threads=1, repeats=3, memory=False)


def _silent(description: str, done: int, total: int | None) -> None:
    return None


def _read(value: torch.Tensor) -> torch.Tensor:
    return value


def _failing() -> Any:
    raise RuntimeError("does not take this layer\nand a second line")


def _contenders(ours: float = 1.0, other: float = 1.0) -> list[Contender]:
    return [
        Contender("hesskern", lambda: lambda: torch.full((3,), ours), read=_read),
        Contender("other", lambda: lambda: torch.full((3,), other), read=_read, limit=1e-3),
        Contender("absent", lambda: lambda: None, package="surely-not-a-distribution"),
        Contender("broken", _failing, package="torch"),
        Contender("gradient", lambda: lambda: None, unit=True),
    ]


def _problem(key: str = "tiny", **values: float) -> Problem:
    return Problem(
        "fake",
        key,
        lambda settings, progress: ("Title", "what it is", _contenders(**values)),
        relative_difference,
    )


@pytest.fixture
def group() -> Group:
    return runner.run_problem(_problem(), _QUIET, _silent)


def test_every_contender_has_a_row_and_all_rounds(group: Group) -> None:
    assert [row.name for row in group.rows] == ["hesskern", "other", "absent", "broken"]
    subject, other, absent, broken = group.rows
    assert len(subject.cpu_seconds) == 3
    assert len(subject.seconds) == len(other.seconds) == len(other.ratios) == 3
    assert subject.ratios == [1.0, 1.0, 1.0]
    assert other.ratios == [b / a for a, b in zip(subject.seconds, other.seconds, strict=True)]
    assert absent.note == "not installed"
    assert broken.note == "failed: RuntimeError: does not take this layer"
    assert absent.seconds == broken.seconds == []
    assert group.gradient_seconds is not None


def test_results_are_compared_with_the_subject(group: Group) -> None:
    assert group.rows[0].difference is None
    assert group.rows[1].difference == 0.0
    assert not group.rows[1].disagrees
    off = runner.run_problem(_problem(other=1.01), _QUIET, _silent).rows[1]
    assert off.difference == pytest.approx(0.01, rel=1e-4)
    assert off.disagrees


def test_nan_is_a_disagreement() -> None:
    row = runner.run_problem(_problem(other=math.nan), _QUIET, _silent).rows[1]
    assert row.disagrees


def test_limits_may_depend_on_the_subjects_result() -> None:
    def build(settings: Settings, progress: Progress) -> tuple[str, str, list[Contender]]:
        ours, other, *_ = _contenders(ours=2.0, other=3.0)
        return "t", "d", [ours, replace(other, limit=lambda reference: float(reference[0]))]

    row = runner.run_problem(Problem("fake", "k", build, relative_difference), _QUIET, _silent)
    assert row.rows[1].limit == 2.0
    assert row.rows[1].difference == 0.5


def test_a_reference_is_not_timed_and_the_subject_is_held_against_it() -> None:
    def reference(name: str, value: float, package: str | None = None) -> Contender:
        call = lambda: torch.full((3,), value)  # noqa: E731
        return Contender(name, lambda: call, package, read=_read, reference=True)

    ours, other, *_ = _contenders(ours=1.1)
    listed = [
        replace(ours, limit=1e-3),
        other,
        reference("missing", 3.0, "surely-not-a-distribution"),
        reference("double", 1.0),
    ]
    problem = Problem(
        "fake", "k", lambda settings, progress: ("t", "d", listed), relative_difference
    )
    rows = runner.run_problem(problem, _QUIET, _silent).rows
    assert [row.name for row in rows] == ["hesskern", "other"]
    assert rows[0].difference == pytest.approx(0.1, rel=1e-5)
    assert rows[0].disagrees
    assert rows[1].difference == 0.0


def test_narrow_terminals_keep_names_times_and_notes() -> None:
    rows = [Row("hesskern", [0.2, 0.3], [0.4], 1.0, [1.0], 10**6, note="something to know")]
    group = Group("s", "k", "a title", "d", rows, gradient_seconds=0.1)
    stream = io.StringIO()
    report.show(Console(file=stream, width=60), group)
    lines = stream.getvalue().splitlines()
    assert "over hesskern" in lines[3]
    assert "CPU time" not in lines[3]
    assert "something to know" in lines[4]


def test_an_error_of_ours_is_raised() -> None:
    problem = Problem(
        "fake", "k", lambda settings, progress: ("t", "d", [Contender("hesskern", _failing)])
    )
    with pytest.raises(RuntimeError, match="does not take this layer"):
        runner.run_problem(problem, _QUIET, _silent)


def test_slow_contenders_run_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_CONTENDER_SECONDS", 0.0)
    calls: list[int] = []
    contenders = [Contender("hesskern", lambda: lambda: calls.append(1))]
    once = Problem("fake", "k", lambda settings, progress: ("t", "d", contenders), once=True)
    row = runner.run_problem(once, _QUIET, _silent).rows[0]
    assert len(calls) == len(row.seconds) == len(row.ratios) == 1
    calls.clear()
    often = replace(once, once=False)
    assert len(runner.run_problem(often, _QUIET, _silent).rows[0].seconds) == 1


def test_threads_are_set_for_the_run_and_set_back() -> None:
    before, seen = torch.get_num_threads(), []
    contender = Contender("hesskern", lambda: lambda: seen.append(torch.get_num_threads()))
    problem = Problem("fake", "k", lambda settings, progress: ("t", "d", [contender]))
    runner.run_problem(problem, replace(_QUIET, threads=1), _silent)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_sums_need_every_part(group: Group) -> None:
    group.rows[0].figures["products"] = 7
    total = sum_over("fake", "all", [group, group])
    assert total.rows[0].seconds == [2 * quartiles(group.rows[0].seconds)[1]]
    assert total.rows[0].figures == {"products": 14}
    assert total.rows[0].ratio == 1.0
    assert total.rows[2].seconds == []
    assert total.rows[2].note == "not installed"


def test_tables_leave_out_what_nobody_has() -> None:
    rows = [Row("hesskern", [0.0021], ratios=[1.0]), Row("other", [2.5], ratios=[1190.0])]
    headings, cells = report.columns(Group("s", "k", "t", "d", rows, gradient_seconds=0.001))
    assert headings == ["contender", "median", "gradients", "over hesskern"]
    assert cells == [["hesskern", "2.1 ms", "2.1", "1x"], ["other", "2.5 s", "2500", "1190x"]]
    rows[0].cpu_seconds = [0.004]
    assert report.columns(Group("s", "k", "t", "d", rows))[1][0] == [
        "hesskern",
        "2.1 ms",
        "4 ms",
        "1x",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (0.1, "100 ms"), (99.96e-3, "100 ms"), (4.2e-5, "42 µs"), (3e-9, "3 ns")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_report_files_hold_the_tables(group: Group, tmp_path: Path) -> None:
    group.title = "A <b> | title"
    group.rows[1].limit, group.rows[1].difference = 1e-5, 2e-5
    machine = {
        "cpu": "some CPU",
        "instructions": "AVX2",
        "threads": 1,
        "load": 0.5,
        "torch": "2",
        "blas": "MKL",
        "hesskern": "0",
        "build": {},
        "peers": {"absent": None},
    }
    run = report.result([group], machine, {"quick": True}, "hesskern bench fake", "2000-01-02")
    paths = report.write(run, [group], tmp_path)
    assert [p.name for p in paths] == ["bench.html", "bench.json", "bench.md"]
    page, text, table = (p.read_text() for p in paths)
    assert "A &lt;b&gt; | title" in page
    assert "<b>" not in page
    assert "DISAGREES" in page
    assert "http" not in page
    loaded = json.loads(text)
    assert loaded["groups"][0]["rows"][1]["disagrees"] is True
    assert len(loaded["groups"][0]["rows"][0]["seconds_quartiles"]) == 3
    assert "| absent |" in table
    assert "absent not installed" in table


def test_peak_memory_counts_what_the_contender_allocates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 64 * 2**20
    contenders = [
        Contender("small", lambda: lambda: None),
        Contender("large", lambda: lambda: bytearray(size)),
    ]
    problem = Problem("fake", "tiny", lambda settings, progress: ("t", "d", contenders))
    monkeypatch.setitem(SUITES, "fake", Suite("fake", lambda: [problem]))
    small = memory.measure("fake", "tiny", "small", _QUIET)
    large = memory.measure("fake", "tiny", "large", _QUIET)
    # Linux updates a process's counters every few dozen pages.
    assert 0.95 * size <= large < 1.5 * size
    assert small < size // 2
    with pytest.raises(ValueError, match="no contender 'other'"):
        memory.measure("fake", "tiny", "other", _QUIET)


def test_memory_of_a_process_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.peak_memory("no-such-suite", "k", "c", _QUIET) is None
    assert "no problem 'k' in suite 'no-such-suite'" in capsys.readouterr().err


def test_problems_have_unique_names() -> None:
    for name, suite in SUITES.items():
        keys = [problem.key for problem in suite.problems()]
        assert len(set(keys)) == len(keys)
        for key in keys:
            assert suites.find_problem(name, key).suite == name


@pytest.fixture
def fake_suite(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The suite ``kron`` replaced by two fake problems; the values are what they return."""
    values = {"ours": 1.0, "other": 1.0}
    monkeypatch.setitem(
        SUITES,
        "kron",
        Suite("fake", lambda: [_problem("a", **values), _problem("b", **values)], summed="sum"),
    )
    return values


def test_command_prints_tables_and_writes_files(
    fake_suite: dict[str, float], tmp_path: Path
) -> None:
    words = ["kron", "--repeats", "2", "--threads", "1", "--no-memory", "--output", str(tmp_path)]
    done = CliRunner().invoke(command.bench, [*words, "--json", str(tmp_path / "raw.json")])
    assert done.exit_code == 0, done.output
    assert "not installed" in done.output
    run = json.loads((tmp_path / "raw.json").read_text())
    assert run["format"] == report.FORMAT
    assert [g["key"] for g in run["groups"]] == ["a", "b", "sum"]
    assert run["command"].split()[1:] == [] or "--repeats 2" in run["command"]
    assert run["machine"]["threads"] == 1
    assert run == json.loads((tmp_path / "bench.json").read_text())


def test_command_runs_only_the_problems_asked_for(fake_suite: dict[str, float]) -> None:
    words = ["kron", "--repeats", "1", "--no-memory", "--json", "-", "--only"]
    done = CliRunner().invoke(command.bench, [*words, "[b-z]"])
    assert [g["key"] for g in json.loads(done.stdout)["groups"]] == ["b"]
    done = CliRunner().invoke(command.bench, [*words, "c"])
    assert done.exit_code == 1
    assert "only fits no problem: c; there are a and b" in done.output


def test_command_gives_json_alone_on_standard_output(fake_suite: dict[str, float]) -> None:
    done = CliRunner().invoke(
        command.bench, ["kron", "--repeats", "1", "--no-memory", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["repeats"] == 1
    assert "not installed" in done.stderr


def test_command_fails_where_results_disagree(fake_suite: dict[str, float]) -> None:
    fake_suite["other"] = 2.0
    done = CliRunner().invoke(command.bench, ["kron", "--repeats", "1", "--no-memory"])
    assert done.exit_code == 1
    assert "results differ by more than rounding: other on Title" in done.output


def test_command_names_the_suites_it_knows() -> None:
    done = CliRunner().invoke(command.bench, ["nonsense"])
    assert done.exit_code == 2
    for name in SUITES:
        assert name in done.output


@pytest.mark.parametrize(
    ("suite", "key"),
    [
        ("factors", "mlp-exact"),
        ("factors", "mlp-mc"),
        ("lm", "mc"),
        ("lm", "mc-padded"),
        ("lm", "empirical"),
        ("lm", "empirical-padded"),
        ("lm", "inputs"),
        ("lm", "inputs-padded"),
        ("lm", "inputs-llama"),
        ("ekfac", "gpt2-mc"),
        ("ekfac", "gpt2-empirical"),
        ("ekfac", "gpt2-vocabulary-mc"),
        ("ekfac", "resnet18-mc"),
        ("ekfac", "lenet5-empirical"),
        ("influence", "gpt2-mc"),
        ("influence", "gpt2-empirical"),
        ("solve", "resnet18-1"),
        ("solve", "gpt2-8"),
        ("kron", "mlp"),
        ("kron", "eigenbasis"),
        ("kron", "small-layers"),
        ("kernels", "conv_input_covariance-128x3x32x3"),
        ("kernels", "input_covariance-200"),
        ("kernels", "output_hessian-200"),
        ("kernels", "layer_hessian-10x200"),
    ],
)
def test_contenders_agree_on_small_data(suite: str, key: str) -> None:
    needed = SUITES[suite].needs
    if needed is not None and installed_version(needed) is None:
        pytest.skip(f"{needed} is not installed")
    settings = replace(_QUIET, repeats=1)
    group = runner.run_problem(suites.find_problem(suite, key), settings, _silent)
    assert not [(row.name, row.difference, row.limit) for row in group.rows if row.disagrees]
    assert not [row.note for row in group.rows if row.note.startswith("failed")]
    if key != "gpt2-mc" or suite != "influence":
        # Scores of other drawn targets are other scores.
        assert any(row.difference is not None for row in group.rows[1:])


def test_a_step_of_every_kfac_is_measured() -> None:
    settings = replace(_QUIET, repeats=1)
    group = runner.run_problem(suites.find_problem("kfac-step", "lenet5"), settings, _silent)
    assert not [row.note for row in group.rows if row.note.startswith("failed")]
    assert all(row.seconds for row in group.rows if row.note != "not installed")


def test_synthetic_data_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESSKERN_DATA", str(tmp_path))
    path = tmp_path / "f200x2.safetensors"
    cases.train_f200(_QUIET, path, _silent)
    case = cases.f200(replace(_QUIET, checkpoint=path))
    assert "SYNTHETIC" in case.description
    assert case.inputs.shape == (2048, 1, 28, 28)
    with pytest.raises(ValueError, match="MNIST"):
        cases.f200(replace(_QUIET, checkpoint=path, root=tmp_path))
