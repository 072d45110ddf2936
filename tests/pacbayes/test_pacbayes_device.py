"""Certificates on a device that the CPU plays, with steps that are recorded and repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import FAST, NET, blobs
from console import run
from played_device import counting, generators, played
from torch import Tensor

from hesskern.pacbayes import (
    METHODS,
    Protocol,
    PublishedSettings,
    certify,
    load_certificate,
    recorded,
)
from hesskern.pacbayes.problem import Problem
from hesskern.pacbayes.published_methods import Published
from hesskern.pacbayes.recorded import Recorded
from hesskern.pacbayes.slots import slots_of, state_of
from hesskern.pacbayes.truncated_method import Truncated

TERMS = Protocol(passes=3)
SHARED = Protocol(passes=3, form="langford-seeger", shared_variance=True)


@pytest.fixture(autouse=True)
def made() -> Iterator[None]:
    played()
    with generators():
        yield


def certified(device: str, method: str = "truncated", **options: Any) -> Any:
    ours = method == "truncated"
    model = NET.build((1, 3, 4), 3).to(device)
    given = {
        "epochs": 6,
        "protocol": TERMS if ours else SHARED,
        "settings": FAST if ours else PublishedSettings(batch_size=50, rate=0.03),
        **options,
    }
    return certify(model, model, blobs().to(torch.device(device)), method, **given)


class _Again:
    """Plays a graph: runs the function again on the tensors that were recorded with it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._function, self._inputs = function, inputs
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self._function(*self._inputs))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[_Again]:
    """Recordings on the played device."""
    made: list[_Again] = []

    def record(self: Recorded, function: Any, inputs: tuple[Tensor, ...]) -> Any:
        own = tuple(tensor.clone() for tensor in inputs)
        graph = _Again(function, own)
        # A recording runs nothing: what it returns means nothing before it is repeated.
        graph.result = torch.full((2,), torch.nan, dtype=torch.float64, device=own[0].device)
        made.append(graph)
        return recorded._Recording(graph, own, graph.result)  # type: ignore[arg-type]

    begin = Recorded.__init__

    def usable(self: Recorded, *arguments: Any) -> None:
        begin(self, *arguments)
        self._usable = True

    monkeypatch.setattr(Recorded, "__init__", usable)
    monkeypatch.setattr(Recorded, "_record", record)
    monkeypatch.setattr(Recorded, "_beside", staticmethod(lambda f, inputs: f(*inputs)))
    return made


@pytest.mark.parametrize("method", ["truncated", *METHODS])
def test_the_certificate_is_nearly_the_cpus(method: str, tmp_path: Path) -> None:
    found, expected = certified("played", method), certified("cpu", method)
    assert found.bound == pytest.approx(expected.bound, rel=1e-3)
    assert found.kl == pytest.approx(expected.kl, rel=1e-2)
    assert found.fingerprint == expected.fingerprint
    found.save(tmp_path / "c.safetensors")
    for device in ("cpu", "played"):
        load_certificate(tmp_path / "c.safetensors").verify(
            blobs().to(torch.device(device)), passes=2
        )


def test_a_certificate_is_verified_where_the_data_are() -> None:
    for made, data in (("played", "cpu"), ("cpu", "played")):
        certified(made, epochs=1).verify(blobs().to(torch.device(data)), passes=1)


def test_an_unfinished_run_stays_on_its_device(tmp_path: Path) -> None:
    certified("cpu", epochs=1, checkpoint=tmp_path / "run.pt", checkpoint_every=0)
    with pytest.raises(ValueError, match="belongs to another run: its device is None"):
        certified("played", epochs=1, checkpoint=tmp_path / "run.pt", checkpoint_every=0)


def test_recorded_steps_are_the_steps(
    graphs: list[_Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(FAST, refreshes=(0.5,))
    found = certified("played", epochs=20, settings=settings)
    # Warm; not warm, before new bases and behind them; in the average.
    assert len(graphs) == 4
    assert all(graph.replays >= 2 for graph in graphs)
    monkeypatch.setattr(Recorded, "__init__", lambda self, *_: setattr(self, "_usable", False))
    plain = certified("played", epochs=20, settings=settings)
    assert found.bound == plain.bound
    assert found.kl == plain.kl
    assert found.history == plain.history


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("method", ["truncated", "base", "iter"])
def test_an_interrupted_run_goes_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = certified("played", method)
    path = tmp_path / "unfinished.pt"
    kind: Any = Truncated if method == "truncated" else Published
    step, taken = kind.step, 0

    def stop(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 11:
            raise SystemExit
        return step(*arguments)

    monkeypatch.setattr(kind, "step", stop)
    with pytest.raises(SystemExit):
        certified("played", method, checkpoint=path, checkpoint_every=0)
    monkeypatch.setattr(kind, "step", step)
    assert path.exists()
    resumed = certified("played", method, checkpoint=path, checkpoint_every=0)
    assert resumed.bound == whole.bound
    assert resumed.kl == whole.kl
    assert len(resumed.history) == 6


def truncated(device: torch.device) -> Truncated:
    samples = blobs(600).to(device)
    model = NET.build((1, 3, 4), 3).to(device)
    state = state_of(model)
    noise = torch.Generator(device=device).manual_seed(0)
    slots = slots_of(model, samples.inputs[:2])
    return Truncated(Problem(model, slots, state, state, samples, TERMS), FAST, noise)


def test_a_step_asks_for_nothing_but_every_tenth() -> None:
    device = played()
    method = truncated(device)
    rows = torch.arange(50).to(device)
    for fraction in (0.1, 0.5, 0.5):
        method.step(rows, fraction)
    with counting() as counts:
        for fraction in (0.1, *[0.5] * 20, *[0.9] * 10):
            method.step(rows, fraction)
    assert counts.reads <= 3, counts.asked
    assert counts.launches <= 31 * 330


def test_nothing_comes_from_the_host_within_a_recording(graphs: list[_Again]) -> None:
    method = truncated(played())
    rows = torch.arange(50).to(played())
    for fraction in (*[0.1] * 4, *[0.5] * 6, *[0.9] * 5):
        method.step(rows, fraction)
    assert len(graphs) == 3
    for graph in graphs:
        with counting(strict=True) as counts:
            graph.replay()
        # Where the result goes is on the device.
        assert counts.uploads == 0
        assert counts.reads == 0


@pytest.mark.parametrize("command", ["certify", "reproduce", "analyze"])
def test_a_device_that_is_not_there(command: str, here: Path) -> None:
    item = ["rank-one"] if command == "reproduce" else []
    outcome = run(command, *item, "--device", "warp")
    assert outcome.exit_code == 1
    assert "device 'warp' cannot be used here" in outcome.output


def test_commands_on_a_device(here: Path) -> None:
    few = ["--epochs", 1, "--device", "played"]
    outcome = run("certify", "--net", "T-6_10", "--passes", 1, *few, "--output", here / "c")
    assert outcome.exit_code == 0, outcome.output
    path = here / "c/seed0.safetensors"
    for device in ("cpu", "played"):
        outcome = run("certify", "--verify", path, "--passes", 1, "--device", device)
        assert outcome.exit_code == 0, outcome.output
    small = ["--data", "digits", "--model", "f8x2", "--limit", 100, "--seeds", 2, "--top", 3]
    outcome = run("analyze", *small, *few, "--output", here / "a")
    assert outcome.exit_code == 0, outcome.output
    items = ["rank-one", "overlap-f200x2", "correspondence"]
    outcome = run("reproduce", *items, *small, *few, "--output", here / "r")
    assert outcome.exit_code == 0, outcome.output
