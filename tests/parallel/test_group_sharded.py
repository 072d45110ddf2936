"""Models that torch's fully_shard has sharded over the ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from group_cases import check_same, part, taken_apart
from networks import CE, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn

import hesskern as hk

DATA = [(randn(n, 5, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate((4, 2, 3))]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.fc1, self.fc2 = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _sharded(how: str) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = seeded(Net())
    if how == "precision":
        return fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    if how == "together":
        fully_shard([model.blocks[0], model.blocks[1]])
    else:
        for block in model.blocks:
            fully_shard(block)
    if how == "layers":
        fully_shard(model.head)
    return fully_shard(model) if how != "layers" else model


def _is_sharded(model: nn.Module) -> bool:
    return all(hasattr(p, "device_mesh") for p in model.parameters() if p.shape != (3, 5))


def _step(model: nn.Module) -> list[Tensor]:
    """A training step, whose gradients come back whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CE(model(DATA[0][0]), DATA[0][1]).backward()
    optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def _factors(group: Any, how: str, trained: bool) -> Any:
    model = _sharded(how) if group else seeded(Net())
    if trained:
        _step(model)
    mine = part(DATA, group.rank(), group.size()) if group else DATA
    factors = hk.kronecker_factors(model, mine, CE, group=group, diagonal=True)
    inputs = hk.input_covariances(model, [x for x, _ in mine], group=group)
    if group:
        assert _is_sharded(model)
    found = taken_apart(factors)
    found.update({f"{name} seen": inputs[name].input_covariance for name in inputs})
    found.update({f"parameter {i}": p.detach() for i, p in enumerate(_step(model))})
    return found


@pytest.mark.parametrize("how", ["blocks", "together", "layers"])
def test_they_are_those_of_the_whole_model(how: str) -> None:
    for trained in (False, True):
        want = _factors(None, how, trained)
        # The last rank has no data.
        for found in run(_factors, 3, how, trained):
            check_same(found, want, 1e-12)


def _failing(group: Any) -> None:
    model = _sharded("blocks")
    bad = [(torch.full((2, 5), torch.nan, dtype=torch.float64), classes(2, c=3))]
    try:
        hk.kronecker_factors(model, bad if group.rank() else DATA, CE, group=group)
    finally:
        assert _is_sharded(model)
        _step(model)


def test_an_error_leaves_the_model_sharded() -> None:
    first, second = outcomes(_failing, 2)
    assert first.message.startswith("RankError: rank 1 of 2 failed in Kronecker factors: ValueErr")
    assert second.message.startswith("ValueError: data: inputs of layer")


REFUSED = {
    "accumulator": "model: parameter 'blocks.0.norm.weight' is a DTensor, a shard of the whole",
    "alone": "model: parameter 'blocks.0.norm.weight' is a DTensor, a shard of the whole",
    "hessians": "model: parameter 'blocks.0.norm.weight' is a DTensor, a shard of the whole",
    "precision": "model: module '' is sharded with MixedPrecisionPolicy(param_dtype=torch.bfloat16",
}


def _refused(group: Any, what: str) -> None:
    model = _sharded("precision" if what == "precision" else "blocks")
    if what == "accumulator":
        hk.FactorAccumulator(model, CE, group=group)
    if what == "hessians":
        hk.layer_hessians(model, DATA, CE)
    hk.kronecker_factors(model, DATA, CE, group=None if what == "alone" else group)


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    for outcome in outcomes(_refused, 2, what):
        assert outcome.message.startswith(f"NotImplementedError: {REFUSED[what]}"), outcome.trace


def _second_passes(group: Any) -> Any:
    model = _sharded("blocks") if group else seeded(Net())
    mine = part(DATA, group.rank(), group.size()) if group else DATA
    factors = hk.kronecker_factors(seeded(Net()), DATA, CE)
    # Bases that are the same however the sums were rounded.
    E = hk.ekfac(model, mine, CE, factors=factors, output="exact", group=group)
    scores = hk.influence(E, model, DATA[:1], mine, CE, group=group)
    if group:
        assert _is_sharded(model)
    assert isinstance(scores.scores, Tensor)
    return {"scores": scores.scores, **{name: E[name].values for name in E}}


def test_ekfac_and_influence_of_a_sharded_model() -> None:
    want = _second_passes(None)
    for found in run(_second_passes, 2, store="tcp"):
        check_same(found, want, 1e-12)


def _operators(group: Any, how: str, ours: list[int], budgets: list[int]) -> dict[str, Tensor]:
    """What Hessians and the Gauss-Newton matrix are asked for; of the batches a rank's own."""
    model = _sharded(how) if group else seeded(Net())
    _step(model)
    mine, budget = DATA, budgets[0]
    if group:
        # Numbers of batches differ, down to none.
        begin = sum(ours[: group.rank()])
        mine, budget = DATA[begin : begin + ours[group.rank()]], budgets[group.rank()]
    found = {}
    with warnings.catch_warnings():
        # A norm follows some layers.
        warnings.simplefilter("ignore")
        H = hk.layer_hessians(model, mine, CE, group=group, memory_budget=budget)
    G = hk.GaussNewton(model, mine, CE, group=group, memory_budget=budget)
    for name, operator in (*H.items(), ("G", G)):
        vectors = randn(operator.shape[0], 2, seed=3)
        found[f"{name} product"] = operator @ vectors
        found[f"{name} diagonal"] = operator.diagonal()
        found[f"{name} trace"] = torch.tensor(operator.trace())
        found[f"{name} largest"] = hk.eigsh(operator, k=2).values
        if group:
            assert _is_sharded(model)
    assert G.cached == (budget > 0 or not mine)
    found["dense"] = H["blocks.1.fc2"].to_dense()
    # FSDP works as before.
    found.update({f"parameter {i}": p.detach() for i, p in enumerate(_step(model))})
    return found


@pytest.mark.parametrize(
    ("how", "ours", "budgets"),
    [
        ("blocks", [2, 1], [0, 0]),
        # One rank alone runs the model again, and one has no data.
        ("together", [1, 0, 2], [2**30, 0, 0]),
        ("layers", [0, 3], [2**30, 2**30]),
    ],
)
def test_hessians_and_their_eigenvalues(how: str, ours: list[int], budgets: list[int]) -> None:
    want = _operators(None, how, [3], [2**30])
    for found in run(_operators, len(ours), how, ours, budgets, store="tcp"):
        check_same(found, want, 1e-11)


def _used_later(group: Any, what: str) -> None:
    model = _sharded("blocks")
    mine = part(DATA, group.rank(), group.size())
    data = _Failing(mine) if what == "data" and group.rank() else mine
    H = hk.layer_hessians(model, data, CE, "head", group=group, memory_budget=0)["head"]
    if what == "changed":
        _step(model)
    try:
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    finally:
        assert _is_sharded(model)
        _step(model)


class _Failing(list[Any]):
    """Data that hold NaN from the second time on."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for x, y in list.__iter__(self):
            yield (x if self.passes == 1 else x * torch.nan), y


def test_a_product_that_fails_leaves_the_model_sharded() -> None:
    first, second = outcomes(_used_later, 2, "data")
    assert first.message.startswith("RankError: rank 1 of 2 failed in the Hessian of layer 'head'")
    assert "NaN" in second.message
    for outcome in outcomes(_used_later, 2, "changed"):
        assert "the model changed since the Hessian of layer 'head' was made" in outcome.message


def _under_inference(group: Any) -> None:
    model = _sharded("blocks")
    with torch.inference_mode():
        hk.kronecker_factors(model, DATA, CE, group=group)
        H = hk.layer_hessians(model, DATA, CE, "head", group=group, memory_budget=0)["head"]
        assert (H @ torch.ones(H.shape[0], dtype=torch.float64)).any()
    _step(model)
    _step(model)


def test_a_caller_in_inference_mode_may_train_later() -> None:
    run(_under_inference, 2)
