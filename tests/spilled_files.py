"""Where a test's spilled samples go, in files so small that there are many."""

from __future__ import annotations

from pathlib import Path

import pytest

from hesskern.operators import spilled

__all__ = ["small_files"]


def small_files(folder: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> Path:
    """The folder, below which files of ``piece`` bytes go from now on; two pieces' worth waits."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(spilled, "_WAITING", 2 * piece)
    monkeypatch.setattr(spilled, "_PIECE", piece)
    return folder
