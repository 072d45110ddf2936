"""Accumulators with sums in files: copies, other places, forked processes, other devices."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, classes, randn, seeded
from played_device import generators, played
from same_factors import assert_same
from torch import Tensor, nn

import hesskern as hk
from hesskern.spill import rooms
from hesskern.spill.raw_files import aligned_memory
from hesskern.spill.rooms import Room


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go, which have no names."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 5)))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, 9, seed=i), classes(n, c=5, seed=i)) for i, n in enumerate((4, 1, 3, 5))]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("way", [pickled, copy.deepcopy])
@pytest.mark.parametrize("options", [{}, {"diagonal": True, "max_outputs": 6, "decay": 0.7}])
def test_a_copy_goes_on_by_itself(
    way: Callable[[Any], Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = batches()
    spilled = hk.FactorAccumulator(mlp(), CE, spill="disk", bias="joint", **options)
    plain = hk.FactorAccumulator(mlp(), CE, bias="joint", **options)
    for accumulator in (spilled, plain):
        accumulator.update(*first)
    made: list[int] = []
    mapped = rooms._mapped

    def noted(*given: Any) -> Tensor:
        found = mapped(*given)
        made.append(found.nbytes)
        return found

    monkeypatch.setattr(rooms, "_mapped", noted)
    copied = way(spilled)
    # Its sums are in files, too.
    assert sum(made) >= 2 * 9 * 9 * 4
    kept = spilled.factors()
    for accumulator in (copied, plain):
        accumulator.consume(rest)
    assert_same(copied.factors(), plain.factors())
    assert_same(spilled.factors(), kept)


@pytest.mark.parametrize("place", [None, "cpu", "disk"])
@pytest.mark.parametrize("other_place", [None, "cpu", "disk"])
def test_sums_in_other_places_are_merged(place: Any, other_place: Any) -> None:
    device = played()
    data = batches()
    with generators():
        there = mlp().to(device)
        want = hk.kronecker_factors(mlp(), data, CE)
        # The last one takes layers over that it has not had.
        for own in (data[:2], []):
            one = hk.FactorAccumulator(there, CE, spill=place)
            other = hk.FactorAccumulator(there, CE, spill=other_place)
            one.consume(own)
            other.consume(data[len(own) :])
            one.merge(other)
            # Of which tensors of the host come.
            seen = hk.FactorAccumulator(there, CE, spill="disk")
            seen.load_state_dict(one.state_dict())
            assert_same(seen.factors(), want, 1e-12)
            home = "cpu" if place else device.type
            assert {sums.device.type for sums in one._sums.values()} == {home}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_leaves_the_sums_alone(folder: Path) -> None:
    data = batches()
    accumulator = hk.FactorAccumulator(mlp(), CE, spill="disk")
    empty = hk.FactorAccumulator(mlp(), CE, spill="disk")
    accumulator.consume(data[:2])
    state = accumulator.state_dict()
    told = _forked(
        folder / "told",
        {
            "consume": lambda: accumulator.consume(data[2:]),
            "merge": lambda: empty.merge(accumulator),
            "factors": accumulator.factors,
            "state_dict": accumulator.state_dict,
            # Autograd may have threads here, which a forked process cannot go on with.
            "load_state_dict": lambda: accumulator.load_state_dict(state),
            "then": accumulator.factors,
            "an empty one": lambda: empty.merge(accumulator),
        },
    )
    refused = (
        f"spill='disk': the sums of this accumulator lie in files of process {os.getpid()}, from "
    )
    for what in ("consume", "merge", "factors", "state_dict"):
        assert told[what].startswith(refused), (what, told[what])
    assert [told[what] for what in ("load_state_dict", "then", "an empty one")] == [""] * 3
    accumulator.consume(data[2:])
    assert_same(accumulator.factors(), hk.kronecker_factors(mlp(), data, CE))


def _forked(path: Path, calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Messages of what calls raise in a forked process, "" where nothing is."""
    process = os.fork()
    if process == 0:
        told = {}
        for name, call in calls.items():
            try:
                call()
                told[name] = ""
            except Exception as error:
                told[name] = str(error)
        path.write_bytes(pickle.dumps(told))
        os._exit(0)
    os.waitpid(process, 0)
    found = pickle.loads(path.read_bytes())
    assert isinstance(found, dict)
    return found


def test_the_default_device_does_not_matter() -> None:
    host = torch.device("cpu")
    with torch.device("meta"):
        made = [aligned_memory(5), Room("cpu", host).zeros([3], torch.float32)]
        made += [Room("disk", host).zeros(shape, torch.float32) for shape in ([3], [0])]
    assert [tensor.device for tensor in made] == [host] * 4
