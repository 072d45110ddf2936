"""Layers that only some batches reach, and those whose inputs do not count the samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error
from networks import CASES, CE, Routed, classes, randn, routed_data, seeded
from same_factors import assert_same
from torch import Tensor, nn

import hesskern as hk


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.filterwarnings("ignore:left out")
def test_layers_reached_in_some_batches_count_with_zeros_elsewhere(order: tuple[int, ...]) -> None:
    model = seeded(Routed())
    data = [routed_data()[i] for i in order]
    stream = hk.FactorAccumulator(model, CE)
    for x, y in data:
        stream.update(x, y)
    whole = hk.kronecker_factors(model, data, CE)
    assert_same(stream.factors(), whole)
    assert list(whole) == ["stem", "positive", "negative"]
    assert whole.skipped == {"unused": "was never reached in the forward pass"}
    for layer, sign in (("positive", 1), ("negative", -1)):
        rows = torch.cat([F.relu(model.stem(x)) for x, _ in data if sign * x[0, 0] > 0]).detach()
        f = whole[layer]
        assert relative_error(f.input_covariance, rows.T @ rows / 9) <= 1e-12
        assert f.positions == pytest.approx(len(rows) / 9)
    merged = hk.FactorAccumulator(model, CE)
    for x, y in data:
        part = hk.FactorAccumulator(model, CE)
        part.update(x, y)
        merged.merge(part)
    assert_same(merged.factors(), whole, 1e-14)
    assert merged.factors().skipped == whole.skipped


def test_a_layer_asked_for_by_name_may_come_late_but_must_come() -> None:
    model, data = seeded(Routed()), routed_data()
    assert list(hk.kronecker_factors(model, data, CE, layers=["positive"])) == ["positive"]
    stream = hk.FactorAccumulator(model, CE, layers=["positive"])
    stream.update(*data[0])
    with pytest.raises(ValueError, match="layers: 'positive' was never reached"):
        stream.factors()
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data[:2], CE, layers=["positive"]))
    with pytest.raises(ValueError, match="layers: 'unused' was never reached"):
        hk.kronecker_factors(model, data, CE, layers=["stem", "unused"])


def test_a_model_that_reaches_no_layer() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    with pytest.raises(ValueError, match="no layer of the model has factors: 'fc' was never"):
        hk.kronecker_factors(Bypass(), [(torch.ones(2, 3), torch.zeros(2, 3))], nn.MSELoss())
    with pytest.raises(ValueError, match="no layer of the model has a Hessian: 'fc' was never"):
        hk.layer_hessians(Bypass(), [(torch.ones(2, 3), torch.zeros(2, 3))], nn.MSELoss())


def test_a_layer_beside_the_output_has_a_zero_output_hessian() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.side = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.side(x)
            return self.fc(x)

    data = [(randn(3, 4), classes(3, c=3))]
    f = hk.kronecker_factors(seeded(Side()), data, CE)["side"]
    assert torch.equal(f.output_hessian, torch.zeros(2, 2).double())
    assert relative_error(f.input_covariance, data[0][0].T @ data[0][0] / 3) <= 1e-14


def test_frozen_layers_count() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    expected = hk.kronecker_factors(model, data, CE)
    model[0].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    assert_same(hk.kronecker_factors(model, data, CE), expected)
    model.requires_grad_(False)
    assert_same(hk.kronecker_factors(model, data, CE), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_gradient_mode_does_not_matter(context: Any) -> None:
    case = CASES["conv stride"]
    model, data = case.model(), case.data()
    expected = hk.kronecker_factors(model, data, CE, bias="joint")
    stream = hk.FactorAccumulator(model, CE, bias="joint")
    with context():
        stream.update(*data[0])
        stream.update(*(t.clone() for t in data[1]))
        found = stream.factors()
    assert_same(found, expected)
    stream.update(*data[0])
    assert torch.is_grad_enabled()


# Layers whose inputs do not count the samples


class Positional(nn.Module):
    """``b(relu(a(x)) + p(table))``: p sees the 4 rows of a table, whatever the batch.

    With ``switching``, p sees the samples of batches of 4.
    """

    switching = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.b = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 3)
        self.register_buffer("table", torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.switching and len(x) == 4:
            return self.b(torch.relu(self.a(x)) + self.p(x[:, :2]))
        return self.b(torch.relu(self.a(x)) + self.p(self.table).mean(0))


def positional(*sizes: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    data = [(randn(n, 3, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate(sizes)]
    return seeded(Positional()), data


# A batch of 4 looks as if it was counted by p's table; what is skipped stays so.
@pytest.mark.parametrize("sizes", [(6, 5), (6, 4), (6, 4, 5)])
def test_layers_that_do_not_count_samples_are_skipped(sizes: tuple[int, ...]) -> None:
    model, data = positional(*sizes)
    with pytest.warns(UserWarning, match="left out: 'p' sees inputs"):
        found = hk.kronecker_factors(model, data, CE)
    with pytest.warns(UserWarning, match="left out: 'p' sees inputs"):
        hessians = hk.layer_hessians(model, data, CE)
    assert list(found) == list(hessians) == ["a", "b"]
    assert "sees inputs [4, 2] while the model returns 6 samples" in found.skipped["p"]
    assert hessians.skipped == found.skipped
    expected = hk.kronecker_factors(model, data, CE, layers=["a", "b"])
    assert_same(found, hk.Factors(dict(expected), expected.num_samples, {}, {}))
    for function in (hk.kronecker_factors, hk.layer_hessians):
        with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
            function(model, data, CE, layers=["a", "p"])


@pytest.mark.parametrize("first", [4, 1])
def test_as_many_rows_as_samples_are_not_taken_for_samples(first: int) -> None:
    model, data = positional(first, 4)
    with pytest.warns(UserWarning, match="left out: 'p' sees rows that are no samples"):
        found = hk.layer_hessians(model, data[first == 1 :], CE)
    assert list(found) == ["a", "b"]
    for layer in ("a", "b"):
        expected = hk.layer_hessians(model, data[first == 1 :], CE, layers=[layer])[layer]
        assert relative_error(found[layer].to_dense(), expected.to_dense()) <= 1e-13


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("budget", [0, 2**30])
def test_hessians_beside_a_skipped_layer(budget: int) -> None:
    model, data = positional(6, 5)
    found = hk.layer_hessians(model, data, CE, memory_budget=budget)
    expected = hk.layer_hessians(model, data, CE, layers=["a", "b"])
    for name, H in expected.items():
        assert relative_error(found[name].to_dense(), H.to_dense()) <= 1e-13


@pytest.mark.filterwarnings("ignore:left out")
def test_skipped_layers_stay_skipped_in_a_stream() -> None:
    model, data = positional(6, 4)
    acc = hk.FactorAccumulator(model, CE)
    acc.update(*data[0])
    resumed = hk.FactorAccumulator(model, CE)
    resumed.load_state_dict(acc.state_dict())
    merged = hk.FactorAccumulator(model, CE)
    merged.merge(acc)
    for stream in (acc, resumed, merged):
        stream.update(*data[1])
        assert list(stream.factors()) == ["a", "b"]
        assert "[4, 2]" in stream.factors().skipped["p"]
        assert stream.num_samples == 10


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("way", ["update", "consume"])
def test_a_layer_that_has_sums_is_not_skipped(way: str) -> None:
    """It would be lost: the batch is refused, and everything before it stays."""
    model, data = positional(4, 6)
    model.switching = True
    acc = hk.FactorAccumulator(model, CE)
    acc.update(*data[0])
    before = acc.factors()
    assert list(before) == ["a", "p", "b"]
    with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
        acc.update(*data[1]) if way == "update" else acc.consume(data[1:])
    assert_same(acc.factors(), before)
    other = hk.FactorAccumulator(model, CE)
    other.update(*data[1])
    for one, another in ((acc, other), (other, acc)):
        state = one.factors()
        with pytest.raises(ValueError, match="other does not fit: layer 'p' sees inputs"):
            one.merge(another)
        assert_same(one.factors(), state)
    with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
        hk.kronecker_factors(model, data, CE)
    with pytest.raises(ValueError, match=r"layer 'p' sees inputs \[4, 2\]"):
        hk.layer_hessians(model, data, CE)


@pytest.mark.filterwarnings("ignore:left out")
def test_a_batch_that_fits_no_layer_is_refused() -> None:
    model, data = positional(5)
    acc = hk.FactorAccumulator(model, CE)
    with pytest.raises(ValueError, match=r"layer 'a' sees inputs \[1, 3\]"):
        acc.update(data[0][0][0], data[0][1][0])
    acc.update(*data[0])
    assert list(acc.factors()) == ["a", "b"]
