"""certify: what it learns, samples and arguments, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from certificates import FAST, NET, blobs
from certify_cases import SHARED, TERMS, built, run
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from hesskern.pacbayes import (
    Protocol,
    PublishedSettings,
    TruncatedSettings,
    certify,
)
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import state_of


def test_ours_learns_and_leaves_the_model_alone():
    model = built()
    before = state_of(model)
    data = blobs(600)
    found = certify(model, model, data, epochs=40, protocol=TERMS, settings=FAST)
    assert found.bound < 0.6  # the prior alone: about .9
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert found.prior["construction"] == "declared data-free by the user"
    assert len(found.history) == 40
    # The estimate that is shown while training is close to the certificate.
    assert abs(found.history[-1]["estimate"] - found.bound) < 0.05


def loader(**options):
    data = blobs(30)
    return DataLoader(TensorDataset(data.inputs, data.targets), batch_size=8, **options)


def test_every_sample_is_counted_once():
    assert run(loader(shuffle=True)).n == 30
    assert run(loader(), n=30).n == 30
    data = blobs(30)
    cases = {
        "drop_last leaves 6 of 30": loader(drop_last=True),
        "RandomSampler draws": loader(sampler=RandomSampler(data.targets, replacement=True)),
        "WeightedRandomSampler draws": loader(sampler=WeightedRandomSampler([1.0] * 30, 30)),
        "yields 20 samples, its data set holds 30": loader(sampler=list(range(20))),
    }
    for match, source in cases.items():
        with pytest.raises(ValueError, match=match):
            run(source)
    with pytest.raises(ValueError, match="n is 60000, but the data hold 30"):
        run(loader(), n=60_000)


def test_samples_a_prior_has_seen_are_not_counted_again():
    seen, rest = blobs(60).split(0.5, seed=0)
    found = run(rest, prior_data=seen)
    assert (found.n, found.prior["samples seen"]) == (30, 30)
    assert found.prior["fingerprint seen"] == seen.fingerprint() != found.fingerprint
    with pytest.raises(ValueError, match="30 of its samples are among the data"):
        run(blobs(60), prior_data=seen)
    with pytest.raises(ValueError, match="share must leave at least 8 of 60"):
        blobs(60).split(0.05, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "best"}, ValueError, "method must be 'truncated', 'base', .* or 'iter_m'"),
        ({"start": "else"}, ValueError, "start must be"),
        ({"settings": PublishedSettings()}, TypeError, "must be TruncatedSettings"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"minutes": 1.0}, ValueError, "either epochs or minutes"),
        ({"epochs": None, "minutes": -1.0}, ValueError, "minutes must be positive"),
        ({"prior_record": {"seed": 1}}, ValueError, "'construction' is missing"),
        ({"data": 3}, TypeError, "data must be an iterable"),
        ({"data": [3]}, TypeError, "batch 0 must be a pair"),
        ({"data": iter(())}, ValueError, "data is empty"),
        ({"data": blobs(7)}, ValueError, "at least 8 samples"),
    ],
)
def test_wrong_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        run(**options)


def test_published_methods_start_from_the_model():
    with pytest.raises(ValueError, match="starts from the model's weights"):
        run(method="iter", start="prior", settings=None)
    data = blobs()
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(NotImplementedError, match="iter_m needs a chain of Linear"):
        certify(model, model, data, "iter_m", epochs=1, protocol=SHARED)


def test_bad_samples_and_models_are_named():
    data = blobs(20)
    bad = data.inputs.clone()
    bad[3, 0, 0, 0] = math.nan
    cases = [
        (Samples(bad, data.targets), "inputs must be finite"),
        (Samples(data.inputs, data.targets + 1), r"targets must lie in 0\.\.9, got 1\.\.10"),
        (Samples(data.inputs, data.targets.float()), "targets must be integer"),
    ]
    for samples, match in cases:
        with pytest.raises(ValueError, match=match):
            run(samples)
    with pytest.raises(TypeError, match="prior must be a module or a state dict"):
        certify(built(), 3, data)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        certify(3, built(), data)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Protocol(delta=0.0),
        lambda: Protocol(delta_draws=1.0),
        lambda: Protocol(form="other"),
        lambda: Protocol(sampling="other"),
        lambda: Protocol(passes=0),
        lambda: Protocol(group=0),
        lambda: TruncatedSettings(rank_in=0),
        lambda: TruncatedSettings(rate_mean=0.0),
        lambda: PublishedSettings(rate=-1.0),
        lambda: PublishedSettings(batch_size=0),
    ],
)
def test_settings_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_a_budget_of_minutes_is_kept():
    found = run(epochs=None, minutes=0.01)
    assert found.seconds["optimization"] < 5
    assert found.settings["minutes"] == 0.01
    assert not found.interrupted


def test_binary_networks_have_one_output():
    data = blobs()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1))
    samples = Samples(data.inputs, (data.targets >= 5).long())
    found = certify(model, model, samples, epochs=2, protocol=TERMS, settings=FAST)
    found.verify(samples)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.1"):
        certify(model, model, data, epochs=2, protocol=TERMS, settings=FAST)


@pytest.mark.parametrize(("seed", "weight"), [(1, 1e-5), (2, 1e-7), (3, 1e-5), (3, 1e-7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_posterior_that_equals_its_prior_is_certified(seed, weight, dtype):
    """In float32 these four once ended below zero: "kl_divergence must be non-negative"."""
    model, data = NET.build((1, 3, 4), seed).to(dtype), blobs(200)
    slow = replace(FAST, rate_mean=1e-12, rate_ratio=1e-12, rate_prior=1e-12)
    settings = replace(slow, error_weight=weight, warm_up=1.0)
    samples = Samples(data.inputs.to(dtype), data.targets)
    found = certify(model, model, samples, epochs=4, protocol=TERMS, settings=settings)
    assert 0 < found.kl < 1e-8
    assert all(0 < entry["kl"] < 1e-8 for entry in found.history)
    assert found.history[-1]["kl"] == pytest.approx(found.kl, rel=1e-3)
