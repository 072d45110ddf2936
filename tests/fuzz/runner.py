"""Many seeds: progress, tables, and the text of what failed."""

from __future__ import annotations

import functools
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

import torch

from fuzz.grammar import draw
from fuzz.on_device import judge_on
from fuzz.verdict import BAD, ENTRIES, Verdict, judge

__all__ = ["Statistics", "report", "run"]

_OUTCOMES = ("right", "refused", "flagged", "unchecked", *BAD)
_UNREACHED = re.compile(r"(never|not) reached")


@dataclass
class Statistics:
    """Counts over many cases."""

    models: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    unchecked: Counter[str] = field(default_factory=Counter)
    inexact: int = 0
    needlessly: int = 0
    plain: int = 0
    plain_refusals: list[str] = field(default_factory=list)
    by_feature: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, verdict: Verdict) -> None:
        program = verdict.case.program
        self.models += 1
        self.inexact += verdict.inexact
        self.needlessly += verdict.needlessly
        self.plain += program.plain
        kinds = {finding.outcome for finding in verdict.findings}
        for finding in verdict.findings:
            entry = finding.entry.split(" ", 1)[0]
            self.outcomes[entry, finding.outcome] += 1
            if finding.outcome == "unchecked":
                self.unchecked[f"{finding.entry}: {finding.detail}"] += 1
            refused = finding.outcome == "refused" and not _UNREACHED.search(finding.detail)
            if refused and program.plain:
                self.plain_refusals.append(
                    f"seed {verdict.case.seed} {finding.entry} {finding.layer}: {finding.detail}"
                )
        for feature in program.features:
            self.by_feature.setdefault(feature, Counter()).update(["models", *kinds])

    def merge(self, other: Statistics) -> None:
        self.models += other.models
        self.outcomes.update(other.outcomes)
        self.unchecked.update(other.unchecked)
        self.inexact += other.inexact
        self.needlessly += other.needlessly
        self.plain += other.plain
        self.plain_refusals += other.plain_refusals
        for feature, counts in other.by_feature.items():
            self.by_feature.setdefault(feature, Counter()).update(counts)

    def table(self) -> str:
        """Outcomes by entry point, and the features of models that failed."""
        lines = [f"{self.models} models; answers by entry point and layer:", ""]
        lines.append("  " + " " * 18 + "".join(f"{name:>10s}" for name in _OUTCOMES))
        known = sorted({entry for entry, _ in self.outcomes} - set(ENTRIES))
        for entry in (*ENTRIES, *known):
            counts = "".join(f"{self.outcomes[entry, name]:10d}" for name in _OUTCOMES)
            lines.append(f"  {entry:18s}{counts}")
        lines += ["", "  not checked:"]
        lines += [f"    {count:6d}  {why}" for why, count in self.unchecked.most_common(12)]
        lines += [
            "",
            f"  called inexact: {self.inexact}, of them equal to the Hessian: {self.needlessly}",
            f"  plain models: {self.plain}, refused in them: {len(self.plain_refusals)}",
        ]
        lines += [f"    {text[:200]}" for text in self.plain_refusals[:10]]
        names = ("models", "refused", *BAD)
        failed = [name for name, c in self.by_feature.items() if any(c[kind] for kind in BAD)]
        if failed:
            lines += ["", "  models by feature" + " " * 22 + "".join(f"{n:>9s}" for n in names)]
            for name in sorted(failed, key=self._failing, reverse=True):
                counts = "".join(f"{self.by_feature[name][n]:9d}" for n in names)
                lines.append(f"  {name:39s}{counts}")
        return "\n".join(lines)

    def _failing(self, feature: str) -> float:
        counts = self.by_feature[feature]
        return max(counts[kind] for kind in BAD) / counts["models"]


@dataclass
class _Part:
    """What became of some seeds; ``failed`` holds seeds and reports."""

    count: int
    statistics: Statistics
    failed: list[tuple[int, str]]


def _part(seeds: range, thorough: bool = False, device: str = "cpu") -> _Part:
    torch.set_num_threads(1)
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False
    statistics, failed = Statistics(), []
    for seed in seeds:
        case = draw(seed)
        if device == "cpu":
            verdict = judge(case, thorough=thorough)
        else:
            verdict = judge_on(torch.device(device), case)
        statistics.add(verdict)
        if verdict.bad:
            failed.append((seed, report(verdict)))
    return _Part(len(seeds), statistics, failed)


def _parts(seeds: range, jobs: int, thorough: bool, device: str) -> Iterator[_Part]:
    chunks = [seeds[start : start + 10] for start in range(0, len(seeds), 10)]
    part = functools.partial(_part, thorough=thorough, device=device)
    if jobs == 1:
        yield from map(part, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(part, chunks)


def run(
    seed: int,
    count: int,
    out: TextIO,
    show: int = 20,
    jobs: int = 1,
    thorough: bool = False,
    device: str = "cpu",
) -> list[int]:
    """Judges the seeds from ``seed`` on; prints progress, what failed and tables.

    Args:
        seed: the first.
        count: of seeds.
        out: where to print.
        show: failures that are printed with their program; the others by seed alone.
        jobs: processes.
        thorough: as in :func:`fuzz.verdict.judge`.
        device: another than the CPU is held against the CPU.

    Returns:
        seeds that failed.
    """
    total = Statistics()
    failed: list[int] = []
    begun = last = time.monotonic()
    for part in _parts(range(seed, seed + count), jobs, thorough, device):
        total.merge(part.statistics)
        for number, text in part.failed:
            if len(failed) < show:
                print(text, file=out)
            failed.append(number)
        now = time.monotonic()
        if now - last > 5 or total.models == count:
            last = now
            left = (now - begun) / total.models * (count - total.models)
            line = f"[{total.models}/{count}] {len(failed)} failed, {left:.0f} s left"
            print(line, file=out, flush=True)
    if len(failed) > show:
        print(f"failed, not shown: {sorted(failed[show:])}", file=out)
    print(total.table(), file=out)
    return sorted(failed)


def report(verdict: Verdict) -> str:
    """A failed case as text: what was wrong, and the program."""
    lines = ["", "=" * 80]
    lines += [f"{f.outcome} {f.entry} {f.layer}: {f.detail}" for f in verdict.bad]
    return "\n".join([*lines, verdict.case.describe()])
