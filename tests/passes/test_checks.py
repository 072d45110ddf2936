"""A pass that never waits for its device: conditions on the data are looked at when it ends.

The CPU plays the device: its flags count as out of reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from networks import CE, classes, randn, seeded
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hesskern as hk
from hesskern.devices import HostCopy
from hesskern.passes import checks

Data = list[tuple[Any, ...]]


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("checks", "roots", "losses"):
        monkeypatch.setattr(f"hesskern.passes.{module}.on_host", lambda tensor: False)


class _Waiting(AssertionError):
    """The host would have waited."""


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        if getattr(function, "__name__", "") in ("tolist", "item", "numpy", "__bool__"):
            raise _Waiting(function)
        return function(*args, **(kwargs or {}))


class _NoSizes(TorchDispatchMode):
    """Operations whose results' sizes depend on values, and values themselves."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise _Waiting(name)
        return function(*args, **(kwargs or {}))


class Unwatched:
    """Data after whose first ``watch_after`` batches no value may be looked at."""

    def __init__(self, data: Data, watch_after: int = 0) -> None:
        self._data, self._after = data, watch_after

    def __iter__(self) -> Iterator[Any]:
        yield from self._data[: self._after]
        with _NoValues(), _NoSizes():
            yield from self._data[self._after :]


def model() -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(),
            nn.Linear(5, 4),
        )
    )  # fmt: skip


def batches(count: int = 5) -> Data:
    return [(randn(6, 2, 4, 4, seed=i), classes(6, c=4, seed=i)) for i in range(count)]


def weighted() -> Data:
    return [(x, y, randn(6, seed=9 + i).abs()) for i, (x, y) in enumerate(batches())]


def partly_ignored() -> Data:
    data = [(x, y.clone()) for x, y in batches()]
    for i, (_, y) in enumerate(data):
        y[: i + 1] = -100
    return data


def with_probabilities() -> Data:
    return [(x, torch.softmax(randn(6, 4, seed=i), 1)) for i, (x, _) in enumerate(batches())]


def values() -> Data:
    return [(x, randn(6, 4, seed=i)) for i, (x, _) in enumerate(batches())]


def labels() -> Data:
    return [(x, randn(6, 4, seed=i).sigmoid()) for i, (x, _) in enumerate(batches())]


CASES = {
    "classes": (batches, CE),
    "sums": (batches, nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)),
    "weights": (weighted, CE),
    "ignored": (partly_ignored, CE),
    "probabilities": (with_probabilities, CE),
    "squares": (values, nn.MSELoss()),
    "logistic": (labels, nn.BCEWithLogitsLoss()),
}


def assert_same(a: hk.Factors, b: hk.Factors) -> None:
    assert list(a) == list(b)
    for name, layer in a.items():
        torch.testing.assert_close(layer.input_covariance, b[name].input_covariance)
        torch.testing.assert_close(layer.output_hessian, b[name].output_hessian)
        torch.testing.assert_close(layer.input_mean, b[name].input_mean)
        assert layer.num_samples == pytest.approx(b[name].num_samples, rel=1e-12)
        assert layer.positions == pytest.approx(b[name].positions, rel=1e-12)


@pytest.mark.usefixtures("as_on_a_device")
class TestNothingWaits:
    @pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("decay", [None, 0.8])
    def test_factors(self, case: str, output: str, decay: float | None) -> None:
        data, loss = CASES[case][0](), CASES[case][1]
        given: dict[str, Any] = {"output": output, "decay": decay, "bias": "joint", "seed": 1}
        stream = hk.FactorAccumulator(model(), loss, **given)
        stream.consume(Unwatched(data))
        with pytest.MonkeyPatch.context() as at_once:
            for module in ("checks", "roots", "losses"):
                at_once.setattr(f"hesskern.passes.{module}.on_host", lambda tensor: True)
            expected = hk.FactorAccumulator(model(), loss, **given)
            expected.consume(data)
        assert isinstance(stream._count, float)
        assert_same(stream.factors(), expected.factors())
        assert stream.state_dict()["draws"] == expected.state_dict()["draws"]

    @pytest.mark.parametrize("case", CASES)
    def test_hessians(self, case: str) -> None:
        data, loss = CASES[case][0](), CASES[case][1]
        for budget, tolerance in ((2**30, 0.0), (0, 0.0), (0, 1e-3)):
            found = hk.layer_hessians(
                model(), Unwatched(data), loss, memory_budget=budget, tolerance=tolerance
            )
            for name, H in hk.layer_hessians(model(), data, loss).items():
                v = randn(H.shape[0])
                # The samples left out change little.
                torch.testing.assert_close(found[name] @ v, H @ v, rtol=0.1, atol=0.1)

    def test_everything_else(self) -> None:
        data = Unwatched(batches())
        K, H = hk.GaussNewton(model(), data, CE), hk.GaussNewton(model(), batches(), CE)
        v = randn(K.shape[0])
        torch.testing.assert_close(K @ v, H @ v)
        tight = hk.GaussNewton(model(), data, CE, memory_budget=0)
        torch.testing.assert_close(tight @ v, H @ v)
        R = hk.AutogradHessian(model(), data, CE, params=["5.weight"])
        S = hk.AutogradHessian(model(), batches(), CE, params=["5.weight"])
        torch.testing.assert_close(R @ v[:20], S @ v[:20])


def spoiled(at: int, what: str) -> tuple[Data, Any]:
    """Five batches, of which one is bad, and the loss."""
    data = batches()
    x, y = data[at]
    loss: Any = CE
    if what == "inputs":
        x = x.clone()
        x[2, 0, 1, 1] = float("nan")
    elif what == "class":
        y = y.clone()
        y[3] = 4
    elif what == "probabilities":
        data = with_probabilities()
        y = data[at][1] * 1.5
    elif what == "labels":
        data, loss = labels(), nn.BCEWithLogitsLoss()
        y = data[at][1] - 0.5
    data[at] = (x, y)
    if what == "weight":
        data = [(*batch, torch.ones(6)) for batch in data]
        data[at][2][4] = -2.5
    return data, loss


@pytest.mark.parametrize("what", ["inputs", "class", "probabilities", "labels", "weight"])
class TestBadBatches:
    @pytest.mark.parametrize("at", [0, 2, 4])
    @pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
    @pytest.mark.parametrize("decay", [None, 0.8])
    def test_what_came_before_stays(
        self,
        what: str,
        at: int,
        output: str,
        decay: float | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        data, loss = spoiled(at, what)
        streams = []
        for on_device in (False, True):
            if on_device:
                for module in ("checks", "roots", "losses"):
                    monkeypatch.setattr(f"hesskern.passes.{module}.on_host", lambda tensor: False)
            stream = hk.FactorAccumulator(model(), loss, output=output, decay=decay)
            with pytest.raises(ValueError, match=r"contain NaN|must") as caught:
                stream.consume(data)
            # The same error as at once, and the rest of the data goes on.
            streams.append((stream, str(caught.value), stream.num_samples))
            if at < 4:
                stream.consume(data[at + 1 :])
        (first, message, seen), (second, later_message, later_seen) = streams
        assert message == later_message
        assert seen == pytest.approx(later_seen, rel=1e-12)
        if at < 4:
            assert_same(first.factors(), second.factors())
        one, two = first.state_dict(), second.state_dict()
        assert one["batches"] == two["batches"]
        assert one["draws"] == two["draws"]

    @pytest.mark.usefixtures("as_on_a_device")
    def test_everything_else(self, what: str) -> None:
        data, loss = spoiled(3, what)
        if what != "weight":
            hessian = hk.AutogradHessian(model(), data, loss, params=["5.weight"])
            if what != "inputs":
                with pytest.raises(ValueError, match="must"):
                    hessian @ torch.ones(20, dtype=torch.float64)
        for budget in (2**30, 0):
            for call in (hk.layer_hessians, hk.GaussNewton):
                with pytest.raises(ValueError, match=r"contain NaN|must"):
                    call(model(), data, loss, memory_budget=budget)


@pytest.mark.usefixtures("as_on_a_device")
class TestOrder:
    def test_the_earlier_of_two_errors(self) -> None:
        data, _ = spoiled(2, "inputs")

        def interrupted() -> Iterable[Any]:
            yield from data[:4]
            raise KeyboardInterrupt

        stream = hk.FactorAccumulator(model(), CE)
        with pytest.raises(ValueError, match="batch 2"):
            stream.consume(interrupted())
        assert_same(stream.factors(), hk.kronecker_factors(model(), data[:2], CE))

    def test_an_error_after_good_batches(self) -> None:
        stream = hk.FactorAccumulator(model(), CE)
        with pytest.raises(ValueError, match="targets must be"):
            stream.consume([*batches(3), (randn(6, 2, 4, 4), classes(5, c=4))])
        assert_same(stream.factors(), hk.kronecker_factors(model(), batches(3), CE))

    @pytest.mark.parametrize("call", [hk.layer_hessians, hk.GaussNewton])
    def test_the_earlier_of_two_errors_in_other_passes(self, call: Any) -> None:
        data, _ = spoiled(1, "inputs")
        data[3] = (data[3][0], classes(5, c=4))
        with pytest.raises(ValueError, match="batch 1"):
            call(model(), data, CE)

    def test_shapes_that_varied_wait_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pooled = seeded(
            nn.Sequential(
                nn.Conv1d(2, 3, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 4)
            )
        )
        settled = []
        settle = checks.Checks.settle
        monkeypatch.setattr(
            checks.Checks, "settle", lambda self: (settled.append(len(self._pending)), settle(self))
        )
        lengths = (5, 6, 7, 6, 6, 6, 6)
        stream = hk.FactorAccumulator(pooled, CE)
        stream.consume((randn(6, 2, t, seed=t), classes(6, c=4)) for t in lengths)
        # Other shapes, and the end of the pass.
        assert settled == [2, 5]

    def test_images_of_other_sizes(self) -> None:
        pooled = seeded(
            nn.Sequential(
                nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
            )
        )
        data = [*batches(2), (randn(6, 2, 5, 5), classes(6, c=4)), *batches(1)]
        data[2][0][0, 0, 0, 0] = float("inf")
        stream = hk.FactorAccumulator(pooled, CE)
        with pytest.raises(ValueError, match="inputs of layer '0' contain NaN or Inf in batch 2"):
            stream.consume(data)
        # The images still have one shape, so the factors have their mean.
        assert stream.factors()["0"].input_images is not None


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_wide_under_autocast(
    deferred: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if deferred:
        for module in ("checks", "roots", "losses"):
            monkeypatch.setattr(f"hesskern.passes.{module}.on_host", lambda tensor: False)
    layers = seeded(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))).float()
    data: Data = [(1 + randn(6, 3, seed=i).float(), classes(6, c=4, seed=i)) for i in range(40)]
    if weighted:
        data = [(*batch, torch.ones(6)) for batch in data]
    exact = hk.kronecker_factors(layers, data, CE)["0"]
    with torch.autocast("cpu", torch.bfloat16):
        found = hk.kronecker_factors(layers, data, CE)["0"]
        means = hk.GaussNewton(layers, data, CE)._input_means["0"]
    assert found.input_mean.dtype == torch.float32
    torch.testing.assert_close(found.input_mean, exact.input_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.input_covariance, exact.input_covariance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means, exact.input_mean, rtol=1e-5, atol=1e-6)


def test_flags_that_have_arrived_are_looked_at() -> None:
    class Arrived:
        def __init__(self, done: bool) -> None:
            self.done = done

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

    def pending(good: bool, done: bool, name: str) -> Any:
        condition = checks._Condition(lambda value: f"{name} {value:g}", TypeError, 1)
        numbers = HostCopy(torch.tensor([float(good), 7.0], dtype=torch.float64))
        numbers._event = Arrived(done)
        return checks._Pending(numbers, [condition], name)

    found = checks.Checks()
    found._pending.extend([pending(True, True, "a"), pending(False, False, "b")])
    found.poll()
    assert len(found._pending) == 1
    found._pending.append(pending(False, True, "c"))
    found.poll()
    with pytest.raises(TypeError, match="b 7"):
        found.settle()
    assert found.failed == "b"
    found.settle()


def test_conditions_on_the_host_are_looked_at_at_once() -> None:
    found = checks.Checks()
    assert found.require(torch.tensor(True), lambda: "never")
    with pytest.raises(ValueError, match="down to -1"):
        found.require(
            torch.tensor(False), lambda least: f"down to {least:g}", lambda: torch.tensor(-1.0)
        )
    assert found.close() is None
    found.settle()


def test_values_that_are_there_are_told_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"9007199254740991 and -2\.5"):
        checks.Checks().require(
            torch.tensor([False]),
            lambda whole, part: f"{whole:.0f} and {part}",
            torch.tensor(2**53 - 1),
            torch.tensor([-2.5]),
        )


@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn"])
def test_sparse_tensors_are_named(layout: str) -> None:
    tensor = torch.eye(3)
    checks.check_dense(tensor, "targets")
    with pytest.raises(
        TypeError,
        match=r"^targets must be dense, got a tensor \[3, 3\] of layout torch._?\w+; pass",
    ):
        checks.check_dense(getattr(tensor, layout)(), "targets")
