"""hesskern analyze and influence go on from where an interruption left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from console import run

from hesskern.files import write_files

INFLUENCE = ["influence", "--model", "f8x1", "--epochs", 2, "--limit", 200, "--queries", 3]
ANALYZE = ["analyze", "--model", "f8x1", "--epochs", 1, "--limit", 700, "--seeds", 1, "--top", 2]


@pytest.fixture(autouse=True)
def _numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pages, which take most of the time, and are of no interest here."""
    for command in ("analyze", "influence"):
        monkeypatch.setattr(
            f"hesskern.apps.{command}.report.drawn_or_kept",
            lambda folder, numbers, draw: write_files(folder, numbers),
        )


def told(monkeypatch: pytest.MonkeyPatch, stop: str | None = None) -> list[str]:
    """What a command's progress is told; interrupts it where that begins so."""
    heard: list[str] = []

    def progress(description: str, done: int, total: int | None) -> None:
        heard.append(description)
        if stop is not None and stop in description:
            raise KeyboardInterrupt

    monkeypatch.setattr("hesskern.apps.command_line.reporter", lambda shown: progress)
    return heard


def test_influence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*INFLUENCE, "--output", "whole").exit_code == 0
    told(monkeypatch, stop="Eigenvalue corrections")
    outcome = run(*INFLUENCE, "--resume")
    assert outcome.exit_code == 130, outcome.output
    names = {path.name for path in (here / "hesskern-influence/resume").iterdir()}
    assert names == {"training.checkpoint", "curvature.checkpoint", "curvature.checkpoint.part0"}
    heard = told(monkeypatch)
    outcome = run(*INFLUENCE, "--resume")
    assert outcome.exit_code == 0, outcome.output
    # Neither is trained again nor passed again what was.
    assert not [what for what in heard if "training" in what or "Kronecker" in what]
    assert any("Eigenvalue corrections" in what for what in heard)
    for name in ("scores.safetensors", "seed0.safetensors"):
        whole = (here / "whole" / name).read_bytes()
        assert (here / "hesskern-influence" / name).read_bytes() == whole
    assert not (here / "hesskern-influence/resume").exists()


def numbers(folder: Path) -> Any:
    found = json.loads((folder / "result.json").read_text())
    return [entry["layers"] for entry in found["models"]]


def test_analyze(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    due = "hesskern.checkpoints.checkpoint.Checkpoint.due"
    monkeypatch.setattr(due, property(lambda checkpoint: True))
    assert run(*ANALYZE, "--output", "whole").exit_code == 0
    for stop in ("Layer Hessians", "Kronecker factors"):
        # Behind the first batch of two; a rehearsal's progress is not told.
        told(monkeypatch, stop=stop)
        outcome = run(*ANALYZE, "--output", stop, "--resume")
        assert outcome.exit_code == 130, outcome.output
        states = {path.name for path in (here / stop / "resume").glob("*.checkpoint")}
        assert len(states) == 2
        heard = told(monkeypatch)
        outcome = run(*ANALYZE, "--output", stop, "--resume")
        assert outcome.exit_code == 0, outcome.output
        assert not [what for what in heard if "training" in what]
        assert numbers(here / stop) == numbers(here / "whole")
        assert not (here / stop / "resume").exists()
