"""What the grid scripts beside this file share: options, rounds, table and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from hesskern.apps.bench.contenders import Call, Contender, Problem, relative_difference
from hesskern.apps.bench.machine import facts
from hesskern.apps.bench.results import Group, Row, quartiles
from hesskern.apps.bench.runner import run_problem
from hesskern.apps.bench.settings import Settings
from hesskern.progress import reporter

__all__ = ["compare", "normal", "options", "spread", "upper", "write"]

# Torch's own float32 sums of millions of terms are not better.
_AGREEMENT = 1e-3


def options(description: str) -> argparse.ArgumentParser:
    """Options of every grid."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per point (5)")
    parser.add_argument("--only", default="", help="points whose name contains this text")
    return parser


def normal(*shape: int) -> Tensor:
    """Standard normal values, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def upper(matrix: Tensor) -> Tensor:
    """What accumulators define: the upper triangle."""
    return matrix.triu()


def _ready(call: Call) -> Call:
    return call


def compare(name: str, calls: dict[str, Call], repeats: int) -> Group:
    """Rounds in which every call runs once, in turn; the first is the subject."""
    contenders = [
        Contender(key, partial(_ready, call), read=upper, limit=_AGREEMENT)
        for key, call in calls.items()
    ]
    problem = Problem(
        "grid", name, lambda settings, progress: (name, "", contenders), relative_difference
    )
    group = run_problem(problem, Settings(repeats=repeats, memory=False), reporter(False))
    wrong = [row.name for row in group.rows if row.disagrees]
    if wrong:
        raise SystemExit(f"{name}: results differ by more than {_AGREEMENT}: {', '.join(wrong)}")
    return group


def spread(row: Row) -> str:
    """Median of the rounds in milliseconds and their interquartile range as a part of it."""
    low, middle, high = quartiles(row.seconds)
    return f"{middle * 1e3:9.3f} ±{(high - low) / middle / 2:4.0%}"


def write(path: Path | None, groups: Sequence[Group], extra: Iterable[dict[str, Any]]) -> None:
    """All groups, each with its further figures, as JSON."""
    if path is None:
        return
    points = [group.to_dict() | more for group, more in zip(groups, extra, strict=True)]
    path.write_text(json.dumps({"facts": facts(torch.get_num_threads()), "points": points}))
