"""Labs and what they have computed, which several test files look at."""

import pytest
from judging import STANDING_FOR, lab_of
from tiny_lab import FOLDER, SHOWN, SMALL, TINY, run

from hesskern.apps.reproduce.lab import Lab
from hesskern.zoo import models


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    outcome = run(*SHOWN, *SMALL, "--output", folder, "--json")
    assert outcome.exit_code == 0, outcome.output
    return folder, outcome


@pytest.fixture(scope="session")
def tiny(everything):
    """A lab over the networks that the command has trained."""
    return Lab(everything[0] / FOLDER, overrides=TINY)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture
def lab(folder, monkeypatch):
    build = models.build
    monkeypatch.setattr(
        models, "build", lambda model, *rest: build(STANDING_FOR.get(model, model), *rest)
    )
    return lab_of(folder, 24)
