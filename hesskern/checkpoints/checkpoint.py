"""The checkpoint of one call: what it was asked for, what was found, and when the next is due."""

from __future__ import annotations

import glob
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesskern import files
from hesskern.checkpoints.course import Course
from hesskern.checkpoints.facts import (
    described,
    differences,
    environment,
    model_facts,
    other_model,
    unread,
)
from hesskern.checkpoints.file import read, write
from hesskern.checkpoints.packing import packed, unpacked
from hesskern.files import check_writable, remove_abandoned
from hesskern.parallel.ranks import Ranks

__all__ = ["Checkpoint", "check_every", "path_of_rank"]


class Checkpoint:
    """One call's state in a file.

    A call goes through one stage or several. Each has a :attr:`course` through its data and a state
    of its own; the file holds those of the stage that was at work when it was written. What a stage
    has finished with, and only grows, goes into parts: files beside that one, each written once.

    Attributes:
        stage: at work; the one to go on with where there was a file, else None.
        state: of that stage, as it was written; None where there is nothing to go on with.
        course: of that stage; None before it is at work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: float,
        exact: bool,
        call: str,
        model: nn.Module,
        device: torch.device,
        settings: Mapping[str, Any],
    ) -> None:
        self._path, self._every = _checked(path, every, exact)
        self._device, self._call = device, call
        told = {name: described(value) for name, value in settings.items()}
        self._settings = json.loads(json.dumps(told))
        self._model = model_facts(model)
        self._environment = json.loads(json.dumps(environment(device)))
        self.stage: str | None = None
        self.state: Any = None
        self.course: Course | None = None
        # Numbers of the parts that count, with digests of what is in them; numbers that do not.
        self._parts: list[list[Any]] = []
        self._stale: list[int] = []
        self._found: Any = None
        remove_abandoned(self._path, r"|\.part\d+")
        if self._path.exists():
            self._open(exact)
        self._last = time.monotonic()

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str] | None,
        every: float,
        exact: bool,
        call: str,
        model: nn.Module,
        device: torch.device,
        settings: Mapping[str, Any],
        ranks: Ranks | None = None,
    ) -> Checkpoint | None:
        """The checkpoint that a call's arguments ask for.

        Args:
            path: of the file; None for no checkpoint.
            every: seconds between the end of one writing and the begin of the next.
            exact: whether a file of another environment is refused.
            call: the function that makes the pass.
            model: whose pass it is, on ``device``.
            device: of the model.
            settings: what else the result depends on; looked at where there is a checkpoint.
            ranks: each of which keeps a file of its own; None for one process.

        Raises:
            TypeError, ValueError: bad arguments; the file is no checkpoint, is damaged or is that
                of another call, model or environment.
            FileNotFoundError: there is no such folder.

        Warns:
            UserWarning: the file was written in another environment, and ``exact`` is False.
        """
        if path is None:
            check_every(every, exact)
            return None
        return cls(path_of_rank(path, ranks), every, exact, call, model, device, settings)

    def begin(self, stage: str, data: Iterable[Any]) -> Course:
        """The way through the data of a stage, the one to go on with or another that begins.

        Args:
            stage: a name of it.
            data: that it is about to iterate.
        """
        if stage != self.stage:
            return self.restart(stage, data)
        if self.course is None:
            self.course = self.way(data, self._found)
        return self.course

    def restart(self, stage: str, data: Iterable[Any]) -> Course:
        """The same of a stage that begins anew, whatever there was of it."""
        # The file still needs the parts that it was written beside.
        self._stale += [number for number, _ in self._parts]
        self.stage, self.state, self._parts = stage, None, []
        self.course = self.way(data)
        return self.course

    def way(self, data: Iterable[Any], state: Any = None) -> Course:
        """A way through data that belong to no stage; ``state`` is that of one to go on with."""
        return Course(self._where, self._device, data, state)

    @property
    def parts(self) -> Iterator[Any]:
        """What was given to :meth:`keep` as parts of the stage to go on with, in this order.

        Raises:
            FileNotFoundError, ValueError: one of the files is not there, or not as it was written.
        """
        for number, expected in self._parts:
            header, tensors = read(self._part(number), expected)
            yield unpacked(tensors, header["content"])

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        # Not the time of day, which may jump.
        return time.monotonic() - self._last >= self._every

    def keep(self, state: Mapping[str, Any], part: Any = None, done: int | None = None) -> None:
        """Writes the state of the stage at work.

        Args:
            state: of the stage, apart from what earlier parts hold.
            part: of the state, what is new and stays as it is; None for nothing.
            done: how many batches the state is behind; None for all that were handed out.

        Raises:
            OSError: it cannot be written; the file before is as it was.
        """
        assert self.course is not None
        parts = list(self._parts)
        tensors, plain = packed({"state": state, "course": self.course.state(done)})
        header = {
            "call": self._call,
            "stage": self.stage,
            "settings": self._settings,
            "model": self._model,
            "environment": self._environment,
            "content": plain,
            "parts": parts,
        }
        try:
            if part is not None:
                # One of that number that is there already belongs to nothing.
                number = 1 + max([-1, *self._stale, *(number for number, _ in parts)])
                part_tensors, part_plain = packed(part)
                own = write(self._part(number), part_tensors, {"content": part_plain})
                parts.append([number, own])
            write(self._path, tensors, header)
        except OSError as error:
            kept = "there is none yet"
            if self._path.exists():
                kept = "the one before is as it was, and the same call goes on from there"
            raise OSError(
                f"{self._where} could not be written behind batch {self.course.batches - 1} "
                f"({error}); {kept}"
            ) from error
        self._parts = parts
        for number in self._stale:
            self._part(number).unlink(missing_ok=True)
        self._stale = []
        self._last = time.monotonic()

    def remove(self) -> None:
        """Removes the files of a call that is finished."""
        self._path.unlink(missing_ok=True)
        for path in self._path.parent.glob(f"{glob.escape(self._path.name)}.part*"):
            if path.name.removeprefix(f"{self._path.name}.part").isdecimal():
                path.unlink(missing_ok=True)

    def _part(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.part{number}")

    @property
    def _where(self) -> str:
        return f"checkpoint: {str(self._path)!r}"

    def _open(self, exact: bool) -> None:
        header, tensors = read(self._path)
        if header["call"] != self._call:
            raise self._refused(f"of another call, {header['call']}")
        # Where there is no source, functions can be compared under one version of Python only.
        blind = header["environment"].get("python") != self._environment["python"]
        unknown = unread(header["settings"], self._settings) if blind else []
        if difference := differences(header["settings"], self._settings, unknown):
            raise self._refused(f"of another call: {difference}")
        if other := other_model(header["model"], self._model, blind):
            raise self._refused(f"of another model: {other}")
        if blind:
            words, own = (
                {name: kind for name, kind, *_ in m} for m in (header["model"], self._model)
            )
            unknown += unread(words, own)
        if difference := differences(header["environment"], self._environment):
            if exact:
                raise ValueError(
                    f"{self._where} was written elsewhere, so that the rest of the pass may round "
                    f"differently: {difference} (exact_resume=False goes on nevertheless)"
                )
            warnings.warn(
                f"{self._where} was written elsewhere, so that the result may differ by rounding "
                f"from that of an uninterrupted pass: {difference}"
                + f"; the functions of {', '.join(unknown)} cannot be compared"
                * bool(unknown),
                stacklevel=5,
            )
        content = unpacked(tensors, header["content"])
        self.stage, self.state = header["stage"], content["state"]
        self._found = content["course"]
        self._parts = list(header["parts"])

    def _refused(self, what: str) -> ValueError:
        return ValueError(
            f"{self._where} is {what} (repeat that call, or pass another file name to begin anew)"
        )


def _checked(path: Any, every: Any, exact: Any) -> tuple[Path, float]:
    check_every(every, exact)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be the path of a file, got {type(path).__name__}")
    # What is renamed must lie where a link leads.
    found = Path(path).resolve()
    if found.is_dir():
        raise ValueError(f"checkpoint must be the path of a file, {str(found)!r} is a folder")
    if not found.parent.is_dir():
        raise FileNotFoundError(f"checkpoint: there is no folder {str(found.parent)!r}")
    check_writable(found.parent, "checkpoint: folder")
    return found, float(every)


def check_every(every: Any, exact: Any) -> None:
    """Raises TypeError or ValueError where these two arguments of a call are none."""
    if isinstance(every, bool) or not isinstance(every, (int, float)):
        raise TypeError(f"checkpoint_every must be a number of seconds, got {every!r}")
    if not 0 <= every < math.inf:
        raise ValueError(f"checkpoint_every must be at least 0 and finite, got {every}")
    if not isinstance(exact, bool):
        raise TypeError(f"exact_resume must be True or False, got {exact!r}")


def path_of_rank(path: Any, ranks: Ranks | None) -> Any:
    """The file of one of several ranks: "factors.rank0of2.checkpoint"; what is none as it is."""
    if ranks is None or not isinstance(path, (str, os.PathLike)):
        return path
    return files.path_of_rank(path, ranks.rank, ranks.size)
