"""Training is deterministic, ends where it should, and says when it failed."""

from dataclasses import replace

import pytest
import torch

from hesskern import data, models, training


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
