"""The lab: what it trains, keeps and takes up again, and what its networks stand for."""

from dataclasses import replace

import pytest
import torch
from tiny_lab import F200, TINY, network
from torch import nn

from hesskern.apps.reproduce import catalogue, command, lab, overlaps
from hesskern.apps.reproduce.lab import Lab, Network, Overrides
from hesskern.apps.reproduce.report import describe
from hesskern.zoo import data, training


def test_one_epoch_is_no_epochs():
    words = Overrides(epochs=1, limit=1500, data="digits").words
    assert words == "data digits, the first 1,500 samples, 1 epoch"
    assert Overrides(epochs=0, limit=1).words == "the first 1 sample, 0 epochs"
    assert Overrides(seeds=3).words == ""


class _Stopped(Exception):
    pass


def test_an_interrupted_lab_goes_on_and_ends_at_the_same_numbers(tmp_path):
    def stop(description, done, total):
        if "top eigenpairs of fc2" in description:
            raise _Stopped

    small = replace(TINY, seeds=1, top=5)
    whole = overlaps.hessian_and_kronecker(
        at_once := Lab(tmp_path / "whole", overrides=small), at_once.networks([F200])
    )
    broken = Lab(tmp_path / "parts", overrides=small, progress=stop)
    with pytest.raises(_Stopped):
        overlaps.hessian_and_kronecker(broken, broken.networks([F200]))
    seen = []
    again = Lab(tmp_path / "parts", overrides=small, progress=lambda *args: seen.append(args[0]))
    resumed = overlaps.hessian_and_kronecker(again, again.networks([F200]))
    assert resumed.numbers == whole.numbers
    assert not any("training" in text or "fc1" in text for text in seen)
    assert any("top eigenpairs of fc2" in text for text in seen)
    assert not list((tmp_path / "parts").rglob("*.tmp"))


def test_fewer_epochs_are_where_more_begin(tmp_path):
    small = replace(TINY, seeds=1)
    steps = []
    first = Lab(tmp_path / "a", overrides=small, progress=lambda *args: steps.append(args))
    net = first.networks([F200])[0]
    first.model(net, 0, 1)
    steps.clear()
    grown = first.model(net, 0)
    assert min(done for text, done, _ in steps if "training" in text) > 4
    direct = Lab(tmp_path / "b", overrides=small).model(net, 0)
    assert torch.equal(grown.fc1.weight, direct.fc1.weight)
    recipe = replace(training.recipe_for("quick", "digits"), epochs=2)
    assert first.training(net, 0)["recipe"]["epochs"] == recipe.epochs


def test_samples_of_the_curvature_are_a_part_of_the_training_data(tmp_path):
    net = Network("digits", "f8x1", limit=120, samples=50)
    laboratory = Lab(tmp_path, overrides=Overrides(epochs=1))
    found = laboratory.factors(net, 0)
    assert found.num_samples == 50
    assert laboratory.factors(replace(net, samples=None), 0).num_samples == 120


def test_profiles_overrides_and_devices_never_share_a_folder():
    devices = [torch.device("cpu"), torch.device("cuda")]
    folders = {
        command._folder_name(profile, overrides, device)
        for device in devices
        for profile in ("quick", "paper")
        for overrides in (
            Overrides(),
            Overrides(epochs=3),
            Overrides(limit=5),
            Overrides(data="digits"),
            Overrides(model="a.b:net"),
        )
    }
    assert len(folders) == 20
    assert command._folder_name("quick", Overrides(seeds=7, top=3), devices[0]) == "quick"
    assert Lab(None, "paper").recipe(F200) == training.RECIPES["paper"]
    assert Lab(None, "quick").recipe(F200) == training.recipe_for("quick", "mnist")


def test_published_sizes_withhold_verdicts(monkeypatch):
    laboratory = Lab(None)
    cifar = Network("cifar10", "lenet5")
    monkeypatch.setattr(laboratory, "data", lambda network: range(10_000))
    assert laboratory.withheld(cifar) == "10,000 images here, 50,000 in the paper"
    monkeypatch.setattr(laboratory, "data", lambda network: range(50_000))
    assert laboratory.withheld(cifar) == ""
    assert Lab(None, overrides=Overrides(epochs=1)).withheld(cifar) != ""


def test_a_damaged_cache_is_named(tmp_path):
    path = tmp_path / "eigen.fc1.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot be read .* remove it to compute it anew"):
        lab._read_pairs(path, 3)


def test_what_was_computed_belongs_to_its_weights_and_data(tmp_path, monkeypatch):
    (tmp_path / "changing.py").write_text(
        "from torch import nn\n"
        "kind = nn.ReLU\n"
        "def network(inputs, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 6), kind(),\n"
        "                         nn.Linear(6, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = replace(TINY, model="changing:network", limit=60, epochs=0, seeds=1)
    net = overrides.network(F200)

    def factor(changes=overrides):
        laboratory = Lab(tmp_path / "lab", overrides=changes)
        found = laboratory.factors(laboratory.networks([F200])[0], 0)["1"]
        pairs = laboratory.eigenpairs(laboratory.networks([F200])[0], 0, "1", 3)
        return found.output_hessian, pairs.values

    first = factor()
    import changing

    monkeypatch.setattr(changing, "kind", nn.Tanh)
    second = factor()
    assert not torch.allclose(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    monkeypatch.setattr(changing, "kind", nn.ReLU)
    original = data.load

    def other_order(*arguments, **keywords):
        loaded = original(*arguments, **keywords)
        return replace(loaded, inputs=loaded.inputs.flip(0), targets=loaded.targets.flip(0))

    def shifted(*arguments, **keywords):
        loaded = original(*arguments, **keywords)
        return replace(loaded, inputs=loaded.inputs + 1)

    monkeypatch.setattr(data, "load", shifted)
    third = factor()
    assert not torch.allclose(first[0], third[0])
    monkeypatch.setattr(data, "load", other_order)
    assert torch.allclose(first[0], factor()[0], atol=1e-6)
    monkeypatch.setattr(data, "load", original)
    assert torch.equal(first[0], factor()[0])
    assert net.model == "changing:network"


def test_a_fit_is_that_of_the_weights_and_of_the_seeds_looked_at(tiny):
    net = network(tiny)
    for seed in (0, 1):
        tiny.model(net, seed)
    tiny.begin_item()
    assert tiny.seeds_asked(net) == []
    tiny.factors(net, 1)
    (row,) = describe(tiny, [net])
    assert (row["seeds"], tiny.seeds_asked(net)) == (1, [1])
    assert row["train_accuracy"] == tiny.training(net, 1)["train_accuracy"]


def test_users_networks_have_no_variants():
    own = Overrides(model="mynets:own")
    assert own.network(F200).model == "mynets:own"
    assert own.network(replace(F200, model="f200x2-bn")) is None
    with pytest.raises(ValueError, match="no variants with norms or other activations"):
        Lab(None, overrides=own).networks([replace(F200, model="f64x2-tanh")])
    named = Overrides(model="f16x2-bn")
    assert named.network(replace(F200, model="f200x2-bn")).model == "f16x2-bn"
    assert named.network(replace(F200, model="f64x2-tanh")).model == "f16x2-tanh-bn"
    assert Overrides(model="f9-gelu").network(replace(F200, model="f64x2-tanh")).model == "f9-gelu"
    sized = [replace(F200, samples=9), F200]
    assert Lab(None, overrides=Overrides(model="f9")).networks(sized) == [
        replace(F200, model="f9", samples=9)
    ]


def test_a_part_of_the_samples_gets_no_verdict(monkeypatch):
    laboratory = Lab(None)
    monkeypatch.setattr(laboratory, "data", lambda network: range(60_000))
    assert laboratory.withheld(F200) == ""
    part = replace(F200, samples=10_000)
    assert laboratory.withheld(part) == "curvature of 10,000 images here, of 60,000 in the paper"
    assert laboratory.withheld(replace(F200, samples=60_000)) == ""


def test_published_recipes_are_profiles():
    momentum = Lab(None, "paper-momentum").recipe(F200)
    assert momentum == training.RECIPES["paper-momentum"]
    assert (momentum.momentum, momentum.weight_decay) == (0.9, 5e-4)
    item = catalogue.ITEMS["forms"]
    assert item.expected_seconds("paper-momentum") == 60 * item.minutes["paper"]
