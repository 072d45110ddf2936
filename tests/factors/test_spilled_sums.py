"""Sums of factors away from their device: memory below the factors', nothing lost, nothing left."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from networks import CE, classes, randn, seeded
from played_device import OnDevice, generators, played
from resumed import bits, broken_off
from same_factors import assert_same
from torch import Tensor, nn

import hesskern as hk
from hesskern.factors.layer_sums import SumMemory
from hesskern.spill import rooms
from hesskern.spill.rooms import Room


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go, which have no names."""
    folder = tmp_path / "spilled"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def mlp(width: int = 9, depth: int = 3) -> nn.Module:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return seeded(nn.Sequential(*layers, nn.Linear(width, 3)))


def batches(width: int = 9, sizes: tuple[int, ...] = (4, 1, 3, 5)) -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, width, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate(sizes)]


def nbytes(factors: hk.Factors) -> int:
    return sum(f.input_covariance.nbytes + f.output_hessian.nbytes for f in factors.values())


def test_memory_is_below_the_factors(tmp_path: Path) -> None:
    model, data = mlp(200, 12), [(randn(4, 200), classes(4, c=3))] * 3
    # What the first pass of all takes once.
    hk.kronecker_factors(model, data, CE)
    found: list[hk.Factors] = []

    def call(spill: Any) -> None:
        found.append(hk.kronecker_factors(model, data, CE, spill=spill))

    inside, outside = peak_bytes(lambda: call(None)), peak_bytes(lambda: call("disk"))
    whole = nbytes(found[0])
    assert inside > whole
    # Nothing of a layer's size but its rows.
    assert outside < whole / 12
    assert peak_bytes(lambda: found[1].save(tmp_path / "file")) < whole / 12
    assert_same(hk.load_factors(tmp_path / "file"), found[0])


_LIMITED = """
import resource, sys
import torch
from torch import nn
import hesskern as hk

def call(width, depth, spill):
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    data = [(torch.randn(16, width), torch.arange(16) % 10)] * 3
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    options = {"output": "mc", "spill": spill}
    return lambda: hk.kronecker_factors(model, data, nn.CrossEntropyLoss(), **options)

call(4, 1, None)()
then = call(1500, 12, "disk" if sys.argv[1] == "disk" else None)
lines = open("/proc/self/status").read().splitlines()
own = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
allowed = own + 12 * 4 * 1500**2
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
then().save(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of private memory are Linux's")
def test_a_process_that_may_have_half_of_it(tmp_path: Path) -> None:
    """Memory of files is none of the process's own; the result is saved within the limit, too."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    for place, code in (("disk", 0), ("memory", 1)):
        command = [sys.executable, "-c", _LIMITED, place, str(tmp_path / place)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert "allocate" in done.stderr
    assert len(hk.load_factors(tmp_path / "disk")) == 13


def test_update_merge_and_go_on(folder: Path) -> None:
    data = batches()
    plain, spilled = (
        hk.FactorAccumulator(mlp(), CE, bias="joint", decay=0.7, spill=spill)
        for spill in (None, "disk")
    )
    for accumulator in (plain, spilled):
        accumulator.update(*data[0], sample_weight=torch.rand(4, generator=_random()))
        accumulator.consume(data[1:3])
    assert_same(spilled.factors(), plain.factors())
    # Neither result nor a state of before changes with what follows.
    before, state = spilled.factors(), spilled.state_dict()
    kept = bits(before, folder)
    copied, pickled = copy.deepcopy(spilled.state_dict()), pickle.dumps(state)
    for accumulator in (plain, spilled):
        accumulator.update(*data[3])
    assert_same(spilled.factors(), plain.factors())
    assert bits(before, folder) == kept
    for again in (copied, pickle.loads(pickled), state):
        other = hk.FactorAccumulator(mlp(), CE, bias="joint", decay=0.7, spill="disk")
        other.load_state_dict(again)
        assert_same(other.factors(), before)
        other.update(*data[3])
        assert_same(other.factors(), plain.factors())
    for accumulator in (plain, spilled):
        accumulator.merge(other)
    assert_same(spilled.factors(), plain.factors())


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_batch_that_fails_leaves_what_was_there() -> None:
    data = batches()
    bad = (torch.full((2, 9), torch.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    accumulator = hk.FactorAccumulator(mlp(), CE, spill="disk")
    accumulator.consume(data[:2])
    with pytest.raises(ValueError, match="NaN"):
        accumulator.consume([data[2], bad])
    assert_same(accumulator.factors(), hk.kronecker_factors(mlp(), data[:3], CE))
    with pytest.raises(ValueError, match="sample_weight"):
        accumulator.consume(data, sample_weight=torch.ones(7))
    assert_same(accumulator.factors(), hk.kronecker_factors(mlp(), data[:3], CE))


@pytest.mark.parametrize("before", [None, "disk"])
def test_a_checkpoint(before: Any, tmp_path: Path) -> None:
    def call(spill: Any, **more: Any) -> hk.Factors:
        return hk.kronecker_factors(mlp(), batches(), CE, spill=spill, **more)

    path = tmp_path / "checkpoint"
    broken_off(lambda **more: call(before, **more), path, after=2)
    found = call("disk", checkpoint=path)
    assert bits(found, tmp_path) == bits(call(None), tmp_path)
    assert not path.exists()


def test_a_checkpoint_takes_no_copy(tmp_path: Path) -> None:
    model, data = mlp(200, 12), [(randn(4, 200), classes(4, c=3))] * 3
    found = hk.kronecker_factors(model, data, CE)
    more: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every": 0}

    def call() -> hk.Factors:
        return hk.kronecker_factors(model, data, CE, spill="disk", **more)

    assert peak_bytes(call) < nbytes(found) / 3


def test_no_file_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    mapped = rooms._mapped

    def noted(*given: Any) -> Tensor:
        made.append(mapped(*given))
        return made[-1]

    monkeypatch.setattr(rooms, "_mapped", noted)
    hk.kronecker_factors(
        mlp(),
        batches(),
        CE,
        spill="disk",
        progress=lambda *_: made.append(torch.tensor(len(list(folder.glob("hesskern-spill-*"))))),
    )
    assert not any(int(count) for count in made if count.dim() == 0)
    assert sum(tensor.dim() > 0 for tensor in made) > 8


@pytest.mark.parametrize("way", ["set aside", "unknown to the system", "refused"])
def test_a_full_disk_is_named(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = hk.FactorAccumulator(mlp(), CE, spill="disk")
    accumulator.consume(batches()[:2])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refused(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patched:
        if way == "set aside":
            patched.setattr(os, "posix_fallocate", full)
        else:
            patched.setattr(os, "write", full)
            if way == "refused":
                patched.setattr(os, "posix_fallocate", refused)
            else:
                patched.delattr(os, "posix_fallocate")
        with pytest.raises(OSError, match=rf"spill: .* \d+ bytes in {folder} \(set TMPDIR.*space"):
            accumulator.consume(batches()[2:])
    assert not list(folder.glob("hesskern-spill-*"))
    accumulator.consume(batches()[2:])
    assert_same(accumulator.factors(), hk.kronecker_factors(mlp(), batches(), CE))


def test_without_room_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(rooms, "_ZEROS", 100)
    found = hk.kronecker_factors(mlp(), batches(), CE, spill="disk")
    assert_same(found, hk.kronecker_factors(mlp(), batches(), CE))


@pytest.mark.parametrize("spill", ["cpu", "disk"])
@pytest.mark.parametrize("options", [{}, {"bias": "joint", "memory_budget": 0}])
def test_of_a_device(spill: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device = played()
    data, there = batches(), mlp().to(device)
    made: set[str] = set()
    zeros = SumMemory.zeros

    def noted(self: SumMemory, layouts: Any) -> Any:
        found = zeros(self, layouts)
        made.update(piece.device.type for piece in found.pieces)
        return found

    monkeypatch.setattr(SumMemory, "zeros", noted)
    with generators():
        want = hk.kronecker_factors(mlp(), data, CE, **options)
        made.clear()
        found = hk.kronecker_factors(there, data, CE, spill=spill, **options)
        assert made == {"cpu"}
        assert not any(isinstance(f.input_covariance, OnDevice) for f in found.values())
        assert_same(found, want, 1e-12)
        accumulator = hk.FactorAccumulator(there, CE, decay=0.5, spill=spill)
        plain = hk.FactorAccumulator(mlp(), CE, decay=0.5)
        for x, y in data:
            accumulator.update(x, y)
            plain.update(x, y)
        assert_same(accumulator.factors(), plain.factors(), 1e-12)
        bad = (torch.full((2, 9), torch.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match="NaN"):
            accumulator.update(*bad)
        assert_same(accumulator.factors(), plain.factors(), 1e-12)


def test_bad_arguments() -> None:
    for call in (hk.kronecker_factors, hk.FactorAccumulator):
        given: list[Any] = [mlp(), batches()] if call is hk.kronecker_factors else [mlp()]
        with pytest.raises(ValueError, match="spill must be None, 'cpu' or 'disk', got 'tape'"):
            call(*given, loss=CE, spill="tape")
        with pytest.raises(ValueError, match="spill='cpu' takes sums from a GPU to the host"):
            call(*given, loss=CE, spill="cpu")


def test_rooms() -> None:
    host = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        for shape in ((), (0, 3), (5,), (2, 3, 4)):
            made = Room("disk", host).zeros(shape, dtype)
            assert made.dtype == dtype
            assert made.shape == shape
            assert not made.any()
            given = torch.randn(shape, dtype=dtype)
            assert torch.equal(Room("disk", host).copied(given), given)
            assert made.is_contiguous()


def test_more_bytes_than_an_int_counts(folder: Path) -> None:
    """The file is set aside and a few of its pages are touched alone."""
    if shutil.disk_usage(folder).free < 2**32:
        pytest.skip("4 GiB of free disk are needed")
    made = Room("disk", torch.device("cpu")).zeros((2, 2**14, 2**14 + 1), torch.float32)
    assert made.nbytes > 2**31
    made[-1, -1, -1] = 7
    made[0, 0, 0] = 5
    assert float(made[-1, -1, -1]) == 7
    assert float(made.as_strided((1,), (1,), made.numel() - 1)) == 7
    assert float(made[0, 0, 0]) == 5
