"""Files of influence scores: everything comes back, and what is none of them is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, classes, randn, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hesskern as hk


def scored(**options: Any) -> hk.Influence:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    train = [(randn(6, 4, seed=1), classes(6, c=3)), (randn(3, 4, seed=2), classes(3, c=3))]
    queries = [(randn(2, 4, seed=3), classes(2, c=3))]
    factors = hk.kronecker_factors(model, train, CE)
    return hk.influence(factors, model, queries, train, CE, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"per_layer": True}, {"per_token": True}, {"top": 4}, {"query_rank": 1}],
    ids=str,
)
def test_it_comes_back(tmp_path: Path, options: dict[str, Any]) -> None:
    found = scored(**options)
    found.save(tmp_path / "scores.safetensors")
    back = hk.load_influence(tmp_path / "scores.safetensors")
    assert back.packed() == found.packed()
    assert type(back.scores) is type(found.scores)
    assert (back.num_queries, back.num_train, back.layers) == (2, 9, ("0", "2"))
    assert back.damping == found.damping
    assert back.settings == found.settings
    for name in ("indices", "rank_errors"):
        mine, other = getattr(found, name), getattr(back, name)
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def _changed(path: Path, name: str, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name] = change(tensors[name])
    save_file({key: t.contiguous() for key, t in tensors.items() if t.numel()}, path, header)


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*scores"):
        hk.load_influence(path)
    scored(per_layer=True).save(path)
    _changed(path, "scores.2", lambda scores: scores[:, :8])
    with pytest.raises(ValueError, match=r"'.*' is damaged: tensor 'scores.2' holds other bits"):
        hk.load_influence(path)
    scored(per_layer=True).save(path)
    _changed(path, "scores.2", lambda scores: scores[:0])
    with pytest.raises(ValueError, match="is damaged: its tensors are not those that its header"):
        hk.load_influence(path)
    scored(per_layer=True).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a readable file of influence scores"):
        hk.load_influence(path)
    model = seeded(nn.Sequential(nn.Linear(4, 3)))
    hk.kronecker_factors(model, [(randn(5, 4), classes(5, c=3))], CE).save(path)
    with pytest.raises(ValueError, match="does not hold influence scores, but is of format"):
        hk.load_influence(path)


def test_any_other_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored().save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for place in (8 + length, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"path: '{path}' is damaged: tensor 'scores' holds"):
            hk.load_influence(path)
    changed = bytearray(whole.replace(b'num_train\\": 9', b'num_train\\": 8'))
    assert changed != whole
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="is damaged: its header is not what was written"):
        hk.load_influence(path)
    path.write_bytes(whole)
    assert hk.load_influence(path).packed() == whole
