"""analyze, reproduce, bench and training: what is wrong is seen first, what was found is kept."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from console import run
from safetensors.torch import load_file, save_file
from torch import nn

from hesskern import files
from hesskern.apps.analyze import analysis, report
from hesskern.apps.analyze.analysis import Settings, analyze
from hesskern.apps.analyze.figures import file_names
from hesskern.apps.bench import memory, runner, suites
from hesskern.apps.bench.contenders import Contender, Problem, relative_difference
from hesskern.apps.bench.settings import Settings as BenchSettings
from hesskern.apps.bench.suites import Suite
from hesskern.apps.reproduce import catalogue, command, lab
from hesskern.apps.reproduce import report as reproduce_report
from hesskern.apps.reproduce.items import Item
from hesskern.apps.reproduce.lab import Lab, Network, Overrides
from hesskern.apps.reproduce.results import Chart, Curve, Outcome
from hesskern.zoo import data, models, training

SMALL = Settings(model="f8x2", top=5, limit=100, epochs=1, seeds=2)
TINY = ["analyze", "--model", "f8x2", "--top", 5, "--limit", 100, "--epochs", 1]
DIGITS = Network("digits", "f8x2")
ONE = Overrides(limit=100, epochs=1, seeds=1, top=5)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the work began")


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


# analyze


def checkpoint(path: Path, model: str = "f8x2") -> Path:
    save_file(models.build(model, (64,), 10).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": ("fc1", "fc9")}, "no module named 'fc9'"),
        ({"tolerance": 1.5}, "tolerance must"),
        ({"recipe": "slow"}, "recipe must be one of quick"),
        ({"checkpoints": (Path("good.safetensors"), Path("missing.safetensors"))}, "missing"),
        (
            {"checkpoints": (Path("good.safetensors"), Path("other.safetensors"))},
            r"other\.safetensors does not fit the model",
        ),
    ],
)
def test_settings_are_tried_before_the_first_model(
    change: dict[str, Any], match: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(here / "good.safetensors")
    checkpoint(here / "other.safetensors", "f9x2")
    monkeypatch.setattr(training, "train", never)
    monkeypatch.setattr(analysis, "_look_at", never)
    with pytest.raises(ValueError, match=match):
        analyze(replace(SMALL, **change))


def test_a_rehearsal_changes_nothing() -> None:
    found = analyze(SMALL).networks[1].model.state_dict()
    digits = data.load("digits", limit=100)
    model = models.build("f8x2", digits.input_shape, 10, 1)
    training.train(model, digits, replace(training.recipe_for("quick", "digits"), epochs=1), 1)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


class Dead(nn.Module):
    """A layer behind which every unit is dead, so that its Hessian is zero."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.dead = nn.Linear(inputs, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, classes)
        nn.init.constant_(self.dead.bias, -1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x.flatten(1)))
        return self.last(h + torch.relu(self.dead(h)))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8), nn.Linear(8, classes)
        self.again = nn.Parameter(torch.zeros(()))
        self.copy = self.again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x.flatten(1)))) + self.copy


def dead(inputs: int, classes: int) -> nn.Module:
    return Dead(inputs, classes)


def tied(inputs: int, classes: int) -> nn.Module:
    return Tied(inputs, classes)


def test_a_dead_layer_is_left_out_with_the_reason(here: Path) -> None:
    options = ["--model", "test_long_commands:dead", "--output", here / "out"]
    outcome = run(*TINY, *options)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((here / "out" / "result.json").read_text())
    assert result["network"]["layers"] == ["first", "last"]
    assert result["network"]["skipped"]["dead"].startswith("has no curvature at these weights")
    assert all(list(model["layers"]) == ["first", "last"] for model in result["models"])


def test_layers_that_one_model_lacks_are_left_out_of_all() -> None:
    entries = [{"layers": {"a": 1, "b": 2}}, {"layers": {"b": 3}}]
    spectra: list[Any] = [{"a": 1, "b": 2}, {"b": 3}]
    analysis._keep_common(entries, spectra, {})
    assert entries == [{"layers": {"b": 2}}, {"layers": {"b": 3}}]
    assert [list(s) for s in spectra] == [["b"], ["b"]]
    with pytest.raises(ValueError, match="no layer has numbers in all models: 'a' is dead"):
        analysis._keep_common(entries, [{"a": 1}, {}], {"a": "is dead"})


def test_tied_weights_are_written(here: Path) -> None:
    outcome = run(*TINY, "--model", "test_long_commands:tied", "--output", here / "out")
    assert outcome.exit_code == 0, outcome.output
    assert {"again", "copy"} <= load_file(here / "out" / "seed0.safetensors").keys()


def test_weights_stay_when_a_later_step_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = training.train

    def second_diverges(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        if arguments[2] == 1:
            raise ValueError("training diverged in epoch 1")
        return train(model, *arguments, **options)

    monkeypatch.setattr(training, "train", second_diverges)
    outcome = run(*TINY)
    assert outcome.exit_code == 1
    assert "Error: training diverged in epoch 1" in outcome.stderr
    assert "The trained weights are in hesskern-report/seed0.safetensors; --checkpoint" in (
        " ".join(outcome.stderr.split())
    )
    monkeypatch.undo()
    monkeypatch.chdir(here)
    kept = here / "hesskern-report" / "seed0.safetensors"
    outcome = run(*TINY, "--checkpoint", kept, "--output", here / "again")
    assert outcome.exit_code == 0, outcome.output


def test_an_error_is_told_even_if_the_weights_cannot_be_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "_keep_common", lambda *_: full_disk())
    monkeypatch.setattr(files, "_write_files", full_disk)
    outcome = run(*TINY)
    assert outcome.exit_code == 1
    assert "The trained weights: hesskern-report cannot be written" in outcome.stderr
    assert "No space left on device" in outcome.stderr.splitlines()[-1]


def test_a_report_that_cannot_be_drawn_leaves_its_numbers(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "render", broken)
    outcome = run(*TINY)
    assert outcome.exit_code == 1
    assert "no fonts" in outcome.stderr
    folder = here / "hesskern-report"
    assert json.loads((folder / "result.json").read_text())["format"] == analysis.FORMAT
    assert sorted(p.name for p in folder.iterdir()) == [
        "result.json", "seed0.safetensors", "seed1.safetensors"
    ]  # fmt: skip


def test_file_names_differ_by_more_than_capitals_and_have_an_end() -> None:
    names = file_names(["fc1", "FC1", "a" * 300, "b" + "a" * 300])
    assert len({name.lower() for name in names.values()}) == 4
    assert max(map(len, names.values())) < 200


# training


def trained(path: Path | None, **options: Any) -> training.History:
    digits = data.load("digits", limit=100)
    model = models.build("f8x2", digits.input_shape, 10, 0)
    recipe = training.Recipe(epochs=3, batch_size=50)
    return training.train(model, digits, recipe, checkpoint=path, **options)


def test_a_checkpoint_that_cannot_be_written_is_seen_first_or_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"checkpoint: folder .* cannot be written"):
        trained(tmp_path / "file" / "state.pt")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.warns(RuntimeWarning, match=r"state\.pt could not be written"):
        history = trained(tmp_path / "state.pt", save_every=0.0)
    assert len(history.loss) == 3
    assert not (tmp_path / "state.pt").exists()


def test_what_is_saved_is_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of an epoch may leave weights that no loss has seen."""
    step, seen = torch.optim.SGD.step, []

    def spoiling(self: Any) -> None:
        seen.append(1)
        step(self)
        if len(seen) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    path = tmp_path / "state.pt"
    with pytest.raises(ValueError, match="diverged in epoch 2: the weights are not finite"):
        trained(path, save_every=0.0)
    state = torch.load(path, weights_only=True)
    assert len(state["loss"]) == 1
    assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())


# reproduce


def item(name: str, does: Any) -> Item:
    return replace(next(iter(catalogue.ITEMS.values())), name=name, networks=(DIGITS,), run=does)


def charted(laboratory: Lab, networks: Any) -> Outcome:
    laboratory.factors(DIGITS, 0)
    curve = Curve("H", [[1.0, 2.0]])
    return Outcome(charts=[Chart("chart", "title", "x", "y", [curve])], numbers={"found": 7})


def arguments(*names: str) -> list[Any]:
    return ["reproduce", *names, "--limit", 100, "--epochs", 1, "--seeds", 1, "--top", 5]


@pytest.fixture
def items(monkeypatch: pytest.MonkeyPatch) -> dict[str, Item]:
    found: dict[str, Item] = {}
    monkeypatch.setattr(command, "ITEMS", found)
    return found


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"profile must be one of quick, paper, .*; got 'fast'"):
        Lab(Path("never"), "fast")


def test_reproduce_sees_first_that_it_cannot_write(here: Path, items: dict[str, Item]) -> None:
    (here / "hesskern-reproduce").write_text("in the way")
    items["one"] = item("one", never)
    outcome = run(*arguments("one"))
    assert outcome.exit_code != 0
    assert "in the way" not in outcome.output
    outcome = run(*arguments("one"), "--output", here / "hesskern-reproduce" / "below")
    assert outcome.exit_code == 1
    assert "cannot be written" in outcome.output


def test_numbers_of_an_item_stay_when_a_figure_fails(
    here: Path, items: dict[str, Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    items["one"] = item("one", charted)
    monkeypatch.setattr(reproduce_report, "draw_chart", lambda chart: 1 / 0)
    outcome = run(*arguments("one"))
    assert outcome.exit_code == 1
    assert "the numbers are in" in outcome.output
    (found,) = (here / "hesskern-reproduce").rglob("one/result.json")
    assert json.loads(found.read_text())["numbers"] == {"found": 7}


def test_an_item_that_breaks_does_not_take_the_others_along(
    here: Path, items: dict[str, Item]
) -> None:
    def breaks(*_: Any) -> Outcome:
        raise KeyError("fc7")

    items["one"], items["two"] = item("one", breaks), item("two", charted)
    outcome = run(*arguments("all"))
    assert outcome.exit_code == 1
    assert "Left out: one (KeyError: 'fc7')" in " ".join(outcome.output.split())
    (page,) = (here / "hesskern-reproduce").rglob("report.html")
    assert "two" in page.read_text()


def test_a_damaged_result_of_another_time_is_left_out_of_the_page(
    here: Path, items: dict[str, Item]
) -> None:
    items["one"], items["two"] = item("one", charted), item("two", charted)
    assert run(*arguments("one")).exit_code == 0
    (old,) = (here / "hesskern-reproduce").rglob("one/result.json")
    old.write_text("{}")
    with pytest.warns(RuntimeWarning, match=r"one/result\.json is left out of the page"):
        outcome = run(*arguments("two"))
    assert outcome.exit_code == 0, outcome.output


def test_caches_that_cannot_be_written_cost_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Lab(tmp_path / "whole", overrides=ONE)
    fit, pairs = whole.training(DIGITS, 0), whole.eigenpairs(DIGITS, 0, "fc1", 3)
    poor = Lab(tmp_path / "poor", overrides=ONE)

    def unwritten(path: Path, write: Any) -> bool:
        warnings.warn(f"{path} could not be written", RuntimeWarning, stacklevel=1)
        return False

    for module in (lab, training):
        monkeypatch.setattr(module, "keep_if_possible", unwritten)
    with pytest.warns(RuntimeWarning, match="could not be written"):
        found = poor.eigenpairs(DIGITS, 0, "fc1", 3)
    assert torch.equal(found.vectors, pairs.vectors)
    assert {**poor.training(DIGITS, 0), "seconds": 0} == {**fit, "seconds": 0}
    assert not [path for path in (tmp_path / "poor").rglob("*") if path.is_file()]
    assert poor.fit(DIGITS, 0)["train_loss"] == fit["train_loss"]


def test_a_fit_that_is_infinite_or_unreadable_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory = Lab(tmp_path, overrides=ONE)
    fit = laboratory.training(DIGITS, 0)
    (path,) = tmp_path.rglob("training.json")
    path.write_text('{"train')
    assert Lab(tmp_path, overrides=ONE).training(DIGITS, 0) == fit
    path.unlink()
    monkeypatch.setattr(training, "evaluate", lambda *_: (math.inf, 0.5))
    again = Lab(tmp_path, overrides=ONE)
    assert again.training(DIGITS, 0)["train_loss"] is None
    row = reproduce_report.describe(again, [DIGITS])[0]
    assert (row["train_loss"], row["train_accuracy"]) == (None, 0.5)


def test_results_that_share_memory_are_kept(tmp_path: Path) -> None:
    block = torch.randn(6, 7)
    pairs = lab.EigenResult(block[0, :3], block[1:, 3:6], block[0, 3:6], True, 9)
    lab._write_pairs(pairs, tmp_path / "pairs.safetensors")
    found = lab._read_pairs(tmp_path / "pairs.safetensors", 3)
    assert found is not None
    assert torch.equal(found.vectors, pairs.vectors)
    assert torch.equal(found.residuals, pairs.residuals)


# bench


def ours() -> Contender:
    return Contender("hesskern", lambda: lambda: torch.ones(3), read=lambda value: value)


def problem(key: str, *others: Contender, build: Any = None) -> Problem:
    made = build or (lambda settings, progress: (key, "what it is", [ours(), *others]))
    return Problem("fake", key, made, relative_difference)


@pytest.fixture
def bench_suite(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    problems: list[Problem] = []
    monkeypatch.setitem(suites.SUITES, "kron", Suite("title", lambda: problems))
    return problems


BENCH = ["bench", "kron", "--quick", "--repeats", 1, "--no-memory"]


@pytest.mark.parametrize("option", ["--json", "--output"])
def test_bench_sees_first_that_it_cannot_write(
    option: str, here: Path, bench_suite: list[Problem]
) -> None:
    (here / "file").write_text("in the way")
    bench_suite.append(problem("one", build=never))
    outcome = run(*BENCH, option, here / "file" / "below")
    assert outcome.exit_code == 1
    assert "cannot be written" in outcome.output


def test_bench_makes_the_folder_of_its_json(here: Path, bench_suite: list[Problem]) -> None:
    bench_suite.append(problem("one"))
    outcome = run(*BENCH, "--json", here / "a" / "b" / "found.json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((here / "a" / "b" / "found.json").read_text())["groups"]


def test_a_difference_that_is_no_number_is_written(here: Path, bench_suite: list[Problem]) -> None:
    other = Contender(
        "other", lambda: lambda: torch.full((3,), math.nan), read=lambda value: value, limit=1e-3
    )
    bench_suite.append(problem("one", other))
    outcome = run(*BENCH, "--json", here / "found.json", "--output", here / "out")
    assert "results differ by more than rounding: other on one" in outcome.output
    row = json.loads((here / "found.json").read_text())["groups"][0]["rows"][1]
    assert row["difference"] is None
    assert row["disagrees"]
    assert json.loads((here / "out" / "bench.json").read_text())["groups"]


def test_what_was_measured_before_an_error_is_kept(here: Path, bench_suite: list[Problem]) -> None:
    def broken(settings: Any, progress: Any) -> Any:
        raise ValueError("no such data")

    bench_suite += [problem("one"), problem("two", build=broken)]
    outcome = run(*BENCH, "--json", here / "found.json")
    assert outcome.exit_code == 1
    assert "what came before it was kept" in outcome.output
    assert "no such data" in outcome.output
    groups = json.loads((here / "found.json").read_text())["groups"]
    assert [group["key"] for group in groups] == ["one"]


@pytest.mark.parametrize("at", ["second call", "block", "figures", "read", "difference"])
def test_a_package_may_fail_at_any_time(at: str) -> None:
    calls: list[int] = []
    limit = {"second call": 1, "block": 2}.get(at, 10**9)

    def call() -> torch.Tensor:
        calls.append(1)
        if len(calls) > limit:
            raise RuntimeError("out of breath")
        return torch.ones(4 if at == "difference" else 3)

    def unreadable(value: Any) -> Any:
        raise RuntimeError("out of breath")

    other = Contender(
        "other",
        lambda: call,
        package="torch",
        read=unreadable if at == "read" else (lambda value: value),
        figures=unreadable if at == "figures" else None,
    )
    settings = BenchSettings(quick=True, threads=1, repeats=2, memory=False)
    found = runner.run_problem(problem("one", other), settings, lambda *_: None)
    assert found.rows[1].note.startswith("failed: RuntimeError: ")
    assert found.rows[0].median is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_memory_that_was_not_told_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finished:
        returncode, stdout, stderr = 0, "", "killed"

    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: Finished)
    settings = BenchSettings(threads=1)
    assert memory.peak_memory("kron", "one", "hesskern", settings) is None
    assert "was not measured: killed" in capsys.readouterr().err
