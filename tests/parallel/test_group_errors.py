"""What goes wrong on one rank of a group is told on all of them, within the group's timeout."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_cases import GROUP_CASES, check_same, part, taken_apart
from networks import CE, randn, seeded
from processes import Outcome, outcomes, run
from torch import Tensor, nn

import hesskern as hk

DATA = GROUP_CASES["mlp"].data()


def _mlp(hidden: int = 6, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.BatchNorm1d(hidden))
    model.append(nn.Linear(hidden, 3))
    return seeded(model, seed)


def _renamed() -> nn.Module:
    model = _mlp()
    return nn.Sequential(*model[:3], nn.Sequential(model[3]))


def _one_bit() -> nn.Module:
    model = _mlp()
    with torch.no_grad():
        model[3].weight.view(torch.int64)[2, 4] ^= 1
    return model


def _other_statistics() -> nn.Module:
    model = _mlp()
    model[2].running_mean[0] += 1e-9
    return model


def _no_mask(inputs: Tensor) -> None:
    return None


def _other_activation() -> nn.Module:
    model = _mlp()
    model[1] = nn.Tanh()
    return model


ODD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "width": (
        lambda: _mlp(7),
        {},
        "geometry 0 'outputs': 6 on rank 0, 7 on rank 1",
    ),
    "names": (_renamed, {}, "layers: ['0', '3'] on rank 0, ['0', '3.0'] on rank 1"),
    "dtype": (
        lambda: _mlp().float(),
        {},
        "dtypes '0.weight': 'torch.float64' on rank 0, 'torch.float32' on rank 1",
    ),
    "weights": (_one_bit, {}, "checksums of values '3.weight': "),
    "statistics": (_other_statistics, {}, "checksums of values '2.running_mean': "),
    "activation": (
        _other_activation,
        {},
        "modules '1': ['torch.nn.modules.activation.ReLU', ''] on rank 0, "
        "['torch.nn.modules.activation.Tanh', ''] on rank 1",
    ),
    "mask": (
        _mlp,
        {"position_mask": _no_mask},
        "settings 'position_mask given': False on rank 0, True on rank 1",
    ),
    "seed": (_mlp, {"seed": 5}, "settings 'seed': 0 on rank 0, 5 on rank 1"),
    "output": (_mlp, {"output": "mc"}, "settings 'output': 'exact' on rank 0, 'mc' on rank 1"),
    "sharded": (_mlp, {"sharded": True}, "settings 'sharded': False on rank 0, True on rank 1"),
    "layers": (_mlp, {"layers": "0"}, "layers: ['0', '3'] on rank 0, ['0'] on rank 1"),
    "loss": (_mlp, {"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss 1 'mean'"),
    "ignored class": (_mlp, {"loss": nn.CrossEntropyLoss(ignore_index=1)}, "loss 1 'ignore"),
}


def _odd(group: Any) -> dict[str, str]:
    """What each of them raises; the group stays in step."""
    found = {}
    for name, (odd, others, _) in ODD.items():
        model, settings = (odd, others) if group.rank() == 1 else (_mlp, {})
        data = [(x.float(), y) for x, y in DATA] if name == "dtype" and group.rank() else DATA
        with pytest.raises(hk.RankError) as raised:
            hk.kronecker_factors(model(), data, group=group, **{"loss": CE, **settings})
        found[name] = str(raised.value)
    return found


def test_ranks_that_differ() -> None:
    for found in run(_odd, 2):
        for name, (*_, words) in ODD.items():
            assert found[name].startswith(f"Kronecker factors: the ranks differ. {words}"), name


def _bad_batch(group: Any, where: int, kind: str) -> None:
    model = _mlp().train()
    data = part(DATA, group.rank(), group.size() + 1)
    if group.rank() == where:
        x = data[1][0].clone()
        x[-1, 2] = torch.nan
        data = [data[0], (x, data[1][1]), *data[2:]]
    try:
        if kind == "factors":
            hk.kronecker_factors(model, data, CE, group=group)
        else:
            hk.input_covariances(model, data, group=group)
    finally:
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        # The group has stayed in step.
        assert hk.kronecker_factors(_mlp(), DATA, CE, group=group).num_samples == 66


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("kind", ["factors"])
def test_nan_on_one_rank(where: int, kind: str) -> None:
    for rank, outcome in enumerate(outcomes(_bad_batch, 3, where, kind)):
        if rank == where:
            assert outcome.message.startswith("ValueError: data: inputs")
            assert "NaN or Inf in batch 1" in outcome.message
        else:
            assert outcome.message.startswith(f"RankError: rank {where} of 3 failed in Kronecker")
            assert "NaN or Inf in batch 1" in outcome.message


def _endless(group: Any) -> Iterator[Any]:
    while True:
        yield from DATA


def _failing_early(group: Any) -> None:
    bad = [(torch.full((2, 5), torch.nan).double(), torch.zeros(2, dtype=torch.long))]
    hk.kronecker_factors(_mlp(), bad if group.rank() else _endless(group), CE, group=group)


def test_a_pass_ends_soon_after_another_rank_has_failed() -> None:
    for rank, outcome in enumerate(outcomes(_failing_early, 2)):
        assert outcome.message.startswith(("RankError: rank 1 of 2", "ValueError: data")[rank])


class _Killing:
    """Batches, in the midst of which the process ends."""

    def __iter__(self) -> Iterator[Any]:
        yield DATA[0]
        os.kill(os.getpid(), signal.SIGKILL)


def _killed(group: Any, where: int) -> None:
    data = _Killing() if group.rank() == where else DATA
    hk.kronecker_factors(_mlp(), data, CE, group=group)


@pytest.mark.parametrize("where", [0, 2])
def test_a_rank_that_is_killed_in_its_pass(where: int) -> None:
    found = outcomes(_killed, 3, where, timeout=3.0)
    assert found[where].exitcode == -signal.SIGKILL
    for rank in {0, 1, 2} - {where}:
        assert found[rank].message.startswith(f"RankError: rank {where} of 3 did not get to ")


def _killed_while_sending(group: Any) -> None:
    if group.rank() == 1:
        exchange = dist.all_to_all_single

        def killing(*args: Any, **settings: Any) -> None:
            exchange(*args, **settings)
            os.kill(os.getpid(), signal.SIGKILL)

        dist.all_to_all_single = killing
    hk.kronecker_factors(_mlp(), DATA, CE, group=group)


def test_a_rank_that_is_killed_while_sums_are_sent() -> None:
    found = outcomes(_killed_while_sending, 3, timeout=4.0)
    assert found[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert found[rank].message.startswith("RankError: rank 1 of 3 did not get to a sum")


def _empty(group: Any, layers: Any) -> None:
    hk.kronecker_factors(_mlp(), [], CE, layers=layers, group=group)


def test_no_data_on_any_rank() -> None:
    for outcome in outcomes(_empty, 2, None):
        assert outcome.message.startswith("ValueError: data yielded no samples, so there are no")


class _Coupled(nn.Module):
    """A layer whose rows are samples, or are mixed where the batch's first entry is large."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(x)
        return self.out(torch.relu(rows + rows.mean(0) if x[0, 0] > 50 else rows))


def _coupled(group: Any, layers: Any) -> tuple[list[str], str]:
    x = randn(3, 4)
    x[0, 0] = 100.0 if group.rank() else 0.0
    model = seeded(_Coupled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = hk.kronecker_factors(model, [(x, torch.arange(3))], CE, layers, group=group)
    return list(found), found.skipped["fc"]


def test_a_layer_that_is_unfit_on_one_rank_is_left_out() -> None:
    found = run(_coupled, 2, None)
    assert found[0] == found[1]
    assert found[0][0] == ["out"]


def test_a_layer_by_name_that_is_unfit_on_one_rank() -> None:
    found: list[Outcome] = outcomes(_coupled, 2, "fc")
    assert "layer 'fc'" in found[1].message
    assert found[0].message.startswith("RankError: rank 1 of 2 failed in Kronecker factors: ")


def _streams(group: Any, several: bool) -> Any:
    accumulator = hk.FactorAccumulator(_mlp(), CE, group=group)
    mine = part(DATA, group.rank(), group.size())
    for x, y in mine[:2]:
        accumulator.update(x, y)
    if several:
        accumulator.factors()
    accumulator.consume(mine[2:])
    return taken_apart(accumulator.factors())


def test_an_accumulator_goes_on_after_its_factors() -> None:
    want = taken_apart(hk.kronecker_factors(_mlp(), DATA, CE))
    for several in (False, True):
        for found in run(_streams, 2, several):
            check_same(found, want, 1e-12)


def _averages(group: Any, of_group: bool) -> Any:
    accumulators = [
        hk.FactorAccumulator(_mlp(), CE, decay=0.8, group=group if of_group else None)
        for _ in range(group.size())
    ]
    for rank, accumulator in enumerate(accumulators):
        accumulator.consume(part(DATA, rank, group.size()))
    if of_group:
        return taken_apart(accumulators[group.rank()].factors())
    accumulators[0].merge(accumulators[1])
    return taken_apart(accumulators[0].factors())


def test_moving_averages_are_merged() -> None:
    for found, want in zip(run(_averages, 2, True), run(_averages, 2, False), strict=True):
        check_same(found, want, 1e-12)


def _copied(group: Any) -> list[str]:
    accumulator = hk.FactorAccumulator(_mlp(), CE, group=group)
    refused = []
    for copying in (pickle.dumps, copy.deepcopy):
        try:
            copying(accumulator)
        except (pickle.PicklingError, TypeError) as error:
            refused.append(str(error))
    return refused


def test_copies_of_an_accumulator_say_what_they_lack() -> None:
    for refused in run(_copied, 2):
        assert len(refused) == 2
        for text, what in zip(refused, ("pickled", "copied"), strict=True):
            assert f"cannot be {what}: its group, a ProcessGroup, cannot" in text
