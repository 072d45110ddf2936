"""Draws of a certificate's error that are interrupted, and gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import blobs
from certify_cases import TERMS, run, same
from resumed import Broken, stopping

from hesskern.checkpoints import facts
from hesskern.pacbayes import evaluate
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.truncated_method import Truncated

# Whole networks, one per pass, and a network of its own for every example.
DRAWS = {
    "networks": replace(TERMS, sampling="networks", passes=7),
    "per example": replace(TERMS, passes=7),
}


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every batch of samples whose errors are counted."""
    found: list[int] = []
    wrong = evaluate.wrong

    def counted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found.append(len(targets))
        return wrong(outputs, targets)

    monkeypatch.setattr(evaluate, "wrong", counted)
    return found


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pass over the samples in several turns.
    monkeypatch.setattr(evaluate, "_CHUNK", 60)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("after", [1, 5, 13, 21])
def test_certify(kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = blobs(), tmp_path / "run.pt"
    turns = 7 * -(-len(data) // 60)
    assert after <= turns
    whole = run(data, protocol=DRAWS[kind])
    how: dict[str, Any] = {"protocol": DRAWS[kind], "checkpoint": path, "checkpoint_every": 0}
    with pytest.raises(Broken):
        run(data, progress=stopping(after, "drawing networks"), **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "run.pt.draws"]
    seen = counting(monkeypatch)
    found = run(data, **how)
    assert len(seen) == turns - after
    assert same(found, whole)
    assert (found.errors, found.q, found.draws) == (whole.errors, whole.q, whole.draws)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def stopped(path: Path, **how: Any) -> None:
    with pytest.raises(Broken):
        run(
            progress=stopping(2, "drawing networks"),
            checkpoint=path,
            checkpoint_every=0,
            **{"protocol": DRAWS["networks"], **how},
        )


def test_draws_of_another_posterior_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    stopped(path)
    draws = tmp_path / "run.pt.draws"
    kept = draws.read_bytes()
    run(checkpoint=path, protocol=DRAWS["networks"])
    path.unlink()
    # Of a run with another seed, which is finished, and beside which these lie.
    stopped(path, seed=1)
    draws.write_bytes(kept)
    with pytest.raises(ValueError, match=r"run.pt.draws' is of another call: layers is"):
        run(checkpoint=path, protocol=DRAWS["networks"], seed=1)
    assert draws.read_bytes() == kept


def test_draws_of_what_was_optimized_further_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    whole = run(protocol=DRAWS["networks"])
    with monkeypatch.context() as patch:
        step, seen = Truncated.step, []

        def interrupted(*given: Any) -> Any:
            seen.append(1)
            if len(seen) > 4:
                raise KeyboardInterrupt
            return step(*given)

        patch.setattr(Truncated, "step", interrupted)
        # Its draws have begun, of the posterior so far.
        stopped(path)
    assert (tmp_path / "run.pt.draws").exists()
    found = run(protocol=DRAWS["networks"], checkpoint=path)
    assert same(found, whole)
    assert found.errors == whole.errors


def test_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    whole = run(protocol=DRAWS["networks"])
    stopped(path)
    monkeypatch.setattr(facts, "__version__", "0.0.1")
    how: dict[str, Any] = {"checkpoint": path, "protocol": DRAWS["networks"]}
    with pytest.raises(ValueError, match=r"run.pt was written elsewhere.*'0.0.1'.*exact_resume"):
        run(**how)
    with pytest.warns(UserWarning, match="written elsewhere") as warned:
        found = run(**how, exact_resume=False)
    assert len([w for w in warned if "written elsewhere" in str(w.message)]) == 2
    assert same(found, whole)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("checkpoint_every", -1, ValueError), ("exact_resume", "yes", TypeError)],
)
def test_arguments(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        run(**{name: value})


def test_draws_that_cannot_be_kept_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(protocol=DRAWS["networks"])

    def full(*given: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hesskern.checkpoints.checkpoint.write", full)
    with pytest.warns(RuntimeWarning, match=r"these draws are not kept") as warned:
        found = run(protocol=DRAWS["networks"], checkpoint=tmp_path / "run.pt", checkpoint_every=0)
    assert len(warned) == 1
    assert same(found, whole)


def test_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = blobs(), tmp_path / "verifying"
    found = run(data)

    def verify(**how: Any) -> None:
        found.verify(data, passes=5, checkpoint=path, checkpoint_every=0, **how)

    with pytest.raises(Broken):
        verify(progress=stopping(4, "verifying"))
    assert path.exists()
    with pytest.raises(ValueError, match="of another call: seed is"):
        verify(seed=9)
    other = Samples(data.inputs.flip(0), data.targets.flip(0))
    with pytest.raises(ValueError, match="of another call: inputs is"):
        found.verify(other, passes=5, checkpoint=path)
    seen = counting(monkeypatch)
    verify()
    assert len(seen) == 5 * -(-len(data) // 60) - 4
    assert list(tmp_path.iterdir()) == []
