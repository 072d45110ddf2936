"""Sums of batches that begin with whatever memory holds: none of it may come through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense import relative_error
from networks import classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.factors import layer_sums
from hesskern.ops import foreach

CE = nn.CrossEntropyLoss()


@pytest.fixture
def as_usual(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Until it is called, sums of all sizes are laid out as large ones, in memory full of NaN."""
    large, apart = layer_sums._LARGE, layer_sums._APART

    def restore() -> None:
        monkeypatch.setattr(layer_sums, "_LARGE", large)
        monkeypatch.setattr(layer_sums, "_APART", apart)
        torch.use_deterministic_algorithms(False)

    blank: list[float] = []
    started = layer_sums.BatchSum.started

    def noted(self: layer_sums.BatchSum, name: str, matrix: str) -> float:
        blank.append(started(self, name, matrix))
        return blank[-1]

    monkeypatch.setattr(layer_sums.BatchSum, "started", noted)
    monkeypatch.setattr(layer_sums, "_LARGE", 0)
    monkeypatch.setattr(layer_sums, "_APART", 0)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield restore
    torch.use_deterministic_algorithms(False)
    assert 0.0 in blank, "no sum was blank"


class _Growing(nn.Module):
    """Images through convolutions, one of them grouped, and layers of which one comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 2, groups=2)
        self.tokens, self.late, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).tanh()).tanh()
        if len(x) == 2:
            # No gradient reaches what comes before.
            x = x.detach()
        x = self.tokens(x.flatten(2).mT).tanh()
        if len(x) > 3:
            x = self.late(self.late(x).tanh())
        return self.head(x.mean(1))


def _data(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, 2, 6, 6, seed=n), classes(n, c=3, seed=n)) for n in sizes]


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_means_of_several_batches(
    output: Any, bias: Any, decay: float | None, as_usual: Callable[[], None]
) -> None:
    model, data = seeded(_Growing()).double(), _data((3, 2, 5, 4, 7))
    acc = hk.FactorAccumulator(model, CE, output=output, bias=bias, decay=decay)
    acc.consume(data)
    found = acc.factors()
    state = acc.state_dict()
    as_usual()
    whole = hk.FactorAccumulator(model, CE, output=output, bias=bias, decay=decay)
    whole.consume(data)
    expected = whole.factors()
    assert list(found) == list(expected)
    for name, factors in expected.items():
        ours = found[name]
        assert relative_error(ours.input_covariance, factors.input_covariance) <= 1e-12
        assert relative_error(ours.output_hessian, factors.output_hessian) <= 1e-12
    for name, sums in state["layers"].items():
        for matrix in (sums["inputs"], sums["outputs"]):
            # Below diagonals stands what kernels make of data, and nothing else.
            assert matrix.isfinite().all(), name


def test_diagonals_of_large_layers(as_usual: Callable[[], None]) -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    loss, outputs = nn.CrossEntropyLoss(), 4
    data = [(randn(6, 4, seed=i), classes(6, c=3, seed=i)) for i in range(3)]
    found = hk.kronecker_factors(model, data, loss, max_outputs=outputs, diagonal=True)
    as_usual()
    expected = hk.kronecker_factors(model, data, loss, max_outputs=outputs, diagonal=True)
    assert list(found.large) == list(expected.large) == ["0"]
    for one, other in zip(found.large.values(), expected.large.values(), strict=True):
        assert relative_error(one.output_diagonal, other.output_diagonal) <= 1e-12
        assert relative_error(one.input_covariance, other.input_covariance) <= 1e-12
    assert relative_error(found["2"].output_hessian, expected["2"].output_hessian) <= 1e-12


def test_padded_tokens(as_usual: Callable[[], None]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.first(x).tanh() * attention_mask.unsqueeze(-1)
            return self.last(hidden.sum(1))

    model = seeded(Model()).double()
    mask = (torch.arange(5) < torch.tensor([[2], [5], [3]])).long()
    data = [
        ({"x": randn(3, 5, 4, seed=i), "attention_mask": mask}, classes(3, c=3, seed=i))
        for i in range(3)
    ]
    found = hk.kronecker_factors(model, data, CE)
    as_usual()
    expected = hk.kronecker_factors(model, data, CE)
    for name, factors in expected.items():
        ours = found[name]
        assert relative_error(ours.input_covariance, factors.input_covariance) <= 1e-12
        assert relative_error(ours.output_hessian, factors.output_hessian) <= 1e-12


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (7, 7), (3, 5, 5), (300, 300), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triangles_are_added_and_nothing_below(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    targets = [randn(*shape, dtype=dtype), randn(6, 6, seed=1)]
    others = [randn(*shape, seed=2, dtype=dtype), randn(6, 6, seed=3)]
    below = [torch.ones_like(other, dtype=torch.bool).tril(-1) for other in others]
    expected = [t + o.masked_fill(b, 0) for t, o, b in zip(targets, others, below, strict=True)]
    for other, mask in zip(others, below, strict=True):
        other.masked_fill_(mask, torch.nan)
    foreach.add_triangles_(targets, others)
    for target, right in zip(targets, expected, strict=True):
        assert torch.equal(target, right)


def test_triangles_that_do_not_fit_are_refused_before_anything_is_added() -> None:
    good, other = torch.zeros(3, 3), torch.ones(3, 3)
    for bad in (torch.ones(3, 3).double(), torch.ones(2, 2), torch.ones(3, 6)[:, ::2]):
        assert not foreach.have_triangles(good, bad) or bad.shape != good.shape
        with pytest.raises(ValueError, match="add_triangles_: other must be as acc"):
            foreach.add_triangles_([good, torch.zeros(3, 3)], [other, bad])
        assert torch.equal(good, torch.zeros(3, 3))


def test_sums_in_another_dtype(as_usual: Callable[[], None]) -> None:
    """A model that was widened goes on in the dtype of its sums."""
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).float()
    acc = hk.FactorAccumulator(model, CE)
    data = [(randn(6, 4, seed=i), classes(6, c=3, seed=i)) for i in range(4)]
    acc.consume([(x.float(), y) for x, y in data[:2]])
    model.double()
    acc.consume(data[2:])
    found = acc.factors()
    as_usual()
    expected = hk.kronecker_factors(model, data, CE)
    for name, factors in expected.items():
        ours = found[name]
        assert relative_error(ours.input_covariance.double(), factors.input_covariance) <= 1e-5
        assert relative_error(ours.output_hessian.double(), factors.output_hessian) <= 1e-5
