"""The ranks of a group: sums, gathered values, and errors that all of them learn of."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, run
from torch import Tensor

import hesskern as hk
from hesskern.parallel import bucket_sums
from hesskern.parallel import ranks as ranks_module
from hesskern.parallel.ranks import RankError, Ranks
from hesskern.parallel.statuses import Statuses


def _ranks(group: Any) -> Ranks:
    found = Ranks.of(group)
    assert found is not None
    return found


def _tensors(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3,), (5, 5), (2, 70, 70), (0, 4), (130, 130), (), (7, 200)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in shapes
        for dtype in (torch.float32, torch.float64)
    ]


_UPPER = [half for half in (False, True, True, False, True, False, False) for _ in range(2)]


def _summed(group: Any) -> list[Tensor]:
    mine = _tensors(group.rank())
    _ranks(group).sum_(mine, _UPPER)
    return mine


class TestSums:
    @pytest.mark.parametrize("size", [2, 4])
    def test_they_are_those_of_all_ranks_and_alike(self, size: int) -> None:
        found = run(_summed, size)
        given = [_tensors(rank) for rank in range(size)]
        for i, half in enumerate(_UPPER):
            want = sum(tensors[i].double() for tensors in given).to(given[0][i].dtype)
            for rank in range(size):
                got, own = found[rank][i], given[rank][i]
                if half:
                    assert torch.equal(got.tril(-1), own.tril(-1))
                    got, want = got.triu(), want.triu()
                assert torch.equal(got, want)


def _in_buckets(group: Any, bucket: int) -> list[Tensor]:
    # A bucket of 25 MB holds all of this.
    for module in (bucket_sums, ranks_module):
        module.BUCKET = bucket
    mine = [*_tensors(group.rank()), torch.arange(5) * (group.rank() + 1)]
    _ranks(group).sum_(mine, [*_UPPER, False])
    return mine


@pytest.mark.parametrize("bucket", [8 * 130, 10_000])
def test_buckets_of_any_size_give_the_same_bits(bucket: int) -> None:
    want, found = run(_summed, 3), run(_in_buckets, 3, bucket)
    for rank in range(3):
        *tensors, whole = found[rank]
        assert all(torch.equal(a, b) for a, b in zip(tensors, want[rank], strict=True))
        assert torch.equal(whole, torch.arange(5) * 6)


def _gathered(group: Any) -> Any:
    ranks = _ranks(group)
    mine = torch.arange(ranks.rank * 2 * 3, dtype=torch.bfloat16).view(-1, 3)
    given = torch.full((4, 2), float(ranks.rank))
    ranks.broadcast_([given], 1)
    values = ranks.gather("ranks", {"rank": ranks.rank})
    return ranks.totals("numbers", 0.1, ranks.rank), values, ranks.gather_tensors(mine), given


def test_values_and_tensors_are_gathered() -> None:
    for totals, values, parts, given in run(_gathered, 3):
        assert totals == (0.1 * 3, 3.0)
        assert values == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert [len(part) for part in parts] == [0, 2, 4]
        assert torch.equal(parts[2], torch.arange(12, dtype=torch.bfloat16).view(-1, 3))
        assert torch.equal(given, torch.ones(4, 2))


def _differing(group: Any) -> None:
    names = ["fc1", "fc2"] if group.rank() < 2 else ["fc1", "fc3"]
    _ranks(group).agree("Kronecker factors", {"dtype": "float32", "layers": names})


def test_facts_that_differ_are_named_on_every_rank() -> None:
    for outcome in outcomes(_differing, 3):
        assert outcome.message == (
            "RankError: Kronecker factors: the ranks differ. layers: ['fc1', 'fc2'] on rank 0, "
            "['fc1', 'fc3'] on rank 2"
        )


def _section(ranks: Ranks, where: int, how: str) -> None:
    with ranks.section("Kronecker factors"):
        if how == "before":
            ranks.totals("numbers", 1.0)
        if ranks.rank == where:
            raise ValueError("NaN in layer 'fc1'")
        if how == "inside":
            ranks.totals("numbers", 1.0)


def _failing(group: Any, where: int, how: str) -> str:
    ranks = _ranks(group)
    with pytest.raises((RankError, ValueError)) as caught:
        _section(ranks, where, how)
    # They are in step: the group goes on.
    ranks.totals("numbers", 2.0)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("store", ["file", "tcp"])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("how", ["before", "inside", "plain"])
def test_all_ranks_learn_that_one_has_failed(store: Any, where: int, how: str) -> None:
    found = run(_failing, 3, where, how, store=store)
    for rank, text in enumerate(found):
        if rank == where:
            assert text == "ValueError: NaN in layer 'fc1'"
        else:
            assert text == (
                f"RankError: rank {where} of 3 failed in Kronecker factors: ValueError: NaN in "
                "layer 'fc1'"
            )


def _killed(group: Any, where: int) -> None:
    ranks = _ranks(group)
    ranks.totals("numbers", 1.0)
    if ranks.rank == where:
        os.kill(os.getpid(), signal.SIGKILL)
    with ranks.section("Kronecker factors"):
        ranks.sum_([torch.ones(3)])


@pytest.mark.parametrize(("where", "store"), [(0, "file"), (1, "file"), (1, "tcp"), (0, "tcp")])
def test_a_rank_that_was_killed_is_named(where: int, store: Any) -> None:
    found = outcomes(_killed, 3, where, timeout=3.0, store=store)
    assert found[where].exitcode == -signal.SIGKILL
    for rank in {0, 1, 2} - {where}:
        assert found[rank].message.startswith("RankError: ")
        if (where, store) == (0, "tcp"):
            assert "the group's store did not answer" in found[rank].message
            assert "rank 0" in found[rank].message
        else:
            assert f"rank {where} of 3 did not get to" in found[rank].message
            assert "within the group's timeout of 3 seconds" in found[rank].message


def _product(ranks: Ranks) -> None:
    with ranks.section("all"), ranks.telling("a product"):
        if ranks.rank == 1:
            raise ValueError("NaN")
        ranks.sum_([torch.ones(3)])


def _nested(group: Any) -> str:
    ranks = _ranks(group)
    begin = time.monotonic()
    with pytest.raises((RankError, ValueError)) as caught:
        _product(ranks)
    # Nobody has waited for the group's timeout.
    assert time.monotonic() - begin < 60
    ranks.totals("numbers", 2.0)
    return str(caught.value)


def test_an_error_inside_two_sections_is_told_once() -> None:
    told = "rank 1 of 2 failed in a product: ValueError: NaN"
    assert run(_nested, 2, timeout=100.0) == [told, "NaN"]


def _not_ranks(group: Any) -> list[str]:
    other = dist.new_group([1])
    refused = []
    for given in (other, "world", 1):
        try:
            hk.kronecker_factors(torch.nn.Linear(2, 2), [], torch.nn.MSELoss(), group=given)
        except (TypeError, RuntimeError, ValueError) as error:
            refused.append(f"{type(error).__name__}: {error}")
    assert Ranks.of(None) is None
    return refused


def test_what_is_no_group() -> None:
    first, second = run(_not_ranks, 2)
    assert first[0].startswith("RuntimeError: group: this process is no member of the group")
    assert second[0].startswith("ValueError: data yielded no samples")
    for refused in (first, second):
        assert refused[1].startswith("TypeError: group must be a torch.distributed process group")
        assert refused[1].endswith("got str")
        assert refused[2].endswith("got int")


def _subgroups(group: Any) -> tuple[float, list[Any]]:
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = _ranks(pairs[group.rank() in (1, 2)])
    tensor = torch.tensor([float(group.rank())])
    mine.sum_([tensor])
    mine.broadcast_([sent := torch.tensor([10.0 * group.rank()])], 1)
    everywhere = _ranks(group).gather("sums", [tensor.item(), sent.item()])
    return mine.rank, everywhere


def test_several_groups_at_a_time() -> None:
    for rank, (own, everywhere) in enumerate(run(_subgroups, 4)):
        assert own == (0, 0, 1, 1)[rank]
        assert everywhere == [[3.0, 30.0], [3.0, 20.0], [3.0, 20.0], [3.0, 30.0]]


def _lives(group: Any) -> list[Any]:
    """Two groups, one after the other, in the same store."""
    store, found = dist.PrefixStore("shared", group.get_group_store()), []
    for life in range(2):
        statuses = Statuses(store, group.rank(), group.size(), 30.0)
        for i in range(3):
            found += statuses.exchange("values", [life, i, group.rank()], more=i < 2)
        dist.barrier()
    return found


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_a_store_that_serves_a_second_group(store: Any) -> None:
    want = [[life, i, rank] for life in range(2) for i in range(3) for rank in range(3)]
    assert run(_lives, 3, store=store) == [want] * 3


def _late(group: Any) -> str:
    """Rank 2 comes when the others have given up."""
    ranks = _ranks(group)
    if ranks.rank == 2:
        # They say when.
        group.get_group_store().wait(["gone"], timedelta(seconds=60))
    with pytest.raises(RankError) as caught:
        ranks.totals("numbers", 1.0)
    if ranks.rank == 0:
        group.get_group_store().set("gone", "1")
    return str(caught.value)


def test_a_rank_that_comes_too_late_is_told() -> None:
    for text in run(_late, 3, timeout=2.0):
        assert text.startswith("rank 2 of 3 did not get to numbers within")


def _out_of_step(group: Any) -> None:
    ranks = _ranks(group)
    if ranks.rank:
        ranks.agree("Kronecker factors", {})
    else:
        ranks.totals("numbers", 1.0)


def test_ranks_that_do_different_things() -> None:
    for outcome in outcomes(_out_of_step, 2):
        assert outcome.message == (
            "RankError: the ranks do not do the same: rank 1 of 2 is at Kronecker factors, rank 0 "
            "at numbers"
        )
