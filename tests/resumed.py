"""Passes that are broken off and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, "int | None"], None]


class Broken(Exception):
    """Ends a pass from within its progress callback."""


class Seen(list[tuple[str, int]]):
    """A progress callback that keeps what it was told."""

    def __call__(self, description: str, done: int, total: int | None) -> None:
        self.append((description, done))


def stopping(after: int, stage: str = "") -> Progress:
    """A progress callback that ends the pass behind a batch, of one stage if it is named."""

    def progress(description: str, done: int, total: int | None) -> None:
        if done == after and description.startswith(stage):
            raise Broken

    return progress


def broken_off(call: Callable[..., Any], path: Path, after: int, stage: str = "") -> None:
    """Makes a call that keeps its state behind every batch, and ends it behind one of them."""
    try:
        call(checkpoint=path, checkpoint_every=0, progress=stopping(after, stage))
    except Broken:
        assert path.exists()
        return
    raise AssertionError(f"the call came to its end before batch {after}")


def bits(result: Any, folder: Path) -> bytes:
    """All that a result holds, as its file has it."""
    path = folder / "bits.safetensors"
    result.save(path)
    return path.read_bytes()
