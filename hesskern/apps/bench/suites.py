"""All suites by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hesskern.apps.bench import (
    eigen,
    ekfac,
    factors,
    influence,
    kernels,
    kfac_step,
    kron,
    lm,
    matvec,
    solve,
)
from hesskern.apps.bench.contenders import Problem
from hesskern.apps.bench.results import Group, Row, quartiles

__all__ = ["SUITES", "Suite", "find_problem", "sum_over"]


@dataclass(frozen=True)
class Suite:
    """Problems that belong together.

    Attributes:
        title: what is measured, in one line.
        problems: makes the list; nothing is computed before a problem is run.
        trained: whether its problems need the trained F-200^2.
        summed: title of a group that sums the medians over the problems; None: no such group.
        needs: distribution without which there is nothing to run; None: none.
    """

    title: str
    problems: Callable[[], list[Problem]]
    trained: bool = False
    summed: str | None = None
    needs: str | None = None


SUITES: dict[str, Suite] = {
    "factors": Suite("Kronecker factors of every layer, exact and MC", factors.problems),
    "matvec": Suite(
        "one exact H v of every layer of F-200^2",
        matvec.problems,
        trained=True,
        summed="one H v of every layer",
    ),
    "eigen": Suite(
        "leading eigenpairs of every layer of F-200^2",
        eigen.problems,
        trained=True,
        summed="leading eigenpairs of every layer",
    ),
    "lm": Suite(
        "factors and input covariances of a native GPT-2", lm.problems, needs="transformers"
    ),
    "ekfac": Suite("EKFAC of every layer: factors, eigenbases and corrections", ekfac.problems),
    "influence": Suite(
        "influence of training samples on queries, with the EKFAC that it takes",
        influence.problems,
        needs="transformers",
    ),
    "solve": Suite("solves with all layers' damped Kronecker products", solve.problems),
    "kfac-step": Suite("training steps with K-FAC", kfac_step.problems),
    "kron": Suite("products with Kronecker factors", kron.problems),
    "kernels": Suite("single operators against torch", kernels.problems),
}


def find_problem(suite: str, key: str) -> Problem:
    """One problem by name.

    Raises:
        ValueError: there is none.
    """
    found = [p for p in SUITES[suite].problems() if p.key == key] if suite in SUITES else []
    if not found:
        raise ValueError(f"there is no problem {key!r} in suite {suite!r}")
    return found[0]


def sum_over(suite: str, title: str, groups: list[Group]) -> Group:
    """Sums of medians over the groups, for contenders that ran in all of them."""
    names = [row.name for row in groups[0].rows]
    rows = []
    for name in names:
        parts = [row for group in groups for row in group.rows if row.name == name]
        medians = [row.median for row in parts]
        known = [median for median in medians if median is not None]
        row = Row(name)
        if len(known) == len(groups):
            row.seconds = [sum(known)]
            row.cpu_seconds = [sum(quartiles(part.cpu_seconds)[1] for part in parts)]
            row.setup_seconds = sum(part.setup_seconds or 0.0 for part in parts)
            for heading in parts[0].figures:
                values = [part.figures.get(heading) for part in parts]
                numbers = [float(v) for v in values if isinstance(v, (int, float))]
                if heading == "products" and len(numbers) == len(values):
                    row.figures[heading] = sum(numbers)
        else:
            row.note = next((part.note for part in parts if part.note), "did not run everywhere")
        rows.append(row)
    if rows[0].seconds:
        for row in rows:
            row.ratios = [seconds / rows[0].seconds[0] for seconds in row.seconds]
    gradients = [g.gradient_seconds for g in groups if g.gradient_seconds is not None]
    unit = sum(gradients) / len(gradients) if gradients else None
    return Group(suite, "sum", title, "sums of the medians above", rows, unit)
