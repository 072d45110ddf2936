"""hesskern influence: the command, its files, its page."""

import json
import re

import pytest
import torch
from console import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hesskern as hk
from hesskern.apps.influence import study as studies
from hesskern.zoo import data, models

SMALL = ["influence", "--model", "f8x1", "--epochs", 2, "--limit", 200]


def test_it_writes_a_page_and_all_scores(here):
    outcome = run(*SMALL, "--queries", 3, "--shown", 4, "--json")
    assert outcome.exit_code == 0, outcome.output
    folder = here / "hesskern-influence"
    names = ["influence.json", "report.html", "scores.safetensors", "seed0.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    result = json.loads(outcome.stdout)
    assert result == json.loads((folder / "influence.json").read_text())
    with safe_open(folder / "scores.safetensors", framework="pt") as file:
        scores = file.get_tensor("scores")
    assert scores.shape == (3, 200)
    # The scores are those of the library for the network that was saved.
    train, test = data.load("digits", limit=200), data.load("digits", train=False)
    model = models.build("f8x1", train.input_shape, 10)
    model.load_state_dict(load_file(folder / "seed0.safetensors"))
    loss = nn.CrossEntropyLoss()
    outputs = model(test.inputs).detach()
    losses = nn.functional.cross_entropy(outputs, test.targets, reduction="none")
    worst = losses.topk(3).indices
    assert [q["index"] for q in result["queries"]] == worst.tolist()
    assert [q["predicted"] for q in result["queries"]] == outputs[worst].argmax(1).tolist()
    E = hk.ekfac(model, train.batches(64), loss, bias="joint")
    queries = [(test.inputs[worst], test.targets[worst])]
    expected = hk.influence(E, model, queries, train.batches(64), loss).scores
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for i, query in enumerate(result["queries"]):
        order = scores[i].sort(descending=True).indices
        assert [e["index"] for e in query["helpful"]] == order[:4].tolist()
        assert [e["index"] for e in query["harmful"]] == order.flip(0)[:4].tolist()
        assert all(e["class"] == int(train.targets[e["index"]]) for e in query["helpful"])
    assert sum(result["histogram"]["counts"]) == 600
    assert result["concentration"]["share"][-1] == pytest.approx(1)
    assert sum(layer["share"] for layer in result["layers"].values()) == pytest.approx(1)


def test_the_page_shows_images_and_the_command(here):
    outcome = run(*SMALL, "--query", 5, "--query", 0, "--layers", "fc1")
    assert outcome.exit_code == 0, outcome.output
    page = (here / "hesskern-influence/report.html").read_text()
    assert page.count("data:image/svg+xml") == 2
    # Six samples of either kind and the query itself, twice.
    assert page.count('<img class="picture') == 2 * 13
    assert "hesskern influence --limit 200 --model f8x1 --epochs 2 --layers fc1 --query 5" in page
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)
    assert "2 test samples, named on the command line" in outcome.output
    assert "fc2</td>" not in page


def test_a_checkpoint_is_looked_at_as_it_is(here):
    assert run(*SMALL).exit_code == 0
    weights = here / "hesskern-influence/seed0.safetensors"
    again = run("influence", "--model", "f8x1", "--limit", 200, "--checkpoint", weights,
                "--output", here / "again")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert not (here / "again/seed0.safetensors").exists()
    first = load_file(here / "hesskern-influence/scores.safetensors")["scores"]
    assert torch.equal(load_file(here / "again/scores.safetensors")["scores"], first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", 360], "query must be in [0, 360)"),
        (["--damping", -1], "damping must be non-negative"),
        (["--epochs", -1], "epochs must not be negative"),
        (["--layers", "fc9"], "no module named 'fc9'"),
        (["--checkpoint", "none.pt"], "none.pt"),
        (["--queries", 0], "0 is not in the range"),
    ],
)
def test_bad_options_are_named(here, options, message):
    outcome = run(*SMALL, *options)
    assert outcome.exit_code != 0
    assert message in " ".join(outcome.output.split())


def test_an_error_after_training_keeps_the_weights(here, monkeypatch):
    def broken(*args, **more):
        raise ValueError("no scores today")

    monkeypatch.setattr(studies, "influence", broken)
    outcome = run(*SMALL)
    assert outcome.exit_code == 1
    assert "no scores today" in outcome.output
    assert [p.name for p in (here / "hesskern-influence").iterdir()] == ["seed0.safetensors"]


def test_an_interruption_leaves_nothing_half_written(here, monkeypatch):
    def stopped(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "influence", stopped)
    outcome = run(*SMALL)
    assert outcome.exit_code == 130
    assert not (here / "hesskern-influence").exists()


def test_queries_without_a_gradient_are_said_to_have_none(here):
    train, test = data.load("digits", limit=200), data.load("digits", train=False)
    model = models.build("f8x1", train.input_shape, 10)
    # So sure of most samples that all other classes' probabilities are zero in float32.
    model.load_state_dict({name: 100 * value for name, value in model.state_dict().items()})
    weights = here / "sure.safetensors"
    save_file(model.state_dict(), weights)
    logits = model(test.inputs).detach()
    sure, classes = logits.topk(2).values.diff().flatten() < -150, logits.argmax(1)
    right = (sure & (classes == test.targets)).nonzero().flatten()[:3].tolist()
    wrong = (sure & (classes != test.targets)).nonzero().flatten()[:1].tolist()
    assert len(right) == 3
    for chosen in (right + wrong, right):
        options = [item for index in chosen for item in ("--query", index)]
        command = ["influence", "--model", "f8x1", "--limit", 200, "--checkpoint", weights]
        outcome = run(*command, *options, "--json")
        assert outcome.exit_code == 0, outcome.output
        assert "All scores of 3 test samples are zero" in " ".join(outcome.output.split())
        result = json.loads(outcome.stdout)
        assert result["concentration"]["without"] == 3
        # Zeros are neither helpful nor harmful.
        scores = load_file(here / "hesskern-influence/scores.safetensors")["scores"]
        assert sum(result["histogram"]["counts"]) == int((scores != 0).sum())
        assert bool((scores == 0).any())
        assert result["histogram"]["edges"][30] == 0
        last = result["concentration"]["share"][-1]
        assert last == pytest.approx(1 if chosen != right else 0)


def test_inputs_that_are_no_images_have_none():
    assert studies._pixels(torch.zeros(5), "digits") is None
    assert studies._pixels(torch.zeros(2, 4, 4), "digits") is None
    assert studies._pixels(torch.zeros(64), "digits").shape == (8, 8)
    assert studies._pixels(torch.zeros(3, 6, 7), "cifar10").shape == (6, 7, 3)
