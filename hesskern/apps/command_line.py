"""What every long subcommand of ``hesskern`` shares: its progress, its errors, its own words."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from hesskern import interrupts
from hesskern.apps.processes import Processes, opened, place
from hesskern.files import NotDrawnError
from hesskern.parallel.ranks import RankError
from hesskern.progress import Progress, reporter

__all__ = [
    "command_line",
    "count_option",
    "device_option",
    "json_option",
    "output_option",
    "root_option",
    "running",
    "shown_option",
    "together",
]

_F = TypeVar("_F", bound=Callable[..., Any])

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder with the data's files.  [default: $HESSKERN_DATA]",
)


def shown_option(*names: str, default: Any, type: Any = None, help: str) -> Callable[[_F], _F]:
    """An option whose default stands in the help."""
    return click.option(*names, type=type, default=default, show_default=True, help=help)


def count_option(*names: str, help: str, least: int = 1) -> Callable[[_F], _F]:
    """An option for a whole number, with a default that the command has itself."""
    return click.option(*names, type=click.IntRange(min=least), help=help)


device_option = shown_option("--device", default="cpu", help="Torch device, e.g. cuda.")


def output_option(folder: str, help: str) -> Callable[[_F], _F]:
    """``--output``, by default ``folder`` beside where the command is typed."""
    kind = click.Path(file_okay=False, path_type=Path)
    return shown_option("--output", type=kind, default=Path(folder), help=help)


def json_option(what: str = "the result") -> Callable[[_F], _F]:
    """``--json``, which is ``as_json`` for the command."""
    return click.option(
        "--json", "as_json", is_flag=True, help=f"Print {what} as JSON; all else goes to stderr."
    )


_INTERRUPTED = 130
_EXPECTED = (ValueError, TypeError, NotImplementedError, NotDrawnError, RankError, OSError)


@contextmanager
def running(context: click.Context) -> Iterator[Progress]:
    """Progress for a long command; wrong input and Ctrl-C end it with one line.

    Of several processes that torchrun has started the first does the work, the others nothing.
    """
    with _ending(context, reporter(True)) as checked:
        here = place()
        if here is not None and here.rank > 0:
            context.exit()
        yield checked


@contextmanager
def together(context: click.Context) -> Iterator[tuple[Processes, Progress]]:
    """:func:`running` with the processes that torchrun has started, which share the work."""
    # What the others would say, nobody hears.
    report = reporter(os.environ.get("RANK", "0") == "0")
    with _ending(context, report) as checked, opened(context.params["device"]) as processes:
        yield processes, checked


@contextmanager
def _ending(context: click.Context, report: Progress) -> Iterator[Progress]:
    def checked(description: str, done: int, total: int | None) -> None:
        interrupts.check()
        report(description, done, total)

    try:
        yield checked
    except KeyboardInterrupt:
        interrupts.handled()
        _close(report)
        click.echo("Interrupted; no file was left half-written.", err=True)
        context.exit(_INTERRUPTED)
    except _EXPECTED as error:
        _close(report)
        raise click.ClickException(str(error)) from error


def _close(report: Progress) -> None:
    close = getattr(report, "close", None)
    if close is not None:
        close()


def command_line(context: click.Context) -> str:
    """The command as it was typed, options in their declared order."""
    words = context.command_path.split()
    for parameter in context.command.params:
        if not isinstance(parameter, click.Option) or parameter.name is None:
            continue
        if context.get_parameter_source(parameter.name) != ParameterSource.COMMANDLINE:
            continue
        value = context.params[parameter.name]
        for item in value if parameter.multiple else (value,):
            words += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], str(item)]
    return shlex.join(words)
