"""Settings that every test shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# Assertions in helpers say as much as those in tests.
pytest.register_assert_rewrite("blocks", "dense", "judging", "pruned", "same_factors", "spectra")

# The same examples on every run and machine; no deadline, since builders share their cores.
settings.register_profile(
    "hesskern", derandomize=True, deadline=None, max_examples=40, print_blob=True
)
settings.load_profile("hesskern")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
