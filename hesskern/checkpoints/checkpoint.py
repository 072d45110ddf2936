"""The checkpoint of one call: what it was asked for, what was found, and when the next is due."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesskern.checkpoints.course import Course
from hesskern.checkpoints.facts import differences, environment, model_facts, other_model
from hesskern.checkpoints.file import read, write
from hesskern.checkpoints.packing import packed, unpacked
from hesskern.files import check_writable, remove_abandoned

__all__ = ["Checkpoint"]


class Checkpoint:
    """One call's state in a file.

    A call goes through one stage or several. Each has a :attr:`course` through its data and a state
    of its own; the file holds those of the stage that was at work when it was written.

    Attributes:
        stage: at work; the one to go on with where there was a file, else None.
        state: of that stage, as it was written; None where there is nothing to go on with.
        course: of that stage; None before the first.
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
        self._settings = json.loads(json.dumps(dict(settings)))
        self._model = model_facts(model)
        self._environment = json.loads(json.dumps(environment(device)))
        self.stage: str | None = None
        self.state: Any = None
        self.course: Course | None = None
        remove_abandoned(self._path)
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
    ) -> Checkpoint | None:
        """The checkpoint that a call's arguments ask for.

        Args:
            path: of the file; None for no checkpoint.
            every: seconds between the end of one writing and the begin of the next.
            exact: whether a file of another environment is refused.
            call: the function that makes the pass.
            model: whose pass it is, on ``device``.
            device: of the model.
            settings: what else the result depends on, as JSON has it.

        Raises:
            TypeError, ValueError: bad arguments; the file is no checkpoint, is damaged or is that
                of another call, model or environment.
            FileNotFoundError: there is no such folder.

        Warns:
            UserWarning: the file was written in another environment, and ``exact`` is False.
        """
        if path is None:
            _check_every(every, exact)
            return None
        return cls(path, every, exact, call, model, device, settings)

    def begin(self, stage: str) -> Course:
        """The way through the data of a stage, the one to go on with or another that begins."""
        if stage != self.stage or self.course is None:
            self.stage, self.state = stage, None
            self.course = Course(self._where, self._device)
        return self.course

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        # Not the time of day, which may jump.
        return time.monotonic() - self._last >= self._every

    def keep(self, state: Mapping[str, Any]) -> None:
        """Writes the state of the stage at work, behind the last batch it was handed.

        Raises:
            OSError: it cannot be written; the file before is as it was.
        """
        assert self.course is not None
        tensors, plain = packed({"state": state, "course": self.course.state()})
        header = {
            "call": self._call,
            "stage": self.stage,
            "settings": self._settings,
            "model": self._model,
            "environment": self._environment,
            "content": plain,
        }
        try:
            write(self._path, tensors, header)
        except Exception as error:  # safetensors has errors of its own for a full disk
            kept = "there is none yet"
            if self._path.exists():
                kept = "the one before is as it was, and the same call goes on from there"
            raise OSError(
                f"{self._where} could not be written behind batch {self.course.batches - 1} "
                f"({error}); {kept}"
            ) from error
        self._last = time.monotonic()

    def remove(self) -> None:
        """Removes the file of a call that is finished."""
        self._path.unlink(missing_ok=True)

    @property
    def _where(self) -> str:
        return f"checkpoint: {str(self._path)!r}"

    def _open(self, exact: bool) -> None:
        header, tensors = read(self._path)
        if header["call"] != self._call:
            raise self._refused(f"of another call, {header['call']}")
        if difference := differences(header["settings"], self._settings):
            raise self._refused(f"of another call: {difference}")
        if other := other_model(header["model"], self._model):
            raise self._refused(f"of another model: {other}")
        if difference := differences(header["environment"], self._environment):
            if exact:
                raise ValueError(
                    f"{self._where} was written elsewhere, so that the rest of the pass may round "
                    f"differently: {difference} (exact_resume=False goes on nevertheless)"
                )
            warnings.warn(
                f"{self._where} was written elsewhere, so that the result may differ by rounding "
                f"from that of an uninterrupted pass: {difference}",
                stacklevel=5,
            )
        content = unpacked(tensors, header["content"])
        self.stage, self.state = header["stage"], content["state"]
        self.course = Course(self._where, self._device, content["course"])

    def _refused(self, what: str) -> ValueError:
        return ValueError(
            f"{self._where} is {what} (repeat that call, or pass another file name to begin anew)"
        )


def _checked(path: Any, every: Any, exact: Any) -> tuple[Path, float]:
    _check_every(every, exact)
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


def _check_every(every: Any, exact: Any) -> None:
    if isinstance(every, bool) or not isinstance(every, (int, float)):
        raise TypeError(f"checkpoint_every must be a number of seconds, got {every!r}")
    if not 0 <= every < math.inf:
        raise ValueError(f"checkpoint_every must be at least 0 and finite, got {every}")
    if not isinstance(exact, bool):
        raise TypeError(f"exact_resume must be True or False, got {exact!r}")
