"""ekfac goes on from its checkpoint, in its first pass and in its second."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Between, ResidualConv, classes, randn, seeded
from resumed import Broken, Seen, bits, broken_off, stopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesskern as hk
from hesskern.factors import second_pass

BATCHES = 4
STAGES = ("Kronecker factors", "Eigenvalue corrections")


def batches(*shape: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [
        (randn(3, *shape, seed=i, dtype=dtype), classes(3, c=3, seed=i)) for i in range(BATCHES)
    ]


def model(kind: Callable[[], nn.Module] | None = None) -> nn.Module:
    return seeded(Between(torch.relu) if kind is None else kind()).float()


def grouped() -> nn.Module:
    flat = nn.Flatten()
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), flat, nn.Linear(16, 3))


CASES: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "drawn": lambda: (model(), batches(4), {"seed": 3}),
    "exact in float64": lambda: (
        model().double(),
        batches(4, dtype=torch.float64),
        {"output": "exact", "bias": "joint"},
    ),
    "images": lambda: (model(ResidualConv), batches(2, 4, 4), {}),
    "groups": lambda: (model(grouped), batches(2, 3, 3), {"precision": "float64"}),
    "weights": lambda: (model(), batches(4), {"sample_weight": randn(12).abs()}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [2, BATCHES])
def test_bits(case: str, stage: str, after: int, tmp_path: Path) -> None:
    net, data, settings = CASES[case]()
    call = partial(hk.ekfac, net, data, CE, **settings)
    whole = bits(call(), tmp_path)
    path = tmp_path / "pass.checkpoint"
    broken_off(call, path, after, stage)
    seen = Seen()
    assert bits(call(checkpoint=path, progress=seen), tmp_path) == whole
    rest = [(stage, done) for done in range(after + 1, BATCHES + 1)]
    if stage == STAGES[0]:
        rest += [(STAGES[1], done) for done in range(1, BATCHES + 1)]
    assert seen == rest
    # Nor the file with the eigenvectors.
    assert [p.name for p in tmp_path.iterdir()] == ["bits.safetensors"]


def test_eigenvectors_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    call = partial(hk.ekfac, net, data, CE)
    whole = bits(call(), tmp_path)
    # Before the first batch of the second pass is through.
    with pytest.raises(Broken):
        call(checkpoint=path, checkpoint_every=1e9, progress=stopping(1, STAGES[1]))

    def refused(*args: Any) -> Any:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(second_pass, "eigenbases", refused)
    assert bits(call(checkpoint=path), tmp_path) == whole


def test_given_factors(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    factors = hk.kronecker_factors(net, data, CE)
    call = partial(hk.ekfac, net, data, CE, factors=factors)
    broken_off(call, path, 2)
    others = hk.kronecker_factors(net, data[:2], CE)
    with pytest.raises(ValueError, match="of another call: factors is"):
        hk.ekfac(net, data, CE, factors=others, checkpoint=path)
    with pytest.raises(ValueError, match=r"of another call: .*factors is"):
        hk.ekfac(net, data, CE, checkpoint=path)
    # Other ones with the same numbers are the same.
    factors.save(tmp_path / "factors")
    call = partial(hk.ekfac, net, data, CE, factors=hk.load_factors(tmp_path / "factors"))
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


def test_a_shuffling_loader_in_both_passes(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"
    x, y = randn(10, 4, dtype=torch.float32), classes(10, c=3)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)

    def call(seed: int, **how: Any) -> hk.EKFAC:
        torch.manual_seed(seed)
        return hk.ekfac(net, loader, CE, **how)

    whole = bits(call(0), tmp_path)
    for stage in STAGES:
        broken_off(partial(call, 0), path, 2, stage)
        assert bits(call(1, checkpoint=path), tmp_path) == whole


def test_between_the_passes_of_a_shuffling_loader(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"
    x, y = randn(10, 4, dtype=torch.float32), classes(10, c=3)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)

    def call(seed: int, **how: Any) -> hk.EKFAC:
        torch.manual_seed(seed)
        return hk.ekfac(net, loader, CE, output="exact", **how)

    whole = bits(call(0), tmp_path)
    with pytest.raises(Broken):
        call(0, checkpoint=path, checkpoint_every=1e9, progress=stopping(1, STAGES[1]))
    assert bits(call(1, checkpoint=path), tmp_path) == whole


def test_the_file_of_eigenvectors_is_one_of_the_checkpoint(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    call = partial(hk.ekfac, net, data, CE)
    broken_off(call, path, 2, STAGES[1])
    (part,) = tmp_path.glob("pass.checkpoint.part*")
    whole = part.read_bytes()
    part.unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint: there is no file '{part}'"):
        call(checkpoint=path)
    changed = bytearray(whole)
    changed[-1] ^= 1
    part.write_bytes(changed)
    with pytest.raises(ValueError, match=f"'{part}' is damaged"):
        call(checkpoint=path)
    # One of another call, though in order itself.
    other = tmp_path / "other"
    broken_off(partial(hk.ekfac, net, data, CE, seed=1), other, 2, STAGES[1])
    part.write_bytes(next(tmp_path.glob("other.part*")).read_bytes())
    with pytest.raises(ValueError, match="is not the one that was written beside its checkpoint"):
        call(checkpoint=path)
    part.write_bytes(whole)
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


def test_what_is_left_out_is_said_again(tmp_path: Path) -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 3), nn.Linear(3, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x))

    net, path = model(WithHead), tmp_path / "pass.checkpoint"
    call = partial(hk.ekfac, net, batches(4), CE, max_outputs=4)
    with pytest.warns(UserWarning, match="left out: 'head'") as first:
        whole = bits(call(), tmp_path)
    with pytest.warns(UserWarning, match="left out: 'head'"):
        broken_off(call, path, 2, STAGES[1])
    with pytest.warns(UserWarning, match="left out: 'head'") as again:
        assert bits(call(checkpoint=path), tmp_path) == whole
    assert [str(w.message) for w in again] == [str(w.message) for w in first]
    assert [w.filename for w in again] == [w.filename for w in first]


def test_layers_by_name(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    call = partial(hk.ekfac, net, data, CE, layers="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = bits(call(), tmp_path)
        broken_off(call, path, 2, STAGES[1])
        assert bits(call(checkpoint=path), tmp_path) == whole


def test_header(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    broken_off(partial(hk.ekfac, net, data, CE), path, 2, STAGES[1])
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["hesskern"])
    assert header["format"] == "hesskern.checkpoint/1"
    assert header["call"] == "ekfac"
    assert header["stage"] == STAGES[1]
    assert header["environment"]["threads"] == torch.get_num_threads()
    assert header["environment"]["torch"] == torch.__version__
    tensors = list(net.state_dict())
    assert [name for name, *_ in header["model"]][: len(tensors)] == tensors
    assert all(f"state/state/pass/values/{name}" in header["checksums"] for name in ("a", "b"))
