"""Factors and EKFAC that the ranks of a group leave sharded, and their parts read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from group_cases import GROUP_CASES, part
from networks import CE
from processes import outcomes, run
from torch import nn

import hesskern as hk

KINDS = ("factors", "ekfac")
# With diagonals, a layer of which there is a diagonal alone, groups, joint biases.
NAMES = ("large", "conv groups", "joint")
LOAD: dict[str, Any] = {"factors": hk.load_factors, "ekfac": hk.load_ekfac}


def _made(kind: str, name: str, group: Any, **how: Any) -> Any:
    case = GROUP_CASES[name]
    mine = part(case.data(), group.rank(), group.size())
    settings = dict(case.settings)
    if kind == "factors":
        return hk.kronecker_factors(case.model(), mine, CE, group=group, **settings, **how)
    settings.pop("diagonal", None)
    return hk.ekfac(case.model(), mine, CE, layers=None, group=group, **settings, **how)


def _saved(group: Any, folder: Path) -> list[list[str]]:
    kept = []
    for kind in KINDS:
        for name in NAMES:
            if (kind, name) == ("ekfac", "large"):
                continue
            whole = _made(kind, name, group)
            if group.rank() == 0:
                whole.save(folder / f"whole {kind} {name}")
            own = _made(kind, name, group, sharded=True)
            own.save(folder / f"{kind} {name}.safetensors")
            kept.append([*own, *getattr(own, "large", ()), *getattr(own, "diagonals", ())])
            for layer in set(whole) - set(own):
                with pytest.raises(KeyError, match=f"{layer!r}: it is kept by rank"):
                    own[layer]
            with pytest.raises(ValueError, match=f"of rank {group.rank()} of {group.size()} alone"):
                own.operator()
    return kept


@pytest.mark.parametrize("size", [2, 4])
def test_parts_are_the_whole(size: int, tmp_path: Path) -> None:
    kept = run(_saved, size, tmp_path)
    calls = [(k, n) for k in KINDS for n in NAMES if (k, n) != ("ekfac", "large")]
    for i, (kind, name) in enumerate(calls):
        load, want = LOAD[kind], (tmp_path / f"whole {kind} {name}").read_bytes()
        names = [layer for rank in range(size) for layer in kept[rank][i]]
        whole = load(tmp_path / f"whole {kind} {name}")
        everything = [*whole, *getattr(whole, "large", ()), *getattr(whole, "diagonals", ())]
        assert sorted(names) == sorted(everything)
        path = tmp_path / f"{kind} {name}.safetensors"
        files = [tmp_path / f"{kind} {name}.rank{r}of{size}.safetensors" for r in range(size)]
        again = tmp_path / "again"
        # By their common name, one by one in any order, and put together step by step.
        load(path).save(again)
        assert again.read_bytes() == want
        load(files[::-1]).save(again)
        assert again.read_bytes() == want
        one = load(files[1])
        assert list(one) == [n for n in whole if n in kept[1][i]]
        assert one.part.ranks == (1,)
        if size > 2:
            some = load(files[:3])
            some.save(tmp_path / "some")
            assert repr(some).splitlines()[0].endswith("the part of ranks 0, 1 and 2 of 4:")
            load([tmp_path / "some.rank0+1+2of4", files[3]]).save(again)
            assert again.read_bytes() == want
            (tmp_path / "some.rank0+1+2of4").unlink()


def _one(group: Any, folder: Path) -> None:
    data = part(GROUP_CASES["mlp"].data(), group.rank(), group.size())
    model = GROUP_CASES["mlp"].model()
    first = hk.ekfac(model, data, CE, group=group, sharded=True)
    first.save(folder / "first")
    hk.ekfac(model, data, CE, group=group, sharded=True, seed=1).save(folder / "other")
    factors = hk.kronecker_factors(model, data, CE, group=group, sharded=True)
    with pytest.raises(ValueError, match=r"E: this is a part of a curvature, with the layers of"):
        hk.influence(first, model, data, data, CE)
    with pytest.raises(ValueError, match="factors: this is a part of factors, with"):
        hk.ekfac(model, data, CE, factors=factors)
    with pytest.raises(ValueError, match="factors: this is a part of factors, with"):
        hk.add_factors(factors, factors)
    for ask in (first.trace, first.diagonal, lambda: first @ torch.zeros(3)):
        with pytest.raises(ValueError, match=r"together with hk\.load_ekfac"):
            ask()


def test_what_does_not_go_together(tmp_path: Path) -> None:
    run(_one, 2, tmp_path)
    first, other = ([tmp_path / f"{n}.rank{r}of2" for r in (0, 1)] for n in ("first", "other"))
    with pytest.raises(ValueError, match=r"rank1of2' and .*rank0of2' are parts of different res"):
        hk.load_ekfac([first[0], other[1]])
    with pytest.raises(ValueError, match="both hold the part of rank 0 of 2"):
        hk.load_ekfac([first[0], first[0]])
    with pytest.raises(ValueError, match="path: must name at least one file"):
        hk.load_ekfac([])
    whole = hk.load_ekfac(tmp_path / "first")
    whole.save(tmp_path / "whole")
    with pytest.raises(ValueError, match="whole' is no part, but whole; read it alone"):
        hk.load_ekfac([first[0], tmp_path / "whole"])
    part_of = hk.load_ekfac(first[0])
    with pytest.raises(FileExistsError, match="whole' is there already, and would be read instead"):
        part_of.save(tmp_path / "whole")
    # As of another group under the same name.
    (tmp_path / "first.rank0of3").write_bytes(first[0].read_bytes())
    with pytest.raises(ValueError, match=r"for parts of several results: first\.rank0of2, "):
        hk.load_ekfac(tmp_path / "first")
    (tmp_path / "first.rank0of3").unlink()
    first[0].unlink()
    with pytest.raises(ValueError, match=r"of the 2 parts of .* those of rank 0 are missing"):
        hk.load_ekfac(tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        hk.load_ekfac(tmp_path / "none")


def test_without_a_group() -> None:
    case = GROUP_CASES["mlp"]
    for make in (hk.kronecker_factors, hk.ekfac):
        with pytest.raises(ValueError, match=r"sharded=True .* needs group="):
            make(case.model(), case.data(), CE, sharded=True)
        with pytest.raises(TypeError, match="sharded must be True or False, got 1"):
            make(case.model(), case.data(), CE, sharded=1)


def _only_one(group: Any) -> None:
    case = GROUP_CASES["mlp"]
    hk.ekfac(case.model(), case.data(), CE, group=group, sharded=group.rank() == 1)


def test_all_ranks_or_none() -> None:
    for outcome in outcomes(_only_one, 2):
        assert outcome.message.startswith("RankError: "), outcome.trace
        assert "settings 'sharded': False on rank 0, True on rank 1" in outcome.message


def _scores(group: Any, folder: Path, name: str, how: dict[str, Any]) -> list[torch.Tensor]:
    """Scores by the parts, as they were made and as they are read, and by the whole."""
    case = GROUP_CASES[name]
    data, mine = case.data(), part(case.data(), group.rank(), group.size())
    whole, own = (_made("ekfac", name, group, sharded=sharded) for sharded in (False, True))
    own.save(folder / "E")
    again = hk.load_ekfac(folder / f"E.rank{group.rank()}of{group.size()}")
    found = []
    for E in (whole, own, again):
        result = hk.influence(E, case.model(), data[:2], mine, CE, group=group, **how)
        scores = result.scores
        found.append(torch.stack([*scores.values()]) if isinstance(scores, dict) else scores)
        assert list(result.damping) == list(whole)
    return found


@pytest.mark.parametrize(
    ("size", "name", "how"),
    [
        # Of four ranks one has no layer, and one no data.
        (4, "mlp", {"per_layer": True}),
        (2, "conv groups", {"damping": 0.3, "query_rank": 1}),
        (2, "joint", {}),
    ],
)
def test_influence_by_parts(size: int, name: str, how: dict[str, Any], tmp_path: Path) -> None:
    for whole, *others in run(_scores, size, tmp_path, name, how):
        assert whole.any()
        for other in others:
            assert torch.equal(other, whole)


def _refused(group: Any, folder: Path, what: str) -> None:
    case, rank = GROUP_CASES["mlp"], group.rank()
    data = case.data()
    E = _made("ekfac", "mlp", group, sharded=True)
    queries, how = data[:2], {}
    if what == "other part":
        E.save(folder / "E")
        group.barrier().wait()
        E = hk.load_ekfac(folder / f"E.rank{1 - rank}of2")
    elif what == "other call" and rank == 1:
        E.part = replace(E.part, whole="another")
    elif what == "queries" and rank == 1:
        queries = [(x + 1, y) for x, y in queries]
    elif what == "checkpoint":
        how["checkpoint"] = folder / "pass.checkpoint"
    elif what == "model":
        model = case.model()
        model[0] = nn.Linear(5, 71).double()
        model[2] = nn.Linear(71, 6).double()
        hk.influence(E, model, queries, data, CE, group=group)
    hk.influence(E, case.model(), queries, data, CE, group=group, **how)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other part", "must have its own part of a sharded EKFAC, got that of rank"),
        ("other call", "the parts of E: the ranks differ. digest of the whole"),
        ("queries", "queries: all ranks must have the same"),
        ("checkpoint", "checkpoint must be None where E is a part"),
        ("model", "in the model: E belongs to another model"),
    ],
)
def test_parts_that_influence_refuses(what: str, words: str, tmp_path: Path) -> None:
    for outcome in outcomes(_refused, 2, tmp_path, what):
        assert words in outcome.message, outcome.trace
