"""Input covariances of several ranks' data are those of one process on all of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from group_cases import check_same, part, sample_weights
from networks import CASES, Attention, Routed, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import hesskern as hk


def _flat(*shape: int) -> list[Any]:
    return [randn(n, *shape, seed=i) for i, n in enumerate((3, 2, 4, 1, 2))]


def _routes() -> list[Any]:
    found = _flat(4)
    for i, x in enumerate(found):
        x[:, 0] = 1.0 if i < 3 else -1.0
    return found


class Sharing(nn.Module):
    """Two layers that are given the same tensor while the batch's first entry is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x if x[0, 0] > 0 else x * 2)


MODELS: dict[str, Any] = {
    "attention": (Attention, lambda: _flat(5, 4)),
    "conv groups": (CASES["conv groups"].model, lambda: _flat(4, 4, 4)),
    "routed": (Routed, _routes),
    "sharing": (Sharing, _routes),
}


def _taken_apart(found: hk.InputCovariances) -> dict[str, Tensor]:
    numbers = {"samples": torch.tensor(found.num_samples, dtype=torch.float64)}
    for name in found:
        f = found[name]
        numbers[f"{name} inputs"], numbers[f"{name} mean"] = f.input_covariance, f.input_mean
        numbers[f"{name} positions"] = torch.tensor(f.positions, dtype=torch.float64)
    return numbers


def _covariances(group: Any, dtype: torch.dtype, weighted: bool, parts: int) -> Any:
    found = {}
    for name, (make, data) in MODELS.items():
        if weighted and name == "routed":
            # Hooks cannot tell which sample an expert's rows belong to.
            continue
        model = seeded(make()).to(dtype)
        batches = [x.to(dtype) for x in data()]
        mine = batches if group is None else part(batches, group.rank(), group.size())
        seen = hk.InputCovariances()
        for i in range(parts):
            own = mine[i::parts]
            weight = None
            if weighted:
                weight = sample_weights([(x, None) for x in own]) if own else torch.ones(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = {"sample_weight": weight, "bias": "joint", "group": group}
                hk.input_covariances(model, own, accumulate=seen, **given)
        found[name] = _taken_apart(seen), dict(seen.skipped), seen.settings
    return found


@pytest.mark.parametrize(
    ("size", "dtype", "weighted", "parts"),
    [
        (2, torch.float64, False, 1),
        (3, torch.float64, True, 1),
        (2, torch.float64, False, 2),
        (4, torch.float32, True, 1),
    ],
)
def test_they_are_those_of_one_process(
    size: int, dtype: torch.dtype, weighted: bool, parts: int
) -> None:
    want = _covariances(None, dtype, weighted, 1)
    found = run(_covariances, size, dtype, weighted, parts)
    for name, (tensors, skipped, settings) in want.items():
        for rank in range(size):
            check_same(found[rank][name][0], tensors, 1e-12 if dtype == torch.float64 else 1e-6)
            check_same(found[rank][name][0], found[0][name][0], 0)
            assert found[rank][name][1:] == (skipped, settings)


def _sampled(group: Any) -> dict[str, Tensor]:
    samples = randn(11, 4)
    sampler = DistributedSampler(samples, group.size(), group.rank(), shuffle=False)
    loader = DataLoader(samples, batch_size=2, sampler=sampler)
    return _taken_apart(hk.input_covariances(seeded(nn.Linear(4, 3)), loader, group=group))


def test_samples_that_a_sampler_repeats_do_not_count() -> None:
    want = _taken_apart(hk.input_covariances(seeded(nn.Linear(4, 3)), [randn(11, 4)]))
    for found in run(_sampled, 3):
        check_same(found, want, 1e-12)


def _failing(group: Any) -> None:
    model, seen = seeded(nn.Linear(4, 3)), hk.InputCovariances()
    hk.input_covariances(model, [randn(2, 4)], accumulate=seen, group=group)
    before = _taken_apart(seen)
    bad = [randn(2, 4), torch.full((2, 4), torch.nan, dtype=torch.float64)]
    try:
        hk.input_covariances(model, bad if group.rank() else bad[:1], accumulate=seen, group=group)
    finally:
        check_same(_taken_apart(seen), before, 0)


def test_nan_on_one_rank_adds_nothing_on_any() -> None:
    first, second = outcomes(_failing, 2)
    assert first.message.startswith("RankError: rank 1 of 2 failed in input covariances: ValueErr")
    assert second.message.startswith("ValueError: data: inputs of layer '' contain NaN or Inf in")


def _empty(group: Any) -> None:
    hk.input_covariances(seeded(nn.Linear(4, 3)), [], group=group)


def test_no_data_on_any_rank() -> None:
    for outcome in outcomes(_empty, 2):
        assert outcome.message.startswith("ValueError: data yielded no samples, so there are no")
