"""Factors from a stream: pieces, merging, decay, resuming."""

from __future__ import annotations

import io

import pytest
import torch
from dense import layer_factors, relative_error
from networks import CASES, CE, classes, randn, sample_loss, seeded
from same_factors import FACTORS, assert_same
from torch import Tensor, nn

import hesskern as hk


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence", "twice", "dict", "linear"])
def test_pieces_make_the_whole(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    stream = hk.FactorAccumulator(model, CE, bias=bias)
    for x, y in data:
        stream.update(x, y)
    assert stream.num_samples == 7
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE, bias=bias))
    again = hk.FactorAccumulator(model, CE, bias=bias)
    again.consume(data)
    assert_same(again.factors(), stream.factors())


def test_the_split_into_batches_does_not_matter() -> None:
    case = CASES["conv stride"]
    model = case.model()
    x, y = case.inputs(7), classes(7, c=3)
    whole = hk.kronecker_factors(model, [(x, y)], CE)
    for size in (1, 2, 5):
        stream = hk.FactorAccumulator(model, CE)
        for i in range(0, 7, size):
            stream.update(x[i : i + size], y[i : i + size])
        assert_same(stream.factors(), whole, 1e-12)


def test_looking_in_between_changes_nothing() -> None:
    case = CASES["conv groups"]
    model, data = case.model(), case.data()
    stream = hk.FactorAccumulator(model, CE, bias="joint")
    stream.update(*data[0])
    first = stream.factors()
    before = {layer: first[layer].output_hessian.clone() for layer in first}
    assert_same(first, hk.kronecker_factors(model, data[:1], CE, bias="joint"))
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE, bias="joint"))
    for layer in first:
        assert torch.equal(first[layer].output_hessian, before[layer])
        # What was handed out is the caller's: changing it does not reach the accumulator.
        first[layer].output_hessian.zero_()
        first[layer].input_covariance.zero_()
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE, bias="joint"))


def test_nothing_seen_yet() -> None:
    stream = hk.FactorAccumulator(CASES["relu"].model(), CE)
    assert stream.num_samples == 0
    with pytest.raises(ValueError, match="no samples"):
        stream.factors()


# Merging


@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence"])
def test_merging_equals_one_pass(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    parts = [hk.FactorAccumulator(model, CE, bias="joint", seed=i) for i in range(2)]
    for part, (x, y) in zip(parts, data, strict=True):
        part.update(x, y)
    other = parts[1].factors()
    parts[0].merge(parts[1])
    assert_same(parts[0].factors(), hk.kronecker_factors(model, data, CE, bias="joint"), 1e-14)
    assert_same(parts[1].factors(), other)
    # Both go on by themselves.
    parts[1].update(*data[0])
    assert_same(parts[0].factors(), hk.kronecker_factors(model, data, CE, bias="joint"), 1e-14)
    empty = hk.FactorAccumulator(model, CE, bias="joint")
    empty.merge(parts[0])
    assert_same(empty.factors(), parts[0].factors())
    empty.update(*data[0])
    assert_same(parts[0].factors(), hk.kronecker_factors(model, data, CE, bias="joint"), 1e-14)


def test_merging_what_does_not_belong_together() -> None:
    model = CASES["relu"].model()
    stream = hk.FactorAccumulator(model, CE)
    with pytest.raises(TypeError, match="other must be a FactorAccumulator, got dict"):
        stream.merge({})  # type: ignore[arg-type]
    for other in (
        hk.FactorAccumulator(model, CE, bias="joint"),
        hk.FactorAccumulator(model, CE, output="mc"),
        hk.FactorAccumulator(model, CE, decay=0.5),
    ):
        with pytest.raises(ValueError, match="other was made with settings"):
            stream.merge(other)
    for layers in (["0"], ["0", "2"]):
        with pytest.raises(ValueError, match="other has other layers"):
            stream.merge(hk.FactorAccumulator(model, CE, layers=layers))


# Moving averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence"])
def test_decay_against_a_moving_average_by_hand(name: str, decay: float) -> None:
    case = CASES[name]
    model = case.model()
    data = [(case.inputs(n, seed), classes(n, c=3, seed=seed)) for seed, n in enumerate((3, 5, 2))]
    stream = hk.FactorAccumulator(model, CE, decay=decay, bias="joint")
    averages: dict[str, dict[str, Tensor]] = {}
    for step, (x, y) in enumerate(data, 1):
        stream.update(x, y)
        found = stream.factors()
        for layer in found:
            joint = model.get_submodule(layer).bias is not None
            batch = layer_factors(model, [(x, y)], sample_loss, layer, joint=joint)
            old = averages.setdefault(layer, {k: torch.zeros_like(v) for k, v in batch.items()})
            for key, value in batch.items():
                old[key] = decay * old[key] + (1 - decay) * value
            # Without the correction the first average would be (1 - decay) times too small.
            start_up = 1 - decay**step
            f = found[layer]
            assert relative_error(f.output_hessian, old["output_hessian"] / start_up) <= 1e-12
            assert relative_error(f.input_covariance, old["input_covariance"] / start_up) <= 1e-12
            mean = f.input_mean if f.input_mean.dim() == 2 else f.input_mean[:, None]
            assert relative_error(mean, old["input_mean"] / start_up) <= 1e-12
            assert f.positions == pytest.approx(mean.shape[1])


def test_decay_takes_weighted_batch_means_and_skips_batches_without_weight() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    weights = [randn(4, seed=1).abs(), randn(3, seed=2).abs()]
    stream = hk.FactorAccumulator(model, CE, decay=0.8)
    stream.update(*data[0], sample_weight=torch.zeros(4))
    with pytest.raises(ValueError, match="no samples"):
        stream.factors()
    stream.update(*data[0], sample_weight=weights[0])
    stream.update(*data[1], sample_weight=torch.zeros(3))
    stream.update(*data[1], sample_weight=10 * weights[1])
    for layer, f in stream.factors().items():
        first, second = (
            layer_factors(model, [batch], sample_loss, layer, weights=[w])
            for batch, w in zip(data, weights, strict=True)
        )
        for factor in FACTORS:
            expected = (0.8 * 0.2 * first[factor] + 0.2 * second[factor]) / (1 - 0.8**2)
            assert relative_error(getattr(f, factor), expected) <= 1e-12


# Stopping and going on


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_state_dict_round_trip_and_resume(output: str, decay: float | None) -> None:
    case = CASES["conv groups"]
    model = case.model()
    data = [(case.inputs(n, seed), classes(n, c=3, seed=seed)) for seed, n in enumerate((3, 4, 2))]

    def make() -> hk.FactorAccumulator:
        return hk.FactorAccumulator(
            model, CE, output=output, decay=decay, bias="joint", mc_samples=2, seed=4
        )

    whole, first = make(), make()
    for batch in data:
        whole.update(*batch)
    first.update(*data[0])
    first.update(*data[1])
    state = first.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed.factors(), first.factors())
    resumed.update(*data[2])
    assert_same(resumed.factors(), whole.factors())
    # The state is a copy, both ways.
    untouched = make()
    untouched.load_state_dict(state)
    first.update(*data[2])
    again = make()
    again.load_state_dict(state)
    again.update(*data[2])
    assert_same(again.factors(), whole.factors())
    untouched.update(*data[2])
    assert_same(untouched.factors(), whole.factors())


def test_states_that_do_not_belong_here_change_nothing() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    stream = hk.FactorAccumulator(model, CE)
    stream.update(*data[0])
    before = stream.factors()
    foreign = hk.FactorAccumulator(CASES["residual"].model(), CE)
    foreign.update(*CASES["residual"].data()[0])
    wider = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    wider = hk.FactorAccumulator(seeded(wider), CE)
    wider.update(*data[0])
    partial = stream.state_dict()
    del partial["count"]
    for state, message in (
        (foreign.state_dict(), "state has a layer '.*' that this accumulator lacks"),
        (
            wider.state_dict(),
            r"state has layer '0' with \(m, d\) = \(7, 4\), the model has \(6, 4\)",
        ),
        (hk.FactorAccumulator(model, CE, seed=9).state_dict(), "state was made with settings"),
        (hk.FactorAccumulator(model, CE, decay=0.5).state_dict(), "state was made with settings"),
        (partial, r"state must come from state_dict\(\); it lacks count"),
        ({}, r"state must come from state_dict\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(state)
        assert_same(stream.factors(), before)
    stream.update(*data[1])
    assert_same(stream.factors(), hk.kronecker_factors(model, data, CE))


# Weights that do not fit the data


@pytest.mark.parametrize("length", [0, 1, 10, 12, 40])
@pytest.mark.parametrize("kind", ["list", "loader", "generator"])
def test_weights_of_another_length_add_nothing(kind: str, length: int) -> None:
    model, data = seeded(nn.Linear(3, 3)), [(randn(n, 3), classes(n, c=3)) for n in (4, 5, 2)]
    make = {
        "list": lambda: data,
        "loader": lambda: torch.utils.data.DataLoader(data, batch_size=None),
        "generator": lambda: iter(data),
    }[kind]
    acc = hk.FactorAccumulator(model, CE, output="mc")
    acc.update(*data[0])
    before, state = acc.factors(), acc.state_dict()
    with pytest.raises(ValueError, match=f"sample_weight has {length} entries but the data has"):
        acc.consume(make(), sample_weight=torch.ones(length))
    assert_same(acc.factors(), before)
    assert acc.state_dict()["batches"] == 1
    assert acc.state_dict()["draws"] == state["draws"]
    acc.consume(make(), sample_weight=torch.full((11,), 2.0))
    assert acc.num_samples == 4 + 22


def test_weights_of_another_length_are_found_before_the_first_batch() -> None:
    calls: list[int] = []
    model = seeded(nn.Linear(3, 3))
    model.register_forward_hook(lambda *_: calls.append(1))
    data = [((randn(4, 3),), classes(4, c=3)), ({"input": randn(5, 3)}, classes(5, c=3))]
    for function in (hk.kronecker_factors, hk.layer_hessians):
        with pytest.raises(ValueError, match="sample_weight has 8 entries but the data has 9"):
            function(model, data, CE, sample_weight=torch.ones(8))
    assert calls == []
    hk.kronecker_factors(model, data, CE, sample_weight=torch.ones(9))
    assert len(calls) == 2


def test_consume_keeps_the_batches_before_a_bad_one_unless_weights_are_given() -> None:
    model, good, bad = seeded(nn.Linear(3, 3)), randn(4, 3), torch.full((4, 3), torch.nan).double()
    data = [(good, classes(4, c=3)), (bad, classes(4, c=3))]
    for weight, count in ((None, 4), (torch.ones(8), 0)):
        acc = hk.FactorAccumulator(model, CE)
        with pytest.raises(ValueError, match="NaN or Inf in batch 1"):
            acc.consume(data, sample_weight=weight)
        assert acc.num_samples == count
