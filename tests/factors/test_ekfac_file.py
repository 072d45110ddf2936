"""The file of an EKFAC, and what is refused: other models' factors, bad numbers, bad files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CASES, CE, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk


@pytest.fixture
def saved(tmp_path: Path) -> tuple[hk.EKFAC, Path]:
    case = CASES["conv groups"]
    E = hk.ekfac(case.model(), case.data(), CE, bias="joint", seed=7)
    path = tmp_path / "run.safetensors"
    E.save(path)
    return E, path


@pytest.mark.parametrize("name", ["relu", "conv groups", "conv1d", "sequence", "twice", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    E = hk.ekfac(case.model(dtype), case.data(dtype), CE, bias="joint", mc_samples=2, seed=3)
    E.save(tmp_path / "run")
    loaded = hk.load_ekfac(tmp_path / "run")
    assert list(loaded) == list(E)
    assert repr(loaded) == repr(E)
    for attribute in ("num_samples", "skipped", "settings", "specs"):
        assert getattr(loaded, attribute) == getattr(E, attribute)
    for layer, found in E.items():
        back = loaded[layer]
        assert back.dtype == dtype
        assert (back.groups, back.transposed) == (found.groups, found.transposed)
        for ours, theirs in zip(found.eigenbases, back.eigenbases, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        vector = randn(found.shape[0], dtype=dtype)
        assert torch.equal(found @ vector, back @ vector)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("stage", ["write", "rename"])
def test_saving_that_fails_leaves_the_old_file_and_nothing_else(
    saved: tuple[hk.EKFAC, Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    E, path = saved
    before = path.read_bytes()

    def half(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    if stage == "write":
        monkeypatch.setattr("hesskern.tensor_files.save_file", half)
    else:
        monkeypatch.setattr("hesskern.files.os.replace", fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        E.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def _changed(path: Path, **changes: Any) -> bytes:
    """The file with entries of its hesskern header changed, and without the checksums if unsaid."""
    changes = {"checksums": None, "header": None, **changes}
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    own = {**json.loads(header["__metadata__"]["hesskern"]), **changes}
    header["__metadata__"]["hesskern"] = json.dumps({k: v for k, v in own.items() if v is not None})
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def _with_spec(path: Path, **changes: Any) -> bytes:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    own = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["hesskern"])
    return _changed(path, layers=[{**spec, **changes} for spec in own["layers"]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.read_bytes()[:-100], "is not a readable EKFAC file"),
        (lambda path: path.read_bytes()[:5], "is not a readable EKFAC file"),
        (lambda path: b"", "is not a readable EKFAC file"),
        (
            lambda path: _changed(path, format="hesskern.ekfac/2"),
            "was written by a newer version of hesskern .*'hesskern.ekfac/2'.*'hesskern.ekfac/1'",
        ),
        (lambda path: _changed(path, format="other/1"), "does not hold an EKFAC, but .* 'other/1'"),
        (
            lambda path: _changed(path, header="another", checksums={}),
            "is damaged: its header is not what was written",
        ),
        (lambda path: _changed(path, format=None), "does not hold an EKFAC"),
        (lambda path: _changed(path, num_samples=None), "is not a readable EKFAC file"),
        (lambda path: _changed(path, layers=[7]), "is not a readable EKFAC file"),
        (lambda path: _with_spec(path, name="elsewhere"), "is not a readable EKFAC file"),
        (lambda path: _with_spec(path, outputs=77), "is damaged: .* of layer '0' is"),
        (lambda path: _with_spec(path, groups=1), "is damaged: .* of layer '0' is"),
    ],
)
def test_damaged_and_foreign_files(saved: tuple[hk.EKFAC, Path], damage: Any, message: str) -> None:
    _, path = saved
    path.write_bytes(damage(path))
    with pytest.raises(ValueError, match=f"path: .*run.safetensors.*{message}"):
        hk.load_ekfac(path)


def test_factors_are_no_ekfac(tmp_path: Path) -> None:
    case = CASES["relu"]
    factors = hk.kronecker_factors(case.model(), case.data(), CE)
    factors.save(tmp_path / "factors")
    with pytest.raises(ValueError, match="does not hold an EKFAC, but is of format 'hesskern"):
        hk.load_ekfac(tmp_path / "factors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        hk.load_ekfac(tmp_path / "nothing")


def _factors(name: str, **given: Any) -> hk.Factors:
    case = CASES[name]
    return hk.kronecker_factors(case.model(), case.data(), CE, **given)


def _with_nan(factors: hk.Factors, which: str) -> hk.Factors:
    getattr(factors["2"], which)[0, 0] = torch.nan
    return factors


MISFITS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other names": (
        {"factors": lambda: _factors("residual")},
        ValueError,
        "factors must be those of this model, which has no layer 'stem'; its layers are 0, 2, 4",
    ),
    "another shape": (
        {"factors": lambda: _factors("batch norm")},
        ValueError,
        r"layer '0' is linear \(m, d\) = \(5, 4\) in them, linear \(m, d\) = \(6, 4\) in the model",
    ),
    "another kind": (
        {"factors": lambda: _factors("conv groups")},
        ValueError,
        "layer '0' is conv .* groups 2 in them, linear .* in the model",
    ),
    "another bias": (
        {"factors": lambda: _factors("relu"), "bias": "joint"},
        ValueError,
        "bias is 'joint', but the factors were made with bias='none'",
    ),
    "not factors": ({"factors": lambda: {}}, TypeError, "factors must be Factors, .* got dict"),
    "a layer without": (
        {"factors": lambda: _factors("relu", layers=["2"]), "layers": ["0"]},
        ValueError,
        "layers: there are no factors of '0'",
    ),
    "NaN in a factor": (
        {"factors": lambda: _with_nan(_factors("relu"), "input_covariance")},
        ValueError,
        "the input covariance of layer '2' holds NaN or Inf",
    ),
    "NaN in the other": (
        {"factors": lambda: _with_nan(_factors("relu"), "output_hessian")},
        ValueError,
        "the output Hessian of layer '2' holds NaN or Inf",
    ),
    "precision": ({"precision": "half"}, ValueError, "precision must be 'float32' or 'float64'"),
    "output": ({"output": "sampled"}, ValueError, "output must be 'exact', 'mc' or 'empirical'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(name: str) -> None:
    given, error, message = MISFITS[name]
    given = {k: v() if callable(v) else v for k, v in given.items()}
    case = CASES["relu"]
    with pytest.raises(error, match=message):
        hk.ekfac(case.model(), case.data(), CE, **given)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_data_that_are_not_finite_in_the_second_pass(value: float) -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    factors = hk.kronecker_factors(model, data, CE)
    data[1][0][2, 1] = value
    before = [parameter.clone() for parameter in model.parameters()]
    what = "squared gradients" if value == 1e200 else "inputs"
    with pytest.raises(ValueError, match=f"{what} of layer '[024]' contain NaN or Inf in batch 1"):
        hk.ekfac(model, data, CE, output="empirical", factors=factors)
    assert all(map(torch.equal, model.parameters(), before))


class Small(nn.Module):
    """A model on a device with room for so many samples at a time."""

    def __init__(self, inner: nn.Module, room: int) -> None:
        super().__init__()
        self.inner, self.room = inner, room

    def forward(self, x: Tensor) -> Any:
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return self.inner(x)


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
def test_batches_in_halves(output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = seeded(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)))
    data = [(randn(n, 3, seed=n), classes(n, c=4, seed=n)) for n in (4, 7, 5)]
    weights = randn(16).abs()
    given: dict[str, Any] = {"output": output, "sample_weight": weights, "seed": 2}
    found = hk.ekfac(Small(inner, 4), data, CE, **given)
    expected = hk.ekfac(inner, data, CE, **given)
    for name, layer in expected.items():
        torch.testing.assert_close(found[f"inner.{name}"].values, layer.values)
    with pytest.raises(torch.OutOfMemoryError, match="smaller batches"):
        hk.ekfac(Small(inner, 2), data, CE, **given)
    # What is added before memory runs out is taken back.
    from hesskern.factors import corrections

    rows, calls = corrections.Corrections._add_rows, []

    def add(self: Any, *args: Any) -> None:
        rows(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(corrections.Corrections, "_add_rows", add)
    again = hk.ekfac(inner, data, CE, **given)
    assert len(calls) > 2
    for name, layer in expected.items():
        torch.testing.assert_close(again[name].values, layer.values)
