"""Sums of layers that are called in any order, with inputs that some of them share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from networks import randn, seeded
from torch import Tensor, nn

import hesskern as hk

D = 4


class _Program(nn.Module):
    """Calls its layers with given inputs, in a given order, another one for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, 3) for _ in range(4))
        # One matrix with the first.
        self.layers[3].weight, self.layers[3].bias = self.layers[0].weight, self.layers[0].bias
        self.calls: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layers[layer](x[:, place]) for layer, place in self.calls]


class _Shared(_Program):
    def forward(self, x: Tensor) -> list[Tensor]:
        # One tensor, whichever layers are given it.
        places = list(x.unbind(1))
        return [self.layers[layer](places[place]) for layer, place in self.calls]


programs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=0, max_size=9)


@given(calls=st.lists(programs, min_size=1, max_size=4), rows=st.sampled_from((1, D - 1, D, 9)),
       shared=st.booleans(), positions=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
@example(calls=[[], [(1, 0)]], rows=1, shared=True, positions=False, seed=0)
@example(calls=[[], [(1, 0)]], rows=9, shared=True, positions=False, seed=0)
@example(calls=[[], [(1, 0), (2, 0), (1, 2), (2, 1)]], rows=1, shared=True, positions=False, seed=0)
@example(calls=[[(1, 0), (2, 0), (1, 2)]], rows=9, shared=True, positions=False, seed=0)
@pytest.mark.filterwarnings("ignore:left out:UserWarning")
def test_any_order_of_calls(
    calls: list[list[tuple[int, int]]], rows: int, shared: bool, positions: bool, seed: int
) -> None:
    model = seeded(_Shared() if shared else _Program()).double()
    seen = hk.InputCovariances()
    expected = {name: torch.zeros(D, D, dtype=torch.float64) for name in range(4)}
    means = {name: torch.zeros(D, dtype=torch.float64) for name in range(4)}
    counted = dict.fromkeys(range(4), 0)
    for number, program in enumerate(calls):
        # Every layer once at first, so that each has a covariance; two have theirs in common.
        program = [(0, 0), (1, 1), (2, 1), (3, 2), *program] if not number else program
        model.calls = program
        x = randn(rows, 3, *((2,) if positions else ()), D, seed=seed + number)
        hk.input_covariances(model, [x], accumulate=seen)
        for layer, place in program:
            given_rows = x[:, place].reshape(-1, D)
            # Both layers of one weight have the inputs of both.
            for name in (0, 3) if layer in (0, 3) else (layer,):
                expected[name] += given_rows.T @ given_rows
                means[name] += given_rows.sum(0)
                counted[name] += len(given_rows)
    count = rows * len(calls)
    assert seen.num_samples == count
    for name in range(4):
        found = seen[f"layers.{name}"]
        torch.testing.assert_close(found.input_covariance, expected[name] / count)
        torch.testing.assert_close(found.input_mean, means[name] / counted[name])
        assert found.positions == counted[name] / count
    # Merging adds to every sum once.
    other = hk.InputCovariances()
    other.merge(seen)
    other.merge(seen)
    for name in range(4):
        total = other[f"layers.{name}"]
        torch.testing.assert_close(total.input_covariance, expected[name] / count)
        torch.testing.assert_close(total.input_mean, means[name] / counted[name])


def test_memory_of_sums_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches behind the second one take no memory for sums."""
    made: list[torch.Size] = []
    zeros = torch.zeros

    def noted(*shape: object, **more: object) -> Tensor:
        found = zeros(*shape, **more)
        if found.shape == (D, D):
            made.append(found.shape)
        return found

    monkeypatch.setattr(torch, "zeros", noted)
    model = seeded(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))).double()
    hk.input_covariances(model, [randn(9, D, seed=i) for i in range(6)])
    assert len(made) == 4


def test_layers_with_the_same_inputs_have_one_sum_in_every_batch() -> None:
    model = seeded(_Shared()).double()
    seen = hk.InputCovariances()
    for seed in range(3):
        model.calls = [(0, 0), (1, 1), (2, 1), (1, 2), (2, 2)]
        hk.input_covariances(model, [randn(9, 3, D, seed=seed)], accumulate=seen)
    sums = seen._sums.by_layer
    assert sums["layers.1"] is sums["layers.2"] is not sums["layers.0"]


def test_what_is_not_put_changes_nothing() -> None:
    model = seeded(_Shared()).double()
    model.calls = [(0, 0), (1, 0), (2, 1)]
    seen = hk.input_covariances(model, [randn(9, 3, D)])
    before = {name: seen[name].input_covariance for name in seen}
    calls = 0

    def failing(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the model's own")

    model.layers[2].register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="the model's own"):
        hk.input_covariances(model, [randn(9, 3, D, seed=1), randn(9, 3, D)], accumulate=seen)
    calls = 3
    again = hk.input_covariances(model, [randn(9, 3, D), randn(9, 3, D, seed=1)])
    for name in seen:
        assert not torch.equal(seen[name].input_covariance, before[name])
        assert torch.equal(seen[name].input_covariance, again[name].input_covariance)
