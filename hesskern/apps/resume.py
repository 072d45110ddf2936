"""Where a command keeps the state of its work, so that the same command goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

__all__ = ["NOWHERE", "Resume", "resume_option"]

resume_option: Callable[[Any], Any] = click.option(
    "--resume",
    is_flag=True,
    help="Keep the state of training and of passes in OUTPUT/resume; the same command goes on from "
    "there after an interruption.",
)


@dataclass(frozen=True)
class Resume:
    """Files with the state of a command's work.

    Attributes:
        folder: of the files; None: none is kept.
    """

    folder: Path | None = None

    @classmethod
    def of(cls, output: Path, asked: bool) -> Resume:
        """Those in a command's output folder, if they are asked for."""
        return cls(output / "resume" if asked else None)

    def file(self, name: str) -> Path | None:
        """The file of one piece of work; its folder is there then."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name.replace(' ', '-')}.checkpoint"

    def finished(self) -> None:
        """Removes the states of a command whose results are written."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.glob("*.checkpoint"):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


NOWHERE = Resume()
"""Of a command that keeps no state."""
