"""Runs all contenders of a problem in turn and compares what they take and what they return."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark.utils.common import set_torch_threads

from hesskern.apps.bench.contenders import Call, Contender, Problem
from hesskern.apps.bench.machine import installed_version
from hesskern.apps.bench.memory import peak_memory
from hesskern.apps.bench.results import Group, Row
from hesskern.apps.bench.settings import Settings
from hesskern.progress import Progress

__all__ = ["run_problem"]

# A timed block lasts about this long, so that the clock and the call itself do not count.
_BLOCK_SECONDS = 0.05
# A contender may take about this long over all rounds; slower ones run fewer of them.
_CONTENDER_SECONDS = 100.0


@dataclass
class _Runner:
    """A contender that is ready.

    Attributes:
        number: calls per timed block.
        rounds: how many rounds it takes part in.
        result: of the first call, until it has been compared.
    """

    contender: Contender
    row: Row
    call: Call
    number: int
    rounds: int
    result: Any

    def block(self) -> float:
        """Runs one block of calls; returns, and notes, the seconds per call."""
        gc.disable()
        try:
            with _own_warnings(self.contender):
                busy, started = time.process_time(), time.perf_counter()
                for _ in range(self.number):
                    self.call()
                seconds = (time.perf_counter() - started) / self.number
                self.row.seconds.append(seconds)
                self.row.cpu_seconds.append((time.process_time() - busy) / self.number)
                return seconds
        finally:
            gc.enable()


@contextmanager
def _own_warnings(contender: Contender) -> Iterator[None]:
    """Hides what another package warns about (e.g. reference cycles): it is not ours to fix."""
    with warnings.catch_warnings():
        if contender.package is not None:
            warnings.simplefilter("ignore")
        yield


def run_problem(problem: Problem, settings: Settings, progress: Progress) -> Group:
    """Prepares every contender, runs them in turn, round by round, and compares the results.

    Within a round all contenders run one after the other, so ratios are of neighbours in time.
    :class:`torch.utils.benchmark.Timer` would run every call three times for one figure; the
    rounds here collect into its :class:`~torch.utils.benchmark.Measurement` instead.

    A package that is missing or fails becomes a row that says so; an error in hesskern is raised.
    """
    with set_torch_threads(settings.threads):
        title, description, listed = problem.build(settings, progress)
        references = [contender for contender in listed if contender.reference]
        contenders = [contender for contender in listed if not contender.reference]
        shown = f"{problem.suite}: {title}"
        total = len(contenders) * (1 + settings.repeats)
        rows, runners = [], []
        for i, contender in enumerate(contenders):
            progress(shown, i, total)
            row, runner = _start(contender, problem.once, settings.repeats)
            rows.append(row)
            if runner is not None:
                runners.append(runner)
        done = len(contenders)
        for index in range(settings.repeats):
            times = {}
            for runner in runners:
                done += 1
                progress(shown, min(done, total - 1), total)
                if index >= runner.rounds:
                    continue
                try:
                    times[runner.contender.name] = runner.block()
                except Exception as error:
                    # It worked the first time; what was measured of it stays.
                    _note_failure(runner.contender, runner.row, error)
                    runner.rounds = 0
            _pair(runners, times, contenders[0].name)
        _compare(problem, runners, references)
        progress(shown, total, total)
    _summarize(runners, settings.threads)
    unit = next((r for r in runners if r.contender.unit), None)
    group = Group(
        problem.suite,
        problem.key,
        title,
        description,
        [row for row, c in zip(rows, contenders, strict=True) if not c.unit],
        unit.row.median if unit else None,
    )
    # The results and what was prepared would only take memory from the processes that follow.
    runners.clear()
    gc.collect()
    if problem.memory and settings.memory:
        _add_memory(problem, contenders, group, settings, progress)
    return group


def _start(contender: Contender, once: bool, repeats: int) -> tuple[Row, _Runner | None]:
    """Prepares a contender and calls it a first time, which also warms it up."""
    row = Row(contender.name)
    if contender.package and installed_version(contender.package) is None:
        row.note = "not installed"
        return row, None
    try:
        with _own_warnings(contender):
            started = time.perf_counter()
            call = contender.prepare()
            busy, prepared = time.process_time(), time.perf_counter()
            result = call()
            first = time.perf_counter() - prepared
            first_cpu = time.process_time() - busy
        if contender.figures is not None:
            row.figures = contender.figures(result)
    except Exception as error:
        _note_failure(contender, row, error)
        return row, None
    row.setup_seconds = prepared - started
    # Only what is compared stays.
    kept = result if contender.read is not None else None
    del result
    if once and first > _CONTENDER_SECONDS / 10:
        row.seconds.append(first)
        row.cpu_seconds.append(first_cpu)
        return row, _Runner(contender, row, call, 1, 0, kept)
    seconds = first
    if first < _BLOCK_SECONDS:
        # The first call also loads code and fills caches.
        try:
            with _own_warnings(contender):
                started = time.perf_counter()
                call()
                seconds = time.perf_counter() - started
        except Exception as error:
            _note_failure(contender, row, error)
            return row, None
    number = max(1, round(_BLOCK_SECONDS / max(seconds, 1e-9)))
    rounds = min(repeats, max(1, int(_CONTENDER_SECONDS / max(first, 1e-9))))
    return row, _Runner(contender, row, call, number, rounds, kept)


def _note_failure(contender: Contender, row: Row, error: Exception) -> None:
    """What another package does is noted; an error in hesskern is raised."""
    if contender.package is None:
        raise error
    text = str(error).strip().splitlines()
    note = f"failed: {type(error).__name__}: {text[0] if text else ''}"[:160]
    row.note = "; ".join(filter(None, [row.note, note]))


def _pair(runners: Sequence[_Runner], times: dict[str, float], subject: str) -> None:
    """Ratios to the subject of what ran in this round."""
    for runner in runners:
        seconds = times.get(runner.contender.name)
        if seconds is not None and subject in times:
            runner.row.ratios.append(seconds / times[subject])


def _compare(problem: Problem, runners: Sequence[_Runner], references: Sequence[Contender]) -> None:
    """Differences of all results to that of the first reference that works, or the subject's."""
    if problem.difference is None or not runners:
        return
    subject, read = runners[0], runners[0].contender.read
    if read is None:
        return
    found = next(filter(None, map(_reference, references)), None)
    compared = runners[1:] if found is None else runners
    expected = read(subject.result) if found is None else found[0]
    for runner in compared:
        contender = runner.contender
        if contender.read is None:
            continue
        try:
            runner.row.difference = problem.difference(contender.read(runner.result), expected)
            limit = contender.limit
            runner.row.limit = limit(expected) if callable(limit) else limit
        except Exception as error:
            _note_failure(contender, runner.row, error)
        runner.result = None


def _reference(contender: Contender) -> tuple[Any] | None:
    """A reference's result in a tuple of its own, or None where its package is missing or fails."""
    if contender.package and installed_version(contender.package) is None:
        return None
    assert contender.read is not None
    try:
        with _own_warnings(contender):
            return (contender.read(contender.prepare()()),)
    except Exception:
        if contender.package is None:
            raise
        return None


def _summarize(runners: Sequence[_Runner], threads: int) -> None:
    """Ratios of contenders that ran outside the rounds, and torch's own view of the times."""
    subject = runners[0].row if runners else None
    for runner in runners:
        if not runner.row.seconds:
            continue
        measurement = Measurement(
            runner.number,
            [seconds * runner.number for seconds in runner.row.seconds],
            TaskSpec(runner.contender.name, "", num_threads=threads),
        )
        if not runner.row.ratios and subject is not None and subject.median:
            runner.row.ratios = [seconds / subject.median for seconds in runner.row.seconds]
        if measurement.has_warnings and len(runner.row.seconds) > 1:
            runner.row.note = "; ".join(filter(None, [runner.row.note, "unsteady times"]))


def _add_memory(
    problem: Problem,
    contenders: Sequence[Contender],
    group: Group,
    settings: Settings,
    progress: Callable[[str, int, int | None], None],
) -> None:
    rows = [row for row in group.rows if row.seconds]
    shown = f"{problem.suite}: {group.title}, memory"
    for i, row in enumerate(rows):
        progress(shown, i, len(rows))
        row.peak_bytes = peak_memory(problem.suite, problem.key, row.name, settings)
    progress(shown, len(rows), len(rows))
