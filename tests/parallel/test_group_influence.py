"""Influence scores of several ranks' samples are those of one process on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import relative_error
from group_cases import GROUP_CASES, part
from networks import CE, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hesskern as hk

WAYS: dict[str, dict[str, Any]] = {
    "sums": {},
    "layers": {"per_layer": True},
    "largest": {"top": 5},
    "all": {"top": 100},
    "rank": {"query_rank": 1, "batch_size": 2},
}


def _mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))


def _queries() -> list[Any]:
    return [(randn(3, 5, seed=50), classes(3, c=3, seed=50))]


def _taken_apart(found: hk.Influence) -> dict[str, Tensor]:
    scores = found.scores if isinstance(found.scores, dict) else {"": found.scores}
    tensors = {f"scores {name}": value for name, value in scores.items()}
    if found.indices is not None:
        tensors["indices"] = found.indices
    tensors["samples"] = torch.tensor(found.num_train)
    return tensors


def _check(found: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].shape == tensor.shape
        if tensor.is_floating_point():
            assert relative_error(found[name], tensor) <= bound
        else:
            assert torch.equal(found[name], tensor)


def _scores(group: Any) -> dict[str, Any]:
    data = GROUP_CASES["mlp"].data()
    E = hk.ekfac(_mlp(), data, CE, output="exact")
    mine = data if group is None else part(data, group.rank(), group.size())
    return {
        way: _taken_apart(hk.influence(E, _mlp(), _queries(), mine, CE, group=group, **given))
        for way, given in WAYS.items()
    }


@pytest.mark.parametrize("size", [2, 4])
def test_columns_follow_each_other_by_rank(size: int) -> None:
    want = _scores(None)
    for found in run(_scores, size, store="tcp"):
        for way in WAYS:
            _check(found[way], want[way], 1e-12)


def _tokens(group: Any) -> dict[str, Any]:
    case = GROUP_CASES["diagonal"]
    # Sequences of several lengths.
    data = [(x[:, : 3 + i % 3], y) for i, (x, y) in enumerate(case.data())]
    mine = data if group is None else part(data, group.rank(), group.size())
    given: dict[str, Any] = {"layers": "fc", "damping": "mean"}
    F = hk.kronecker_factors(case.model(), data, CE, "fc")
    found = hk.influence(F, case.model(), data[:1], mine, CE, per_token=True, group=group, **given)
    return _taken_apart(found)


def test_scores_of_positions() -> None:
    want = _tokens(None)
    assert want["scores "].shape == (3, 12, 5)
    for found in run(_tokens, 3, store="tcp"):
        _check(found, want, 1e-12)


DATA = TensorDataset(randn(23, 5), classes(23, c=3))


def _loader(group: Any, kind: str) -> DataLoader[Any]:
    if group is None:
        return DataLoader(DATA, 6)
    rank, size = group.rank(), group.size()
    if kind == "sampler":
        return DataLoader(DATA, 4, sampler=DistributedSampler(DATA, size, rank, shuffle=False))
    if kind == "shuffled":
        return DataLoader(DATA, 4, sampler=DistributedSampler(DATA, size, rank, seed=3))
    return DataLoader(Subset(DATA, range(rank, 23, size)), 4, shuffle=kind == "subset shuffled")


def _loaded(group: Any, kind: str) -> Any:
    F = hk.kronecker_factors(_mlp(), DataLoader(DATA, 6), CE)
    found = {}
    for way, given in WAYS.items():
        result = hk.influence(F, _mlp(), _queries(), _loader(group, kind), CE, group=group, **given)
        found[way] = _taken_apart(result)
        columns = result.settings.get("columns")
    return found, columns


@pytest.mark.parametrize("kind", ["sampler", "shuffled", "subset shuffled"])
@pytest.mark.filterwarnings("error")
def test_columns_are_in_the_order_of_the_data_set(kind: str) -> None:
    want, _ = _loaded(None, kind)
    for found, columns in run(_loaded, 3, kind, store="tcp"):
        assert columns == "sample numbers"
        for way in WAYS:
            _check(found[way], want[way], 1e-12)


def _ties(group: Any) -> Tensor:
    """Every sample twice in the data set, so that scores come in equal pairs."""
    x, y = randn(8, 5), classes(8, c=3)
    data = TensorDataset(torch.cat([x, x]), torch.cat([y, y]))
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    own = list(reversed(range(rank, 16, size))) if group is not None else range(16)
    loader = DataLoader(Subset(data, own), 3)
    found = hk.influence(None, _mlp(), _queries(), loader, CE, top=5, group=group, batch_size=1)
    assert found.indices is not None
    return found.indices


def test_of_equal_scores_the_earlier_sample_comes_first() -> None:
    want = _ties(None)
    for found in run(_ties, 2, store="tcp"):
        assert torch.equal(found, want)


def _odd(group: Any, kind: str) -> None:
    other = group.rank() == 1
    data = GROUP_CASES["mlp"].data()
    E = hk.ekfac(_mlp(), data[:3] if kind == "E" and other else data, CE, output="exact")
    queries: list[Any] = _queries()
    if kind == "order of queries" and other:
        queries = [(x.flip(0), y.flip(0)) for x, y in queries]
    if kind == "number of queries" and other:
        queries = [(x[1:], y[1:]) for x, y in queries]
    train = part(data, group.rank(), 2)
    if kind == "NaN" and other:
        train[-1][0][0] = torch.nan
    if kind == "nothing":
        train = []
    given = {"damping": 1.0 + other} if kind == "damping" else {}
    hk.influence(E, _mlp(), queries, train, CE, group=group, **given)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("E", "influence: the ranks differ. settings 'E'"),
        ("damping", "settings 'damping' '0': 1.0 on rank 0, 2.0 on rank 1"),
        ("number of queries", "number: 3 on rank 0, 2 on rank 1"),
        ("order of queries", "query 0 of rank 1 is another than that of rank 0"),
        ("NaN", "rank 1 of 2 failed in influence: ValueError: train: the model's outputs for"),
        ("nothing", "train: data yielded no samples"),
    ],
)
def test_what_is_wrong_on_one_rank_is_told_on_all(kind: str, words: str) -> None:
    found = outcomes(_odd, 2, kind, store="tcp")
    assert words in found[0].message
    assert found[0].message.startswith("ValueError" if kind == "nothing" else "RankError")
    assert found[1].error is not None
    if kind != "NaN":
        assert words in found[1].message
