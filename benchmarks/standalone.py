"""Runs one script's problems; ``hesskern bench kernels`` runs those of all scripts."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from hesskern.apps.bench import report
from hesskern.apps.bench.contenders import Problem
from hesskern.apps.bench.machine import facts
from hesskern.apps.bench.runner import run_problem
from hesskern.apps.bench.settings import Settings


def main(make_problems: Callable[[], list[Problem]]) -> None:
    """Command line of a script: tables on standard output, all figures with ``--json FILE``."""

    @click.command()
    @click.argument("keys", nargs=-1, metavar="[PROBLEM]...")
    @click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
    @click.option("--quick", is_flag=True, help="Small data: does it run.")
    @click.option("--threads", type=click.IntRange(min=1), help="[default: torch's own]")
    @click.option("--repeats", type=click.IntRange(min=1), default=9, show_default=True)
    def run(
        keys: tuple[str, ...],
        json_file: Path | None,
        quick: bool,
        threads: int | None,
        repeats: int,
    ) -> None:
        """Runs the problems whose names contain one of PROBLEM, or all of them."""
        settings = Settings(threads=threads or 0, quick=quick, repeats=repeats, memory=False)
        console = Console(width=160, highlight=False)
        groups = []
        for problem in make_problems():
            if keys and not any(key in problem.key for key in keys):
                continue
            groups.append(run_problem(problem, settings, lambda *_: None))
            report.show(console, groups[-1])
        if json_file is not None:
            options = {"threads": settings.threads, "quick": quick, "repeats": repeats}
            today = datetime.date.today().isoformat()
            command = f"python {Path(sys.argv[0]).name}"
            result = report.result(groups, facts(settings.threads), options, command, today)
            json_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

    run()
