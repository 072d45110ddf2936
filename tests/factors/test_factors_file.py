"""The file of Kronecker factors: what it keeps, and what is no such file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CASES, CE, randn, seeded
from torch import nn

import hesskern as hk


@pytest.fixture
def saved(tmp_path: Path) -> tuple[hk.Factors, Path]:
    case = CASES["conv groups"]
    factors = hk.kronecker_factors(case.model(), case.data(), CE, bias="joint", seed=7)
    path = tmp_path / "run.safetensors"
    factors.save(path)
    return factors, path


@pytest.mark.parametrize("name", ["relu", "conv groups", "conv1d", "sequence", "twice", "linear"])
@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(name: str, bias: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    factors = hk.kronecker_factors(
        case.model(dtype), case.data(dtype), CE, bias=bias, output="mc", mc_samples=2, seed=3
    )
    path = tmp_path / "run.safetensors"
    factors.save(path)
    loaded = hk.load_factors(path)
    assert list(loaded) == list(factors)
    assert loaded.num_samples == factors.num_samples
    assert loaded.skipped == factors.skipped
    assert loaded.settings == factors.settings
    for layer, f in factors.items():
        back = loaded[layer]
        for attribute in (
            "name",
            "kind",
            "layer_shape",
            "groups",
            "num_samples",
            "positions",
            "spec",
        ):
            assert getattr(back, attribute) == getattr(f, attribute)
        for attribute in (
            "input_covariance",
            "output_hessian",
            "input_mean",
            "input_mean_direction",
        ):
            assert getattr(back, attribute).dtype == dtype
            assert torch.equal(getattr(back, attribute), getattr(f, attribute))
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_save_and_load_where_shapes_varied(tmp_path: Path) -> None:
    model = seeded(nn.Linear(3, 2))
    data = [(randn(2, t, 3, seed=t), randn(2, t, 2, seed=t)) for t in (3, 5)]
    factors = hk.kronecker_factors(model, data, nn.MSELoss())
    factors.save(str(tmp_path / "run"))
    loaded = hk.load_factors(str(tmp_path / "run"))
    assert loaded[""].input_images is None
    assert torch.equal(loaded[""].input_covariance, factors[""].input_covariance)


def test_saving_over_a_file_replaces_it(saved: tuple[hk.Factors, Path]) -> None:
    _, path = saved
    case = CASES["relu"]
    other = hk.kronecker_factors(case.model(), case.data(), CE)
    other.save(path)
    assert list(hk.load_factors(path)) == list(other)


@pytest.mark.parametrize("stage", ["write", "rename"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_saving_that_fails_leaves_the_old_file_and_nothing_else(
    saved: tuple[hk.Factors, Path],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[BaseException],
) -> None:
    factors, path = saved
    before = path.read_bytes()

    def half(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half")
        raise error("disk full")

    def fail(*args: Any) -> None:
        raise error("disk full")

    if stage == "write":
        monkeypatch.setattr("hesskern.tensor_files.save_file", half)
    else:
        monkeypatch.setattr("hesskern.files.os.replace", fail)
    with pytest.raises(error, match="disk full"):
        factors.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    new = path.with_name("other.safetensors")
    monkeypatch.setattr("hesskern.files.os.replace", fail)
    with pytest.raises(error):
        factors.save(new)
    assert os.listdir(path.parent) == [path.name]


def _header(path: Path, change: Any) -> bytes:
    """The file with its hesskern header changed."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    own = json.loads(header["__metadata__"]["hesskern"])
    header["__metadata__"]["hesskern"] = json.dumps(change(own))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def _without(own: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in own.items() if k != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.read_bytes()[:-100],
        lambda path: path.read_bytes()[:5],
        lambda path: b"",
        lambda path: b"PK\x03\x04" + bytes(200),
        lambda path: _header(path, lambda own: None),
        lambda path: _header(path, lambda own: [1]),
        lambda path: _header(path, lambda own: {**own, "format": "other/1"}),
        lambda path: _header(
            path, lambda own: {k: v for k, v in own.items() if k != "num_samples"}
        ),
        lambda path: _header(path, lambda own: {k: v for k, v in own.items() if k != "skipped"}),
        lambda path: _header(path, lambda own: {**own, "layers": [7]}),
        lambda path: _header(path, lambda own: {**own, "layers": 7}),
        lambda path: _header(path, lambda own: {**own, "layers": [{"spec": {"name": "0"}}]}),
        lambda path: _header(
            path,
            lambda own: {
                **own,
                "layers": [
                    {**layer, "spec": {**layer["spec"], "name": "elsewhere"}}
                    for layer in own["layers"]
                ],
            },
        ),
        lambda path: _header(
            path,
            lambda own: {
                **own,
                "layers": [
                    {**layer, "spec": {**layer["spec"], "outputs": 77}} for layer in own["layers"]
                ],
            },
        ),
    ],
    ids=range(14),
)
def test_damaged_and_foreign_files(saved: tuple[hk.Factors, Path], damage: Any) -> None:
    _, path = saved
    path.write_bytes(damage(path))
    with pytest.raises(ValueError, match=r"path: .*run\.safetensors"):
        hk.load_factors(path)


def test_files_of_other_programs_and_no_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    foreign = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(ValueError, match="does not hold hesskern factors"):
        hk.load_factors(foreign)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.safetensors"):
        hk.load_factors(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        hk.load_factors(tmp_path)


def test_saving_into_a_folder_that_is_not_there(saved: tuple[hk.Factors, Path]) -> None:
    factors, path = saved
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        factors.save(path.parent / "missing" / "run.safetensors")
    assert os.listdir(path.parent) == [path.name]
