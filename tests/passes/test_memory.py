"""Devices whose memory does not suffice: less at a time once, then advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from networks import CE, Small, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes import memory


def model() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(randn(n, 3, seed=n), classes(n, c=4, seed=n)) for n in (4, 7, 5)]


def assert_same(a: hk.Factors, b: hk.Factors) -> None:
    for name, layer in b.items():
        found = a[f"inner.{name}"]
        for factor in ("input_covariance", "output_hessian", "input_mean"):
            torch.testing.assert_close(getattr(found, factor), getattr(layer, factor))
        assert found.num_samples == pytest.approx(layer.num_samples)


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_a_batch_in_two_halves(output: str, decay: float | None) -> None:
    given: dict[str, Any] = {"output": output, "decay": decay, "seed": 2}
    streams = [hk.FactorAccumulator(m, CE, **given) for m in (Small(model(), 4), model())]
    weights = randn(16).abs()
    for stream in streams:
        stream.consume(batches(), sample_weight=weights)
    assert_same(streams[0].factors(), streams[1].factors())
    states = [stream.state_dict() for stream in streams]
    assert states[0]["batches"] == states[1]["batches"] == 3


def test_a_half_that_is_too_large_as_well() -> None:
    stream = hk.FactorAccumulator(Small(model(), 2), CE)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"smaller batches(.|\n)*no room for 3 samples"
    ):
        stream.consume(batches())
    # The first batch fits in two halves; what was accumulated stays.
    assert_same(stream.factors(), hk.kronecker_factors(model(), batches()[:1], CE))
    stream.update(*batches()[0])


@pytest.mark.parametrize("output", ["exact", "empirical"])
def test_halves_keep_what_was_found_of_their_targets(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("checks", "roots", "losses"):
        monkeypatch.setattr(f"hesskern.passes.{module}.on_host", lambda tensor: False)
    data = batches()
    data[1][1][5] = 4
    stream = hk.FactorAccumulator(Small(model(), 4), CE, output=output)
    with pytest.raises(ValueError, match="found 4"):
        stream.consume(data)
    assert_same(stream.factors(), hk.kronecker_factors(model(), batches()[:1], CE, output=output))


def test_a_batch_that_cannot_be_cut() -> None:
    class Masked(Small):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return super().forward(x) + (mask @ mask)[:, :4]

    x, y = batches()[1]
    with pytest.raises(torch.OutOfMemoryError, match="smaller batches"):
        hk.kronecker_factors(Masked(model(), 4), [((x, torch.zeros(7, 7, dtype=x.dtype)), y)], CE)


def test_one_sample_cannot_be_halved() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="smaller batches"):
        hk.kronecker_factors(Small(model(), 0), [(randn(1, 3), classes(1, c=4))], CE)


def rows_kept(budget: int | None, fails_above: int, data: Any) -> Callable[[Any], Any]:
    """A call of a pass that stores samples, on a device that fails beyond so many bytes."""

    def call(function: Any) -> Any:
        from hesskern.operators import gathering, gauss_newton, position_mean, samples

        def rows(specs: Any, roots: Any, allowed: int, keep_positions: bool = False) -> Any:
            if allowed > fails_above:
                raise torch.OutOfMemoryError(f"no {allowed} bytes")
            return samples.layer_rows(specs, roots, allowed, keep_positions)

        with pytest.MonkeyPatch.context() as patch:
            for module in (gathering, gauss_newton, position_mean):
                patch.setattr(module, "layer_rows", rows)
            return function(model(), data, CE, memory_budget=budget)

    return call


def position_means(model: nn.Module, data: Any, loss: Any, **given: Any) -> Any:
    return hk.position_mean_hessian(model, data, loss, "0", **given)


@pytest.mark.parametrize("function", [hk.layer_hessians, hk.GaussNewton, position_means])
class TestStoredSamples:
    def test_a_quarter_of_the_budget(self, function: Any) -> None:
        found = rows_kept(2**20, 2**18, batches())(function)
        expected = function(model(), batches(), CE)
        pairs = (
            [(found[n], H) for n, H in expected.items()]
            if function is hk.layer_hessians
            else [(found, expected)]
        )
        for one, other in pairs:
            v = randn(other.shape[0])
            torch.testing.assert_close(one @ v, other @ v)

    def test_not_even_that(self, function: Any) -> None:
        with pytest.raises(torch.OutOfMemoryError, match=r"memory_budget=(.|\n)*no 262144 bytes"):
            rows_kept(2**20, 2**17, batches())(function)

    def test_data_that_comes_once(self, function: Any) -> None:
        def once() -> Iterator[Any]:
            yield from batches()

        with pytest.raises(torch.OutOfMemoryError, match="memory_budget="):
            rows_kept(2**20, 2**18, once())(function)


def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert memory.budget_for(None, cpu, 123, 0.5) == 123
    assert memory.budget_for(77, gpu, 123, 0.5) == 77
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    sizes = {"reserved_bytes": 300, "allocated_bytes": 100}
    known = {name: {"all": {"current": size}} for name, size in sizes.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: known)
    assert memory.budget_for(None, gpu, 123, 0.25) == 300
    with pytest.raises(TypeError, match="memory_budget must be a number of bytes, got str"):
        memory.budget_for("1 GB", cpu, 123, 0.5)


SAMPLES, CLASSES, HIDDEN = 64, 4000, 72
BUDGET = 2**26


def many_classes(activation: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Linear(16, HIDDEN), activation, nn.Linear(HIDDEN, CLASSES)).float()
    x = randn(SAMPLES, 16, dtype=torch.float32)
    return seeded(net).float(), [(x, classes(SAMPLES, c=CLASSES))]


def accumulated(
    net: nn.Module, data: Any, loss: Any, layers: list[str], memory_budget: int
) -> hk.Factors:
    stream = hk.FactorAccumulator(net, loss, layers, memory_budget=memory_budget)
    stream.consume(data)
    return stream.factors()


def peak_of_one_row(net: nn.Module, data: Any) -> int:
    """Of what is needed anyway: the model's graph, and one row."""
    return peak_bytes(lambda: hk.kronecker_factors(net, data, CE, ["0"], output="mc"))


@pytest.mark.filterwarnings("ignore:the Gauss-Newton block is not the Hessian")
@pytest.mark.parametrize(
    ("function", "activation"),
    [
        # In blocks.
        (hk.kronecker_factors, nn.ReLU()),
        (hk.layer_hessians, nn.ReLU()),
        (hk.GaussNewton, nn.ReLU()),
        # By autograd, row by row.
        (accumulated, nn.Softmax(1)),
        (hk.layer_hessians, nn.Softmax(1)),
    ],
)
def test_the_budget_holds_with_many_classes(function: Any, activation: nn.Module) -> None:
    net, data = many_classes(activation)
    row = 4 * SAMPLES * (CLASSES + HIDDEN)
    # More than the budget, and the roots of all rows are 60 times as much.
    assert 4 * SAMPLES * HIDDEN * CLASSES > 1.09 * BUDGET
    peak = peak_bytes(lambda: function(net, data, CE, ["0"], memory_budget=BUDGET))
    assert peak <= 1.25 * BUDGET + row + peak_of_one_row(net, data)


def test_rows_of_many_classes_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = model(), batches()
    expected = hk.layer_hessians(net, data, CE)
    factors = hk.kronecker_factors(net, data, CE)
    monkeypatch.setattr("hesskern.passes.losses._TOGETHER_BYTES", 0)
    for budget in (0, 200, 2000, 20_000, 2**30):
        found = hk.layer_hessians(net, data, CE, memory_budget=budget)
        own = hk.kronecker_factors(net, data, CE, memory_budget=budget)
        G = hk.GaussNewton(net, data, CE, memory_budget=budget)
        for name, H in expected.items():
            torch.testing.assert_close(found[name].to_dense(), H.to_dense())
            torch.testing.assert_close(own[name].output_hessian, factors[name].output_hessian)
            part = G.slices[name]
            torch.testing.assert_close(G.to_dense()[part, part], H.to_dense())


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_many_draws_are_not_held(loss: nn.Module) -> None:
    net, data = many_classes(nn.ReLU())
    wide = [(data[0][0], torch.zeros(SAMPLES, CLASSES))]

    def peak(draws: int) -> int:
        return peak_bytes(
            lambda: hk.kronecker_factors(
                net, wide, loss, ["0"], "mc", mc_samples=draws, memory_budget=2**22
            )
        )

    # 100 draws of all outputs would be 100 MB.
    assert peak(100) <= 1.25 * 2**22 + peak(1) + 4 * SAMPLES * CLASSES
