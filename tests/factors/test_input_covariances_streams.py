"""Input covariances over several calls and in files; what is refused adds nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from input_covariance_cases import Through, equal, gated, sequences
from networks import classes, randn, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import hesskern as hk

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings(
    "ignore:left out:UserWarning", "ignore:Using padding='same' with even:UserWarning"
)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [None, torch.ones(9, dtype=torch.float64)])
def test_a_bad_batch_adds_nothing(value: float, weight: Tensor | None) -> None:
    model, seen = gated(), hk.InputCovariances()
    bad = sequences(seed=1)
    # Only the last layer's input is bad.
    spoilt = gated()
    spoilt.load_state_dict(model.state_dict())
    parts = [sequences(), bad, sequences(seed=2)]

    def spoil(module: nn.Module, args: Any) -> Any:
        return (args[0] * value,) if torch.equal(given[-1], bad) else None

    given: list[Tensor] = []
    spoilt.gate.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    spoilt.pooler.register_forward_pre_hook(spoil)
    with pytest.raises(ValueError, match=r"inputs of layer 'pooler' contain NaN or Inf in batch 1"):
        hk.input_covariances(spoilt, parts, accumulate=seen, sample_weight=weight)
    if weight is not None:
        # Its entries belong to the data as a whole.
        assert seen.num_samples == len(seen) == 0
        return
    equal(seen, hk.input_covariances(model, parts[:1]))


def test_squares_that_overflow_add_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen = hk.input_covariances(model, [torch.ones(3, 2)])
    before = seen["0"].input_covariance
    with pytest.raises(ValueError, match="squared inputs of layer '0' overflow"):
        hk.input_covariances(model, [torch.full((3, 2), 1e19)], accumulate=seen)
    most = torch.finfo(torch.float32).max ** 0.5
    hk.input_covariances(model, [torch.full((1, 2), 0.5 * most)], ["0"])
    assert torch.equal(seen["0"].input_covariance, before)


def test_streams_go_on_merge_and_are_saved(tmp_path: Path) -> None:
    model, parts = gated().float(), [sequences(seed=i).float() for i in range(4)]
    whole = hk.input_covariances(model, parts, bias="joint")
    seen = hk.InputCovariances()
    for part in parts[:2]:
        assert hk.input_covariances(model, [part], bias="joint", accumulate=seen) is seen
    path = tmp_path / "seen.safetensors"
    seen.save(path)
    loaded = hk.load_input_covariances(path)
    equal(loaded, seen)
    assert loaded.skipped == seen.skipped
    assert loaded.settings == seen.settings
    with safe_open(path, framework="pt") as file:
        # Gate and up have one matrix in common.
        assert len(file.keys()) == 2 * 3
    for more in (seen, loaded):
        hk.input_covariances(model, parts[2:], bias="joint", accumulate=more)
        equal(more, whole)
    halves = [hk.input_covariances(model, part, bias="joint") for part in (parts[:2], parts[2:])]
    halves[0].merge(halves[1])
    equal(halves[0], whole, 1e-6)
    assert halves[0]._sums.by_layer["gate"] is halves[0]._sums.by_layer["up"]
    empty = hk.InputCovariances()
    empty.merge(whole)
    equal(empty, whole)
    empty.merge(empty)
    assert empty.num_samples == 2 * whole.num_samples
    assert relative_error(empty["up"].input_covariance, whole["up"].input_covariance) <= 1e-6


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "seen.safetensors"
    hk.input_covariances(gated(), [sequences()]).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["hesskern"])
    tensors["0.inputs"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"hesskern": json.dumps(header)})
    with pytest.raises(ValueError, match=r"tensor '0\.inputs' holds other bits than were written"):
        hk.load_input_covariances(path)
    # Files of earlier versions have no checksums.
    unsealed = {key: value for key, value in header.items() if key not in ("checksums", "header")}
    save_file(tensors, path, metadata={"hesskern": json.dumps(unsealed)})
    with pytest.raises(ValueError, match="damaged: the sums of layer 'gate'"):
        hk.load_input_covariances(path)
    with pytest.raises(FileNotFoundError):
        hk.load_input_covariances(tmp_path / "none")
    hk.kronecker_factors(gated(), [(sequences(), classes(3, c=4))], CE).save(path)
    with pytest.raises(ValueError, match="does not hold hesskern input covariances"):
        hk.load_input_covariances(path)


def test_what_does_not_fit_is_refused() -> None:
    model, x = gated(), sequences()
    seen = hk.input_covariances(model, [x])
    kept = seen["gate"].input_covariance
    with pytest.raises(ValueError, match="bias='joint'"):
        hk.input_covariances(model, [x], bias="joint", accumulate=seen)
    with pytest.raises(ValueError, match="other layers than what was accumulated"):
        hk.input_covariances(model, [x], ["gate"], accumulate=seen)
    with pytest.raises(ValueError, match="other layers"):
        seen.merge(hk.input_covariances(model, [x], ["gate"]))
    with pytest.raises(TypeError, match="other must be"):
        seen.merge(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="accumulate must be"):
        hk.input_covariances(model, [x], accumulate={})  # type: ignore[arg-type]
    assert torch.equal(seen["gate"].input_covariance, kept)
    with pytest.raises(KeyError, match="no input covariance for layer 'nope'"):
        seen["nope"]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data yielded no samples"),
        (torch.zeros(3, 4, 6), TypeError, "data must be an iterable"),
        ([3], TypeError, "batch 0 is a int"),
        ([(1, 2, 3, 4)], TypeError, "batch 0 is a tuple of 4"),
        ([{"x": [[1, 2], [3]]}], TypeError, "return_tensors"),
        ([{"x": torch.zeros(3, 4, 6), "attention_mask": torch.zeros(3, 4)}], ValueError, "padding"),
        ([{"x": torch.zeros(3, 4, 6), "attention_mask": torch.ones(3, 4, 4)}], ValueError, "N, T"),
        ([{"x": torch.zeros(3, 4, 6), "attention_mask": torch.ones(3, 7)}], ValueError, "7 pos"),
        ([(torch.zeros(3, 4, 6), 0, torch.tensor([1.0, -1.0, 1.0]))], ValueError, "non-negative"),
        ([(torch.zeros(3, 4, 6), 0, torch.ones(2))], ValueError, "sample_weight must be"),
    ],
)
def test_bad_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.input_covariances(gated().float(), data)


def test_a_model_that_is_random_is_refused() -> None:
    model = seeded(Through(lambda layer, x: F.dropout(layer(x)))).double()
    with pytest.raises(ValueError, match="draws random numbers"):
        hk.input_covariances(model, [randn(5, 4)])


@pytest.mark.parametrize("rows", [60, 3])
def test_an_interruption_amid_a_batch_is_known(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are added while the model runs, a few once the whole batch is known to be good."""
    seen = hk.input_covariances(gated(), [sequences(rows)])
    before = hk.input_covariances(gated(), [sequences(rows)])
    add, calls = hk.ops.input_covariance_, []

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(*args, **kwargs)

    monkeypatch.setattr(hk.ops, "input_covariance_", interrupted)
    few = torch.randn(1, 1, 6, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        hk.input_covariances(gated(), [sequences(rows) if rows > 3 else few], accumulate=seen)
    if rows > 3:
        equal(seen, before)
        return
    with pytest.raises(RuntimeError, match="interrupted while a batch was being added"):
        seen["gate"]
