"""influence goes on from its checkpoint, however batches and pieces lie to each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CE, Attention, Between, classes, randn, seeded
from resumed import Broken, Seen, bits, broken_off, stopping
from torch import Tensor, nn

import hesskern as hk

SAMPLES = "Influence: samples"


def data(*sizes: int, seed: int = 0, t: int | None = None) -> list[tuple[Tensor, Tensor]]:
    shape = (4,) if t is None else (t, 4)
    return [
        (randn(n, *shape, seed=seed + i, dtype=torch.float32), classes(n, c=3, seed=seed + i))
        for i, n in enumerate(sizes)
    ]


def model(kind: Callable[[], nn.Module] | None = None) -> nn.Module:
    return seeded(Between(torch.relu) if kind is None else kind()).float()


TRAIN = (4, 5, 1, 7, 3)
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "pieces over several batches": {"batch_size": 8},
    "batches of several pieces": {"batch_size": 2},
    "by layer": {"per_layer": True, "batch_size": 3},
    "the largest": {"top": 4, "batch_size": 3},
    "of low rank": {"query_rank": 1, "batch_size": 3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("after", [2, 4])
def test_bits(case: str, after: int, tmp_path: Path) -> None:
    net, train, queries = model(), data(*TRAIN), data(2, 1, seed=50)
    E = hk.ekfac(net, train, CE)
    call = partial(hk.influence, E, net, queries, train, CE, **CASES[case])
    whole = bits(call(), tmp_path)
    path = tmp_path / "pass.checkpoint"
    broken_off(call, path, 1, SAMPLES)
    broken_off(call, path, after, SAMPLES)
    seen = Seen()
    assert bits(call(checkpoint=path, progress=seen), tmp_path) == whole
    # Batches of which some samples are left are loaded and told of once more.
    assert {name for name, _ in seen} == {SAMPLES}
    assert [done for _, done in seen] == list(range(seen[0][1], len(TRAIN) + 1))
    assert [p.name for p in tmp_path.iterdir()] == ["bits.safetensors"]


def test_tokens(tmp_path: Path) -> None:
    net, path = model(Attention), tmp_path / "pass.checkpoint"
    # Of several lengths: a piece ends where the shape changes.
    train = [*data(3, 2, t=4), *data(4, t=6, seed=9), *data(2, t=4, seed=20)]
    call = partial(
        hk.influence, None, net, data(2, t=5, seed=50), train, CE, per_token=True, batch_size=2
    )
    whole = bits(call(), tmp_path)
    for after in (1, 2, 3, 4):
        broken_off(call, path, after, SAMPLES)
    assert bits(call(checkpoint=path), tmp_path) == whole


def test_samples_that_were_scored_do_not_run(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"
    train, queries = data(*TRAIN), data(2, seed=50)
    call = partial(hk.influence, None, net, queries, train, CE, batch_size=4)
    broken_off(call, path, 4, SAMPLES)
    given: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    call(checkpoint=path)
    rest = torch.cat([x for x, _ in train])[16:]
    rows = torch.cat(given)
    # Of 17 samples in four batches, 16 in four pieces were scored; none of the queries runs.
    assert all(any(torch.equal(row, other) for other in rest) for row in rows)


def test_other_queries_and_curvatures(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"
    train, queries = data(*TRAIN), data(2, 1, seed=50)
    E, other = hk.ekfac(net, train, CE), hk.ekfac(net, train[:2], CE)
    how: dict[str, Any] = {"checkpoint": path, "batch_size": 2}
    call = partial(hk.influence, E, net, queries, train, CE, batch_size=2)
    broken_off(call, path, 3, SAMPLES)
    with pytest.raises(ValueError, match=r"^queries: checkpoint: .* batch 1 is another"):
        hk.influence(E, net, [queries[0], *data(1, seed=60)], train, CE, **how)
    with pytest.raises(ValueError, match=r"queries: .*other data: there were 2 batches"):
        hk.influence(E, net, [*queries, *queries], train, CE, **how)
    with pytest.raises(ValueError, match=r"queries: .*there are more than 2 batches"):
        hk.influence(E, net, iter([*queries, *queries]), train, CE, **how)
    with pytest.raises(ValueError, match=r"^train: checkpoint: .* batch 0 is another"):
        hk.influence(E, net, queries, data(*TRAIN, seed=7), CE, **how)
    with pytest.raises(ValueError, match="of another call: E is"):
        hk.influence(other, net, queries, train, CE, **how)
    with pytest.raises(ValueError, match=r"of another call: damping is 'mean' there and 0.1 here"):
        call(checkpoint=path, damping=0.1)
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


def test_before_the_first_sample(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"
    train, queries = data(*TRAIN), data(2, 1, seed=50)
    call = partial(hk.influence, None, net, queries, iter(train), CE)
    with pytest.raises(Broken):
        call(checkpoint=path, progress=stopping(1, SAMPLES))
    seen = Seen()
    call = partial(hk.influence, None, net, queries, train, CE)
    found = hk.influence(None, net, queries, iter(train), CE, checkpoint=path, progress=seen)
    assert seen[0] == (SAMPLES, 1)
    assert bits(found, tmp_path) == bits(call(), tmp_path)
