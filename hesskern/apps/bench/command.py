"""``hesskern bench``."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hesskern.apps.bench import report
from hesskern.apps.bench.cases import train_f200
from hesskern.apps.bench.contenders import Problem
from hesskern.apps.bench.machine import facts, installed_version
from hesskern.apps.bench.results import Group
from hesskern.apps.bench.runner import run_problem
from hesskern.apps.bench.settings import Settings
from hesskern.apps.bench.suites import SUITES, sum_over
from hesskern.apps.command_line import command_line, count_option, running, shown_option
from hesskern.files import check_writable, write_files
from hesskern.progress import Progress
from hesskern.text import listed

__all__ = ["bench", "run_suites"]


@click.command(
    "bench",
    epilog="Suites: " + "; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items()) + ".",
)
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)), metavar="[SUITE]...")
@click.option("--quick", is_flag=True, help="Small data: does it run, not how fast is it.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write the result to this file; - for standard output, tables then go to stderr.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for bench.html (a chart per problem), bench.json and bench.md.",
)
@count_option("--threads", help="Threads of torch.  [default: torch's own]")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder with MNIST's files.  [default: $HESSKERN_DATA, else synthetic data]",
)
@shown_option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    help="Rounds; in each every contender runs once, in turn.",
)
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory.")
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Of the suites only problems whose key fits, e.g. 'gpt2-*' in ekfac; may be repeated.",
)
@click.pass_context
def bench(
    context: click.Context,
    /,
    suites: tuple[str, ...],
    json_file: Path | None,
    output: Path | None,
    threads: int | None,
    no_memory: bool,
    only: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure hesskern side by side with autograd and with other packages.

    All contenders of a problem solve it in one process, round by round, in float32 on the CPU;
    their results are compared as well, and a difference beyond rounding ends the command with
    status 1. Without SUITE all of them run, which takes about half an hour; eigen is the longest.
    Packages that are not installed are left out.
    """
    settings = Settings(threads=threads or 0, memory=not no_memory, **options)
    to_stdout = json_file is not None and str(json_file) == "-"
    console = Console(stderr=to_stdout, highlight=False)
    if not console.is_terminal:
        # A file or a pipe has no width; rich would take 80.
        console.width = 160
    with running(context) as progress:
        if output is not None:
            check_writable(output)
        if json_file is not None and not to_stdout:
            check_writable(json_file.absolute().parent, "json: folder")
        machine = facts(settings.threads)
        names = list(dict.fromkeys(suites)) or list(SUITES)
        problems = {name: _chosen(SUITES[name].problems(), only) for name in names}
        if not any(problems.values()):
            keys = [p.key for name in names for p in SUITES[name].problems()]
            raise ValueError(f"only fits no problem: {', '.join(only)}; there are {listed(keys)}")
        plain = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(settings).items()}
        groups: list[Group] = []

        def write() -> None:
            run = report.result(
                groups,
                machine,
                plain,
                " ".join([command_line(context), *suites]),
                datetime.date.today().isoformat(),
            )
            text = json.dumps(run, indent=1, allow_nan=False) + "\n"
            if to_stdout:
                click.echo(text, nl=False)
            elif json_file is not None:
                write_files(json_file.absolute().parent, {json_file.name: text.encode()})
            if output is not None:
                paths = ", ".join(map(str, report.write(run, groups, output)))
                console.print(f"\n[bold]Report:[/bold] {paths}", soft_wrap=True)

        try:
            run_suites(problems, settings, progress, console, groups)
        except Exception:
            if groups:
                write()
                click.echo("An error ended the run; what came before it was kept.", err=True)
            raise
        write()
    wrong = [f"{row.name} on {g.title}" for g in groups for row in g.rows if row.disagrees]
    if wrong:
        raise click.ClickException("results differ by more than rounding: " + "; ".join(wrong))


def _chosen(problems: list[Problem], only: tuple[str, ...]) -> list[Problem]:
    """Problems whose keys fit one of the patterns; without patterns all."""
    return [p for p in problems if not only or any(fnmatchcase(p.key, o) for o in only)]


def run_suites(
    problems: Mapping[str, list[Problem]],
    settings: Settings,
    progress: Progress,
    console: Console,
    groups: list[Group],
) -> None:
    """Runs these problems by suite, showing each one's table as soon as it is there.

    ``groups`` takes what was found, also if an error ends the run.
    """
    with tempfile.TemporaryDirectory(prefix="hesskern-bench-") as folder:
        if (
            any(SUITES[name].trained for name in problems if problems[name])
            and settings.checkpoint is None
        ):
            path = Path(folder) / "f200x2.safetensors"
            train_f200(settings, path, progress)
            settings = replace(settings, checkpoint=path)
        for name, chosen in problems.items():
            suite = SUITES[name]
            if not chosen:
                continue
            if suite.needs is not None and installed_version(suite.needs) is None:
                console.print(f"\n{name}: left out, {suite.needs} is not installed")
                continue
            found = []
            for problem in chosen:
                found.append(run_problem(problem, settings, progress))
                groups.append(found[-1])
                report.show(console, found[-1])
            if suite.summed is not None and len(found) > 1:
                groups.append(sum_over(name, suite.summed, found))
                report.show(console, groups[-1])
