"""The optimization loop that all methods share: epochs, budget, checkpoints, interruption."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hesskern import interrupts
from hesskern.choices import check_counts
from hesskern.devices import on_host
from hesskern.pacbayes.checkpoint import read_checkpoint, write_checkpoint
from hesskern.progress import Progress

__all__ = ["Budget", "Draft", "Method", "NotFiniteError", "Outcome", "optimize"]

# Steps on a device before the host waits for their objectives.
_UNSEEN = 64


class NotFiniteError(ValueError):
    """The optimization has left the numbers; the message says where and why."""


@dataclass(frozen=True)
class Budget:
    """How long to optimize: ``epochs``, or ``minutes`` of wall-clock time.

    Attributes:
        epochs: passes over the samples; the result then depends on the seed alone.
        minutes: the schedule follows the clock; time before an interruption counts.
    """

    epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.minutes is None):
            raise ValueError(
                f"give either epochs or minutes, got epochs {self.epochs}, minutes {self.minutes}"
            )
        check_counts(self, "epochs")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes must be positive, got {self.minutes}")

    def fraction(self, epochs_done: float, seconds: float) -> float:
        """Which part of the budget is spent."""
        if self.epochs is not None:
            return epochs_done / self.epochs
        assert self.minutes is not None
        return seconds / (60 * self.minutes)


@dataclass(frozen=True, eq=False)
class Draft:
    """One layer's posterior as a method leaves it, before its prior variance is put on the grid.

    Shapes as in :class:`hesskern.pacbayes.posterior.LayerPosterior`; ``relative`` says whether
    ``variance`` follows the prior variance when that is moved to the grid.
    """

    mean: Tensor
    variance: Tensor
    U: Tensor | None
    V: Tensor | None
    prior_variance: float
    relative: bool = False


class Method(Protocol):
    """What :func:`optimize` asks of a method."""

    batch_size: int

    def begin_epoch(self, fraction: float) -> None:
        """Called before each epoch; ``fraction`` of the budget is spent."""

    def step(self, rows: Tensor, fraction: float) -> Tensor:
        """One update on the samples ``rows`` [B]; returns the objective's value, 0-dim."""

    def kl(self) -> float:
        """KL(Q ‖ P) at the current parameters, off the grid."""

    def error(self) -> float:
        """Mean error of the steps since :meth:`begin_epoch`, under their noise."""

    def drafts(self) -> dict[str, Draft]:
        """The current posterior."""

    def state(self) -> dict[str, Any]:
        """Everything that must be kept to go on, as tensors and plain values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave."""


@dataclass(frozen=True)
class Outcome:
    """How the optimization ended.

    Attributes:
        epochs, steps: in all.
        seconds: of them.
        interrupted: whether it ended early.
        history: what was measured, by epoch.
        moved: whether this call has taken any of the steps.
    """

    epochs: int
    steps: int
    seconds: float
    interrupted: bool
    history: list[dict[str, float]]
    moved: bool = True


def optimize(
    method: Method,
    n: int,
    budget: Budget,
    order: torch.Generator,
    *,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    interval: float = 60.0,
    exact: bool = True,
    progress: Progress | None = None,
    estimate: Callable[[float, float], float] | None = None,
    stops_early: bool = True,
) -> Outcome:
    """Runs ``method`` until the budget is spent or Ctrl-C is pressed.

    What is kept every ``interval`` seconds, in memory and in the checkpoint, is finite. Should the
    objective cease to be, ``method`` goes back to it, and the outcome is an interrupted one.

    Args:
        method: holds the parameters; sees every sample once per epoch.
        n: number of samples.
        budget: epochs or minutes.
        order: generator of the samples' order.
        checkpoint: file to go on from, if it is there, and to write after epochs.
        identity: what a checkpoint must have been made with.
        interval: least seconds between two checkpoints.
        exact: whether a checkpoint of another environment is refused.
        progress: callback.
        estimate: of the bound, from an error and a KL; shown and recorded, and no certificate.
        stops_early: whether Ctrl-C ends the optimization early; otherwise it goes on to the caller.

    Raises:
        NotFiniteError: the objective is not finite, and nothing was kept yet.
        ValueError: the checkpoint belongs to another run.

    Warns:
        RuntimeWarning: the objective was not finite later on; or the checkpoint could not be
            written, which ends nothing.
    """
    identity = identity or {}
    epoch, steps, before = 0, 0, 0.0
    history: list[dict[str, float]] = []
    saved = read_checkpoint(checkpoint, identity, exact) if checkpoint else None
    if saved is not None:
        method.load_state(saved["method"])
        order.set_state(saved["order"])
        epoch, steps, before = saved["epoch"], saved["steps"], saved["seconds"]
        history = saved["history"]
        saved = copy.deepcopy(saved)
    kept, known = saved, steps
    started = time.perf_counter() - before
    last_saved = time.perf_counter()
    per_epoch = -(-n // method.batch_size)
    interrupted = False
    shown = "optimizing"

    def spent(done: float) -> float:
        return budget.fraction(done, time.perf_counter() - started)

    try:
        while spent(epoch) < 1:
            method.begin_epoch(spent(epoch))
            total, first = 0.0, steps
            taken: list[tuple[Tensor, int]] = []
            for i, rows in enumerate(torch.randperm(n, generator=order).split(method.batch_size)):
                fraction = spent(epoch + i / per_epoch)
                if fraction >= 1:
                    break
                value = method.step(rows, fraction)
                taken.append((value, len(rows)))
                steps += 1
                if on_host(value) or len(taken) == _UNSEEN:
                    total = _added(total, taken, epoch + 1, steps - first)
                    taken = []
                if progress is not None:
                    progress(
                        shown,
                        *_shown(
                            budget,
                            epoch * per_epoch + i + 1,
                            per_epoch,
                            time.perf_counter() - started,
                        ),
                    )
            total = _added(total, taken, epoch + 1, steps - first)
            epoch += 1
            entry = {"epoch": float(epoch), "objective": total / n}
            entry |= {"error": method.error(), "kl": method.kl()}
            if not math.isfinite(entry["kl"]):
                # The last step's objective was that before it.
                raise NotFiniteError(
                    f"the posterior is not finite after epoch {epoch}: the learning rate is too "
                    "high, or the data or weights are out of range"
                )
            if estimate is not None:
                entry["estimate"] = estimate(entry["error"], entry["kl"])
                shown = f"optimizing · estimate {entry['estimate']:.4f}"
            history.append(entry)
            due = time.perf_counter() - last_saved >= interval or spent(epoch) >= 1
            if due:
                state = {
                    "method": method.state(),
                    "order": order.get_state(),
                    "epoch": epoch,
                    "steps": steps,
                    "seconds": time.perf_counter() - started,
                    "history": history,
                }
                if checkpoint is not None:
                    write_checkpoint(checkpoint, identity, state)
                if spent(epoch) < 1:
                    kept = copy.deepcopy(state)
                last_saved = time.perf_counter()
    except KeyboardInterrupt:
        if not stops_early:
            raise
        interrupts.handled()
        interrupted = True
    except NotFiniteError as error:
        if kept is None:
            raise
        method.load_state(kept["method"])
        epoch, steps, history = kept["epoch"], kept["steps"], kept["history"]
        interrupted = True
        warnings.warn(
            f"{error}. What is certified is the posterior after epoch {epoch}, the last that was "
            "kept before",
            RuntimeWarning,
            stacklevel=2,
        )
    moved = interrupted or steps != known
    return Outcome(epoch, steps, time.perf_counter() - started, interrupted, history, moved)


def _added(total: float, taken: list[tuple[Tensor, int]], epoch: int, last: int) -> float:
    """The total with objectives of steps up to the last one, each times its samples.

    Raises:
        NotFiniteError: an objective is not finite; names the epoch and step.
    """
    values = torch.stack([value for value, _ in taken]).tolist() if taken else []
    for i, (value, (_, samples)) in enumerate(zip(values, taken, strict=True)):
        if not math.isfinite(value):
            raise NotFiniteError(
                f"the objective is not finite in epoch {epoch}, step {last - len(values) + i + 1}: "
                "the learning rate is too high, or the data or weights are out of range"
            )
        total += value * samples
    return total


def _shown(budget: Budget, step: int, per_epoch: int, seconds: float) -> tuple[int, int]:
    if budget.epochs is not None:
        return step, budget.epochs * per_epoch
    assert budget.minutes is not None
    return min(int(seconds), int(60 * budget.minutes)), int(60 * budget.minutes)
