"""hesskern plan: the command."""

import json

import pytest
import torch
from console import run
from torch import nn

import hesskern as hk
from hesskern.zoo.models import build

SMALL = ["plan", "f16x1", "--input-shape", "1x6x6", "--batch-size", 8]


def test_it_is_the_librarys_plan(here):
    outcome = run(*SMALL, "--samples", 100, "--what", "ekfac", "--no-timing", "--json")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    batch = torch.randn(8, 1, 6, 6), torch.zeros(8, dtype=torch.long)
    model = build("f16x1", (1, 6, 6), 10)
    plan = hk.plan(
        model, batch, nn.CrossEntropyLoss(), what="ekfac", num_samples=100, timing=False
    ).to_dict()
    assert found["layers"] == plan["layers"]
    assert found["operations"] == plan["operations"]
    assert found["batches"] == 13
    assert not list(here.iterdir())


def test_a_table_with_the_time(here):
    outcome = run(*SMALL, "--memory-budget", "1.5MiB", "--layers", "fc1")
    assert outcome.exit_code == 0, outcome.output
    assert "fc1" in outcome.stdout
    assert "fc2" not in outcome.stdout.split("\n\n")[1]
    assert "Peak" in outcome.stdout
    assert "About" in outcome.stdout


def test_a_budget_in_units(here):
    words = ["--no-timing", "--json", "--what", "hessians", "--available", "2G"]
    found = json.loads(run(*SMALL, *words, "--memory-budget", "1KiB").stdout)
    assert found["memory_budget"] == 1024
    assert found["available"] == 2 * 2**30
    assert all(layer["recomputed"] for layer in found["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-shape", "3x"], "input-shape must be sizes such as 3x32x32, got '3x'"),
        (["--memory-budget", "much"], "'much' is no number of bytes"),
        (["--layers", "conv*"], "conv"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(here, options, message):
    outcome = run(*SMALL, *options)
    assert outcome.exit_code != 0
    assert message in outcome.output
    assert "Traceback" not in outcome.output
