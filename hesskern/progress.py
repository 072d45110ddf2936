"""Progress of long work: one callback shape, and a bar with the time left if rich is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Progress", "reporter"]

Progress = Callable[[str, int, int | None], None]
"""``progress(description, done, total)``; ``total`` is None when it is not known beforehand.

What follows " · " in the description is a remark that may change while the work stays the same.
"""

_REMARK = " · "


def reporter(progress: bool | Progress) -> Progress:
    """The callback behind a ``progress=`` argument.

    Args:
        progress: False for silence; True for a bar on stderr with the time left (plain lines where
            rich is not installed); or a callable ``(description, done, total)``.

    Raises:
        TypeError: ``progress`` is neither a bool nor callable.
    """
    if callable(progress):
        return progress
    if not isinstance(progress, bool):
        raise TypeError(f"progress must be a bool or a callable, got {type(progress).__name__}")
    if not progress:
        return _silent
    try:
        from rich.progress import Progress as _  # noqa: F401  (asks only whether rich is there)
    except ImportError:
        return _Lines()
    return _Bars()


def _silent(description: str, done: int, total: int | None) -> None:
    return None


class _Lines:
    """A line on stderr at most every two seconds, and one at the end of each task."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, description: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        work = description.partition(_REMARK)[0]
        if finished or now - self._last.get(work, 0.0) > 2.0:
            self._last[work] = now
            print(f"{description}: {done}{f' of {total}' if total else ''}", file=sys.stderr)


class _Bars:
    """One rich bar at a time; it closes when its task is done or the next one begins."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._work: str | None = None

    def __call__(self, description: str, done: int, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        work = description.partition(_REMARK)[0]
        if work != self._work:
            self.close()
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(description, total=total)
            self._work = work
        self._bar.update(self._task, description=description, completed=done, total=total)
        if total is not None and done >= total:
            self.close()

    def close(self) -> None:
        """Takes an unfinished bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._work = None

    def __del__(self) -> None:
        self.close()
