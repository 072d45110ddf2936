"""Many seeds: progress, tables, and the text of what failed."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TextIO

from fuzz.grammar import draw
from fuzz.verdict import BAD, ENTRIES, Verdict, judge

__all__ = ["Statistics", "run"]

_OUTCOMES = ("right", "refused", "flagged", "unchecked", *BAD)


@dataclass
class Statistics:
    """Counts over many cases."""

    models: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    inexact: int = 0
    needlessly: int = 0
    plain: int = 0
    plain_refusals: list[str] = field(default_factory=list)
    by_feature: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        program = verdict.case.program
        self.models += 1
        self.inexact += verdict.inexact
        self.needlessly += verdict.needlessly
        self.plain += program.plain
        kinds = {finding.outcome for finding in verdict.findings}
        for finding in verdict.findings:
            self.outcomes[finding.entry, finding.outcome] += 1
            if finding.outcome == "refused" and program.plain:
                self.plain_refusals.append(
                    f"seed {verdict.case.seed} {finding.entry} {finding.layer}: {finding.detail}"
                )
        for feature in program.features:
            self.by_feature[feature]["models"] += 1
            for kind in kinds:
                self.by_feature[feature][kind] += 1

    def table(self) -> str:
        """Outcomes by entry point, and the features of models that failed."""
        lines = [f"{self.models} models; answers by entry point and layer:", ""]
        lines.append("  " + " " * 18 + "".join(f"{name:>10s}" for name in _OUTCOMES))
        for entry in ENTRIES:
            counts = "".join(f"{self.outcomes[entry, name]:10d}" for name in _OUTCOMES)
            lines.append(f"  {entry:18s}{counts}")
        lines += [
            "",
            f"  called inexact: {self.inexact}, of them equal to the Hessian: {self.needlessly}",
            f"  plain models: {self.plain}, refusals in them: {len(self.plain_refusals)}",
        ]
        lines += [f"    {text[:200]}" for text in self.plain_refusals[:10]]
        names = ("models", "refused", *BAD)
        bad = [name for name, c in self.by_feature.items() if any(c[kind] for kind in BAD)]
        if bad:
            lines += ["", "  models by feature" + " " * 22 + "".join(f"{n:>9s}" for n in names)]
            share = {n: max(self.by_feature[n][k] for k in BAD) for n in bad}
            for name in sorted(bad, key=lambda n: -share[n] / self.by_feature[n]["models"]):
                counts = "".join(f"{self.by_feature[name][n]:9d}" for n in names)
                lines.append(f"  {name:39s}{counts}")
        return "\n".join(lines)


def run(
    seed: int, count: int, out: TextIO, show: int = 20, quiet: bool = False
) -> tuple[Statistics, list[Verdict]]:
    """Judges the seeds from ``seed`` on; prints progress, what failed (the first ``show`` in full)
    and tables."""
    statistics, failed = Statistics(), []
    begun = last = time.monotonic()
    for number in range(count):
        verdict = judge(draw(seed + number))
        statistics.add(verdict)
        if verdict.bad:
            failed.append(verdict)
            if len(failed) <= show:
                print(report(verdict), file=out)
        now = time.monotonic()
        if not quiet and (now - last > 5 or number + 1 == count):
            last = now
            left = (now - begun) / (number + 1) * (count - number - 1)
            print(
                f"[{number + 1}/{count}] {len(failed)} failed, {left:.0f} s left",
                file=out,
                flush=True,
            )
    if len(failed) > show:
        print(f"failed, not shown: {[v.case.seed for v in failed[show:]]}", file=out)
    print(statistics.table(), file=out)
    return statistics, failed


def report(verdict: Verdict) -> str:
    """A failed case as text: what was wrong, and the program."""
    lines = ["", "=" * 80]
    lines += [f"{f.outcome} {f.entry} {f.layer}: {f.detail}" for f in verdict.bad]
    return "\n".join([*lines, verdict.case.describe()])
