"""Models in DistributedDataParallel, and loaders whose samplers give each rank its part."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dense import relative_error
from group_cases import GROUP_CASES, check_same, part, taken_apart
from networks import CE, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hesskern as hk

DATA = GROUP_CASES["mlp"].data()
SAMPLES = TensorDataset(randn(11, 4, seed=3), classes(11, c=3, seed=3))


def _mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))


def _wrapped(group: Any, accumulator: bool) -> Any:
    model = nn.parallel.DistributedDataParallel(GROUP_CASES["mlp"].model())
    # As in the midst of training: gradients stay what they are.
    model(DATA[0][0]).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    mine = part(DATA, group.rank(), group.size())
    if accumulator:
        streaming = hk.FactorAccumulator(model, CE, group=group)
        streaming.consume(mine)
        found = streaming.factors()
    else:
        found = hk.kronecker_factors(model, mine, CE, group=group)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(before) == len(after) == 6
    model(DATA[0][0]).sum().backward()
    return taken_apart(found)


@pytest.mark.parametrize("accumulator", [False, True])
def test_replicas_in_distributed_data_parallel(accumulator: bool) -> None:
    want = taken_apart(hk.kronecker_factors(GROUP_CASES["mlp"].model(), DATA, CE))
    # The last rank has no data: nobody waits for its gradients.
    for found in run(_wrapped, 3, accumulator):
        check_same(found, want, 1e-12)


def _drawn(group: Any, seed: int) -> dict[str, Tensor]:
    data: Any = DataLoader(SAMPLES, batch_size=4)
    if group is not None:
        sampler = DistributedSampler(SAMPLES, group.size(), group.rank(), seed=seed)
        data = DataLoader(SAMPLES, batch_size=3, sampler=sampler)
    return taken_apart(hk.kronecker_factors(_mlp(), data, CE, output="mc", seed=5, group=group))


def test_draws_are_those_of_one_process() -> None:
    want = _drawn(None, 0)
    # However the sampler shuffles.
    for seed in (0, 1):
        for found in run(_drawn, 3, seed):
            check_same(found, want, 1e-12)


def _drawn_by_position(group: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch = randn(4, 4).repeat(50, 1), classes(200, c=3)
    given = {"output": "mc", "seed": 5}
    alone = hk.kronecker_factors(_mlp(), [batch], CE, **given)
    together = hk.kronecker_factors(_mlp(), [batch], CE, **given, group=group)
    return taken_apart(alone), taken_apart(together)


def test_samples_without_numbers_are_drawn_apart_on_every_rank() -> None:
    exact = hk.kronecker_factors(_mlp(), [(randn(4, 4), classes(4, c=3))], CE)["2"].output_hessian
    (alone, both), _ = run(_drawn_by_position, 2)
    # Drawn alike on both ranks, their mean would be that of one.
    assert relative_error(both["2 outputs"], alone["2 outputs"]) > 1e-3
    assert relative_error(both["2 outputs"], exact) < 0.2


class _Reversed(DistributedSampler[Any]):
    """Another order than the one that it has from its base."""

    def __iter__(self) -> Iterator[Any]:
        return iter(reversed(list(super().__iter__())))


def _loader(group: Any, kind: str) -> DataLoader[Any]:
    given: dict[str, Any] = {"num_replicas": group.size(), "rank": group.rank()}
    given["shuffle"] = kind == "shuffled"
    given["drop_last"] = kind == "dropping"
    if kind == "same rank":
        given["rank"] = 0
    if kind == "more replicas":
        given["num_replicas"] = 4
    sampler = (_Reversed if kind == "subclass" else DistributedSampler)(SAMPLES, **given)
    if kind == "epochs":
        sampler.set_epoch(group.rank())
    if kind == "batch sampler":
        return DataLoader(SAMPLES, batch_sampler=BatchSampler(sampler, 3, drop_last=False))
    if kind == "own batches":
        return DataLoader(SAMPLES, batch_sampler=_Batches(sampler, 3, drop_last=False))
    if kind == "single":
        return DataLoader(SAMPLES, sampler=sampler, batch_size=1)
    return DataLoader(SAMPLES, sampler=sampler, batch_size=3)


class _Batches(BatchSampler):
    pass


def _sampled(group: Any, kind: str, weighted: bool) -> tuple[Any, list[str]]:
    loader = _loader(group, kind)
    weight = None
    if weighted:
        # In the order of this rank's data, what was padded included.
        weight = torch.stack([_weight(x) for x, _ in loader.dataset])[list(_sampler_of(loader))]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = hk.kronecker_factors(_mlp(), loader, CE, sample_weight=weight, group=group)
    return taken_apart(found), [str(w.message) for w in said]


def _sampler_of(loader: DataLoader[Any]) -> Any:
    inner = loader.sampler
    return inner if isinstance(inner, DistributedSampler) else loader.batch_sampler.sampler


def _weight(x: Tensor) -> Tensor:
    return x.sum().sin() + 1.5


@pytest.mark.parametrize("kind", ["plain", "shuffled", "batch sampler", "single"])
@pytest.mark.parametrize("weighted", [False, True])
def test_samples_that_a_sampler_repeats_do_not_count(kind: str, weighted: bool) -> None:
    data, weight = [SAMPLES[:]], None
    if weighted:
        weight = torch.stack([_weight(x) for x, _ in SAMPLES])
    want = taken_apart(hk.kronecker_factors(_mlp(), data, CE, sample_weight=weight))
    # 11 samples on 3 ranks are made 12; on 2, too.
    for found, said in run(_sampled, 3, kind, weighted):
        check_same(found, want, 1e-12)
        assert said == []


def test_samples_that_a_sampler_leaves_out_are_said() -> None:
    want = taken_apart(hk.kronecker_factors(_mlp(), [SAMPLES[:9]], CE))
    for found, said in run(_sampled, 3, "dropping", False):
        check_same(found, want, 1e-12)
        assert said == ["data: DistributedSampler(drop_last=True) leaves out 2 of 11 samples"]


REFUSED = {
    "subclass": "ValueError: data: its DistributedSampler repeats 1 of the samples, .* not known "
    r"which \(_Reversed has an order of its own\)",
    "own batches": r"ValueError: .* not known which \(_Batches makes the batches\)",
    "same rank": r"ValueError: .* makes parts \[0, 0, 0\] of 3, for 3 ranks",
    "more replicas": r"ValueError: .* makes parts \[0, 1, 2\] of 4, for 3 ranks",
    "epochs": "RankError: the samplers of the data: the ranks differ.* 'epoch': 0 on rank 0, 1",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_samplers_that_are_refused(kind: str) -> None:
    for outcome in outcomes(_sampled, 3, kind, False):
        assert re.match(REFUSED[kind], outcome.message), outcome.message
