"""Draws belong to samples: factors and Hessians do not depend on how the data comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import LOSSES, softmax_root
from networks import CE, Shaped, Small, classes, randn, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hesskern as hk
from hesskern.passes.draws import Draws
from hesskern.passes.losses import resolve_loss
from hesskern.passes.sample_numbers import Numbers

N = 19
MC: dict[str, Any] = {"output": "mc", "seed": 3}


def model() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


X, Y = randn(N, 4), classes(N, c=3)
DATA = TensorDataset(X, Y)
ORDERED: DataLoader[Any] = DataLoader(DATA, batch_size=5)

ARRANGED: dict[str, Callable[[], Any]] = {
    "other batches": lambda: DataLoader(DATA, batch_size=7),
    "one by one": lambda: DataLoader(DATA),
    "shuffled": lambda: DataLoader(DATA, batch_size=5, shuffle=True),
    "workers": lambda: DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2),
    "subset of all": lambda: DataLoader(
        Subset(DATA, list(range(N - 1, -1, -1))), batch_size=4, shuffle=True
    ),
    # Positions are the numbers here.
    "list": lambda: list(DataLoader(DATA, batch_size=5)),
    "list of other batches": lambda: list(DataLoader(DATA, batch_size=3)),
}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def assert_same(found: hk.Factors, expected: hk.Factors) -> None:
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        close(found[name].output_hessian, layer.output_hessian)
        close(found[name].input_covariance, layer.input_covariance)


def differ(one: hk.Factors, other: hk.Factors) -> bool:
    return all(
        float((one[n].output_hessian - other[n].output_hessian).abs().max()) > 1e-4 for n in one
    )


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_factors(arranged: str, mc_samples: int) -> None:
    given = {**MC, "mc_samples": mc_samples}
    expected = hk.kronecker_factors(model(), ORDERED, CE, **given)
    assert_same(hk.kronecker_factors(model(), ARRANGED[arranged](), CE, **given), expected)
    other = hk.kronecker_factors(model(), ORDERED, CE, **{**given, "seed": 4})
    assert differ(other, expected)


def test_parts_of_the_data_add_up() -> None:
    """As ranks do that have a part each."""
    expected = hk.kronecker_factors(model(), ORDERED, CE, **MC)
    parts = hk.FactorAccumulator(model(), CE, **MC)
    parts.consume(DataLoader(Subset(DATA, range(0, N, 2)), batch_size=4, shuffle=True))
    rest = hk.FactorAccumulator(model(), CE, **MC)
    rest.consume(DataLoader(Subset(DATA, range(1, N, 2)), batch_size=3))
    parts.merge(rest)
    assert_same(parts.factors(), expected)


@pytest.mark.parametrize("name", [*LOSSES, "custom"])
@pytest.mark.parametrize("mc_samples", [1, 2])
def test_every_loss(name: str, mc_samples: int) -> None:
    case = LOSSES["cross-entropy" if name == "custom" else name]
    if name == "probabilities" and len(case.shape) > 1:
        pytest.skip("no tokens")
    loss: dict[str, Any] = (
        {"output_root": softmax_root} if name == "custom" else {"loss": case.loss}
    )
    batches = case.data()
    x, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    data = TensorDataset(x, targets)
    net, given = seeded(Shaped(case.shape)), {**MC, **loss, "mc_samples": mc_samples}
    expected = hk.kronecker_factors(net, [(x, targets)], **given)
    for size in (1, 3):
        loader = DataLoader(data, batch_size=size, shuffle=True)
        assert_same(hk.kronecker_factors(net, loader, **given), expected)


@pytest.mark.parametrize("arranged", ["shuffled", "list"])
def test_both_passes_of_ekfac_draw_the_same(arranged: str) -> None:
    """With one sample in the data S is that of its own draw, the square of one gradient."""
    data = TensorDataset(X[:1], Y[:1])
    E = hk.ekfac(model(), DataLoader(data, shuffle=True), CE, **MC)
    for layer in E.values():
        # A rank-one matrix along its own eigenvectors has one eigenvalue, its trace.
        values = layer.values.flatten().sort(descending=True).values
        assert float(values[0]) > 1e-3
        assert float(values[1]) < 1e-12 * float(values[0])
    expected = hk.ekfac(model(), ORDERED, CE, **MC)
    found = hk.ekfac(model(), ARRANGED[arranged](), CE, **MC)
    for name in expected:
        close(found[name].to_dense(), expected[name].to_dense())


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_hessians_that_run_the_model_again(tolerance: float) -> None:
    """Over a loader that shuffles they are those of stored samples."""
    shuffling = DataLoader(DATA, batch_size=5, shuffle=True)
    stored = hk.layer_hessians(model(), ORDERED, CE, **MC)
    if tolerance:
        again = hk.layer_hessians(model(), ORDERED, CE, memory_budget=0, tolerance=tolerance, **MC)
    else:
        again = hk.layer_hessians(model(), shuffling, CE, memory_budget=0, **MC)
    limit = tolerance or 1e-12
    for name, H in stored.items():
        assert H.cached
        assert not again[name].cached
        dense = H.to_dense()
        for _ in range(2):
            error = (again[name].to_dense() - dense).norm()
            assert float(error) <= limit * float(dense.norm())
        # What other draws give is far from it.
        other = hk.layer_hessians(model(), ORDERED, CE, **{**MC, "seed": 9})[name].to_dense()
        assert float((other - dense).norm()) > 0.05 * float(dense.norm())


class TestStreams:
    """Whoever passes the data again draws anew."""

    def test_epochs(self) -> None:
        found = []
        acc = hk.FactorAccumulator(model(), CE, **MC)
        total: dict[str, Tensor] = {}
        for epoch in range(3):
            acc.consume(DataLoader(DATA, batch_size=4, shuffle=True))
            factors = acc.factors()
            found.append(
                {n: f.output_hessian * (epoch + 1) - total.get(n, 0) for n, f in factors.items()}
            )
            total = {n: f.output_hessian * (epoch + 1) for n, f in factors.items()}
        first = hk.kronecker_factors(model(), ORDERED, CE, **MC)
        for name, layer in first.items():
            close(found[0][name], layer.output_hessian)
            assert not torch.allclose(found[1][name], found[0][name], rtol=1e-3)
            assert not torch.allclose(found[2][name], found[1][name], rtol=1e-3)
        # Again the same three.
        twin = hk.FactorAccumulator(model(), CE, **MC)
        for _ in range(3):
            twin.consume(ORDERED)
        assert_same(twin.factors(), acc.factors())

    def test_single_batches_go_on(self) -> None:
        expected = hk.kronecker_factors(model(), ORDERED, CE, **MC)
        for size in (1, 6):
            acc = hk.FactorAccumulator(model(), CE, **MC)
            for x, y in DataLoader(DATA, batch_size=size):
                acc.update(x, y)
            assert_same(acc.factors(), expected)

    def test_a_batch_that_comes_again_is_drawn_anew(self) -> None:
        acc = hk.FactorAccumulator(model(), CE, **MC)
        acc.update(X, Y)
        first = acc.factors()
        acc.update(X, Y)
        second = {
            n: 2 * f.output_hessian - first[n].output_hessian for n, f in acc.factors().items()
        }
        for name, layer in first.items():
            assert not torch.allclose(second[name], layer.output_hessian, rtol=1e-3)

    @pytest.mark.parametrize("order", ["uc", "cu", "ucu", "cuc"])
    def test_in_turn(self, order: str) -> None:
        """No two calls draw the same for the same samples."""
        acc = hk.FactorAccumulator(model(), CE, **MC)
        found: list[Tensor] = []
        before: Any = 0
        for number, kind in enumerate(order, 1):
            if kind == "u":
                acc.update(X, Y)
            else:
                acc.consume([(X, Y)])
            total = acc.factors()["0"].output_hessian * number
            found.append(total - before)
            before = total
        for i, one in enumerate(found):
            assert not any(torch.allclose(one, other, rtol=1e-3) for other in found[:i])

    @pytest.mark.parametrize("kind", ["update", "consume"])
    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_a_state_goes_on(self, kind: str, at: int) -> None:
        def go_on(acc: hk.FactorAccumulator) -> None:
            if kind == "update":
                acc.update(X[:7], Y[:7])
            else:
                acc.consume([(X[:7], Y[:7])])

        whole = hk.FactorAccumulator(model(), CE, **MC)
        first = hk.FactorAccumulator(model(), CE, **MC)
        for _ in range(at):
            go_on(first)
        second = hk.FactorAccumulator(model(), CE, **MC)
        second.load_state_dict(first.state_dict())
        for _ in range(4):
            go_on(whole)
        for _ in range(at, 4):
            go_on(second)
        for name, layer in whole.factors().items():
            assert torch.equal(layer.output_hessian, second.factors()[name].output_hessian)
        assert whole.state_dict()["draws"] == second.state_dict()["draws"]

    def test_a_state_of_the_sequential_generator_is_refused(self) -> None:
        acc = hk.FactorAccumulator(model(), CE, **MC)
        state = acc.state_dict()
        del state["draws"]
        state.update(format=2, generator=torch.Generator().get_state())
        with pytest.raises(ValueError, match="state has format 2, this version 3"):
            acc.load_state_dict(state)

    @pytest.mark.parametrize("kind", ["update", "consume"])
    def test_what_failed_has_drawn_nothing(self, kind: str) -> None:
        acc = hk.FactorAccumulator(model(), CE, **MC)
        call: Any = acc.update if kind == "update" else lambda x, y: acc.consume([(x, y)])
        with pytest.raises(ValueError, match="NaN"):
            call(X / 0, Y)
        call(X, Y)
        assert_same(acc.factors(), hk.kronecker_factors(model(), [(X, Y)], CE, **MC))


@pytest.mark.parametrize("arranged", ["other batches", "shuffled", "list"])
def test_halves_of_a_batch_draw_as_the_whole(arranged: str) -> None:
    expected = hk.kronecker_factors(Small(model(), 99), ORDERED, CE, **MC)
    assert_same(hk.kronecker_factors(Small(model(), 4), ARRANGED[arranged](), CE, **MC), expected)
    corrected = hk.ekfac(Small(model(), 99), ORDERED, CE, **MC)
    found = hk.ekfac(Small(model(), 4), ARRANGED[arranged](), CE, **MC)
    for name in corrected:
        close(found[name].to_dense(), corrected[name].to_dense())


PADDED = {
    "cross-entropy": (nn.CrossEntropyLoss(), 1),
    "cross-entropy sum": (nn.CrossEntropyLoss(reduction="sum"), 1),
    "masked": (hk.MaskedLM(), 2),
    "tokens": (hk.TokenClassification(), 2),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_padding_does_not_change_a_samples_draws(name: str, mc_samples: int) -> None:
    """On either side or between its tokens: batches pad to the longest that they have."""
    loss, axis = resolve_loss(PADDED[name][0]), PADDED[name][1]
    logits, labels = randn(3, 5, 4), classes(3, 5, c=4)
    wide, targets = randn(3, 9, 4, seed=1), torch.full((3, 9), -100)
    places = torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [0, 2, 3, 7, 8]])
    for n in range(3):
        wide[n, places[n]], targets[n, places[n]] = logits[n], labels[n]

    def rows(outputs: Tensor, given: Tensor) -> Tensor:
        draws = Draws(3).of(Numbers(torch.tensor([6, 2, 40]).numpy()))
        found = loss.sampled(outputs.movedim(2, axis), given, mc_samples, draws)
        return torch.stack([found.row(j) for j in range(mc_samples)]).movedim(axis + 1, 3)

    expected, found = rows(logits, labels), rows(wide, targets)
    assert not torch.equal(expected[0, 0], expected[0, 1])
    for n in range(3):
        close(found[:, n, places[n]], expected[:, n])
        assert float(found[:, n].abs().sum()) == pytest.approx(float(expected[:, n].abs().sum()))


class TimeFirst(nn.Module):
    """Takes [T, N, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = seeded(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Any:
        return self.head(x.sum(0))


def test_samples_in_another_axis_are_drawn_apart() -> None:
    x = randn(1, 6, 4).expand(2, 6, 4)
    found = hk.kronecker_factors(TimeFirst(), [(x, classes(6, c=3))] * 2, CE, **MC)
    once = hk.kronecker_factors(TimeFirst(), [(x, classes(6, c=3))], CE, **MC)
    assert differ(found, once)
