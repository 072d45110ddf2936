"""Runs of certify that are killed, interrupted, gone on with, or fail on a device."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from certificates import FAST, blobs
from certify_cases import SHARED, TERMS, built, run, same, trained

from hesskern.pacbayes import (
    METHODS,
    PUBLISHED,
    CertifySettings,
    NaturalSettings,
    PublishedSettings,
    TruncatedSettings,
    certify,
    certify_with,
)
from hesskern.pacbayes.published_methods import Published
from hesskern.pacbayes.truncated_method import Truncated


@pytest.mark.parametrize("method", ["truncated", "iter"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(method, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    data = blobs()
    options = {
        "epochs": 6,
        "checkpoint_every": 0,
        "protocol": SHARED if method == "iter" else TERMS,
    }
    options["settings"] = PublishedSettings(batch_size=50) if method == "iter" else FAST
    kind = Published if method == "iter" else Truncated
    whole = certify(trained(data), built(), data, method, **options)
    assert same(whole, certify(trained(data), built(), data, method, **options))
    step, seen = kind.step, []

    def dies(self, rows, fraction):
        seen.append(fraction)
        if len(seen) == 3 * 3 + 2:
            raise Killed
        return step(self, rows, fraction)

    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", dies)
        with pytest.raises(Killed):
            certify(trained(data), built(), data, method, checkpoint=path, **options)
    counted = []
    monkeypatch.setattr(kind, "step", lambda *a: counted.append(1) or step(*a))
    resumed = certify(trained(data), built(), data, method, checkpoint=path, **options)
    assert len(counted) == 9
    assert same(whole, resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(checkpoint=path, checkpoint_every=0)
    for change in ({"seed": 1}, {"epochs": 3}, {"data": blobs(seed=2)}):
        with pytest.raises(ValueError, match=r"another run: its (seed|epochs|data) is"):
            run(checkpoint=path, checkpoint_every=0, **change)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        run(checkpoint=path, checkpoint_every=0)


def test_the_methods_old_name_is_the_same_method(tmp_path):
    assert NaturalSettings is TruncatedSettings
    path = tmp_path / "run.pt"
    found = run(method="natural", checkpoint=path, checkpoint_every=0)
    assert found.method == "truncated"
    # A run that was left unfinished under the old name goes on.
    content = torch.load(path, weights_only=True)
    content["identity"]["method"] = "natural"
    torch.save(content, path)
    assert same(found, run(checkpoint=path, checkpoint_every=0))


def test_settings_can_be_made_beforehand():
    settings = CertifySettings(epochs=2, protocol=TERMS, settings=FAST)
    data = blobs()
    assert same(run(data), certify_with(settings, built(), built(), data))
    assert settings.method == "truncated"
    published = CertifySettings("iter")
    assert (published.starts_at, published.terms, published.budget.epochs) == (
        "model",
        PUBLISHED,
        100,
    )
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        run(epoch=3)


def test_ctrl_c_certifies_what_there_is(monkeypatch):
    step, seen = Truncated.step, []

    def interrupted(self, rows, fraction):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return step(self, rows, fraction)

    monkeypatch.setattr(Truncated, "step", interrupted)
    data = blobs()
    found = run(data, epochs=50)
    assert found.interrupted
    assert found.settings["steps run"] == 4
    found.verify(data)


@pytest.mark.parametrize("method", METHODS)
def test_a_device_is_waited_for_seldom(method, monkeypatch):
    """On a device, here the CPU as one, the same run looks at objectives some steps later."""
    data = blobs()
    settings = FAST if method == "truncated" else PublishedSettings(batch_size=50)
    at_once = run(data, method=method, epochs=3, settings=settings)
    monkeypatch.setattr("hesskern.pacbayes.loop.on_host", lambda value: False)
    monkeypatch.setattr("hesskern.pacbayes.loop._UNSEEN", 2)
    later = run(data, method=method, epochs=3, settings=settings)
    assert later.bound == at_once.bound
    assert later.history == at_once.history


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_device_names_the_step_that_was_not_finite(at, monkeypatch):
    step, seen = Truncated.step, []

    def broken(self, rows, fraction):
        seen.append(1)
        value = step(self, rows, fraction)
        return value * math.nan if len(seen) == at else value

    monkeypatch.setattr(Truncated, "step", broken)
    monkeypatch.setattr("hesskern.pacbayes.loop.on_host", lambda value: False)
    monkeypatch.setattr("hesskern.pacbayes.loop._UNSEEN", 3)
    with pytest.raises(ValueError, match=rf"objective is not finite in epoch 1, step {at}:"):
        run(blobs(), epochs=2, settings=replace(FAST, batch_size=30))


def test_an_objective_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match=r"objective is not finite in epoch 1, step"):
        run(settings=TruncatedSettings(batch_size=50, rate_ratio=1e6), epochs=20)
