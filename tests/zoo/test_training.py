"""Training is deterministic, ends where it should, and says when it failed."""

from dataclasses import replace

import pytest
import torch

from hesskern.zoo import data, models, training


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=300)


def trained(digits, seed=0, **changes):
    model = models.build("f16x1", digits.input_shape, 10, seed)
    recipe = replace(training.recipe_for("quick", "digits"), epochs=3, **changes)
    return model, training.train(model, digits, recipe, seed)


def test_same_seed_same_weights(digits):
    (first, history), (again, _) = trained(digits), trained(digits)
    other, _ = trained(digits, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    assert len(history.loss) == len(history.accuracy) == 3
    assert history.loss[-1] < history.loss[0]
    assert history.to_dict()["recipe"]["epochs"] == 3


def test_training_learns_and_evaluation_agrees_with_its_definition(digits):
    model, _ = trained(digits, learning_rate=0.05)
    loss, accuracy = training.evaluate(model, digits, batch_size=64)
    with torch.no_grad():
        logits = model(digits.inputs)
    assert accuracy == pytest.approx(float((logits.argmax(1) == digits.targets).double().mean()))
    assert loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, digits.targets)), rel=1e-5
    )
    assert accuracy > 0.85
    assert model.training


def test_progress_counts_every_step(digits):
    seen = []
    recipe = training.Recipe(epochs=2, batch_size=128)
    model = models.build("f8x1", digits.input_shape, 10)
    training.train(model, digits, recipe, progress=lambda *args: seen.append(args))
    assert seen == [("training", i, 6) for i in range(1, 7)]


def test_divergence_is_an_error(digits):
    with pytest.raises(ValueError, match="training diverged in epoch"):
        trained(digits, learning_rate=1e38)


def test_recipes():
    assert training.recipe_for("paper", "mnist") == training.Recipe(1000, 0.01, 128)
    assert training.recipe_for("paper-momentum", "mnist").weight_decay == 5e-4
    with pytest.raises(
        ValueError, match="recipe must be one of quick, paper, paper-momentum; got 'best'"
    ):
        training.recipe_for("best", "mnist")


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(digits, tmp_path, momentum):
    recipe = replace(training.recipe_for("quick", "digits"), epochs=4, momentum=momentum)
    path = tmp_path / "run" / "state.pt"

    def network():
        model = models.build("f16x1", digits.input_shape, 10, 3)
        model.append(torch.nn.Dropout(0.3))
        return model

    def interrupt(_, done, total):
        if done > 0.6 * total:
            raise _Stopped

    whole = network()
    history = training.train(whole, digits, recipe, 3)
    with pytest.raises(_Stopped):
        training.train(network(), digits, recipe, 3, interrupt, checkpoint=path, save_every=0)
    resumed = network()
    seen = []
    again = training.train(
        resumed, digits, recipe, 3, lambda *args: seen.append(args[1]), checkpoint=path
    )
    assert min(seen) > 0.25 * max(seen)
    assert again.loss == history.loss
    assert again.accuracy == history.accuracy
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


def test_a_finished_run_is_loaded_and_more_epochs_continue_it(digits, tmp_path):
    path = tmp_path / "state.pt"
    recipe = training.Recipe(epochs=2, momentum=0.5)
    model = models.build("f8x1", digits.input_shape, 10)
    training.train(model, digits, recipe, checkpoint=path)
    loaded, steps = models.build("f8x1", digits.input_shape, 10, 9), []
    training.train(loaded, digits, recipe, 0, lambda *a: steps.append(a), checkpoint=path)
    assert steps == []
    assert torch.equal(loaded.fc1.weight, model.fc1.weight)
    assert torch.equal(models.read_state(path)["fc1.weight"], model.fc1.weight)
    longer = models.build("f8x1", digits.input_shape, 10)
    training.train(longer, digits, replace(recipe, epochs=3), checkpoint=path)
    at_once = models.build("f8x1", digits.input_shape, 10)
    training.train(at_once, digits, replace(recipe, epochs=3))
    assert torch.equal(longer.fc1.weight, at_once.fc1.weight)
    with pytest.raises(ValueError, match="3 epochs behind it, more than the 1 asked for"):
        training.train(at_once, digits, replace(recipe, epochs=1), checkpoint=path)


def test_a_checkpoint_of_other_settings_is_refused(digits, tmp_path):
    path = tmp_path / "state.pt"
    model = models.build("f8x1", digits.input_shape, 10)
    training.train(model, digits, training.Recipe(epochs=1), checkpoint=path)
    other = replace(digits, targets=digits.targets.flip(0))
    for recipe, seed, samples in (
        (training.Recipe(epochs=1, momentum=0.9), 0, digits),
        (training.Recipe(epochs=1), 1, digits),
        (training.Recipe(epochs=1), 0, other),
    ):
        with pytest.raises(ValueError, match="was made with another network, settings or data"):
            training.train(model, samples, recipe, seed, checkpoint=path)
    for name in ("f9x1", "f8x1-tanh"):
        with pytest.raises(ValueError, match="was made with another network"):
            training.train(
                models.build(name, digits.input_shape, 10),
                digits,
                training.Recipe(epochs=1),
                checkpoint=path,
            )
    state = torch.load(path, weights_only=True)
    torch.save({**state, "model": {"0.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="does not fit the model"):
        training.train(model, digits, training.Recipe(epochs=1), checkpoint=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        training.train(model, digits, training.Recipe(epochs=1), checkpoint=path)
