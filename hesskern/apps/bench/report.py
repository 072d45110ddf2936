"""A run's result as JSON, as tables for the terminal and for Markdown, and as one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hesskern.apps.bench.results import Group, Row, quartiles
from hesskern.apps.pages import template
from hesskern.files import drawn_or_kept

__all__ = ["FORMAT", "columns", "html", "markdown", "result", "show", "write"]

FORMAT = "hesskern.bench/1"


def result(
    groups: Sequence[Group],
    machine: dict[str, Any],
    settings: dict[str, Any],
    command: str,
    date: str,
) -> dict[str, Any]:
    """Everything a run found, ready for JSON: what is infinite or no number is None there."""
    return {
        "format": FORMAT,
        "date": date,
        "command": command,
        "machine": machine,
        "settings": settings,
        "groups": [_finite(group.to_dict()) for group in groups],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def columns(group: Group) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a group's table; columns without any figure are left out."""
    subject = group.rows[0]
    extra = list(dict.fromkeys(name for row in group.rows for name in row.figures))
    table: list[tuple[str, list[str]]] = [
        ("contender", [row.name for row in group.rows]),
        ("median", [duration(row.median) if row.median else "" for row in group.rows]),
        ("IQR", [_spread(row) for row in group.rows]),
        ("CPU time", [_cpu(row) for row in group.rows]),
        ("gradients", [_in_gradients(row, group) for row in group.rows]),
        (f"over {subject.name}", [_ratio(row) for row in group.rows]),
        ("peak memory", [_memory(row) for row in group.rows]),
        ("once before", [_setup(row) for row in group.rows]),
        *((name, [_figure(row.figures.get(name)) for row in group.rows]) for name in extra),
        ("difference", [_difference(row) for row in group.rows]),
        ("note", [_note(row) for row in group.rows]),
    ]
    kept = [(heading, cells) for heading, cells in table if any(cells)]
    rows = [list(cells) for cells in zip(*(cells for _, cells in kept), strict=True)]
    return [heading for heading, _ in kept], rows


def _spread(row: Row) -> str:
    if len(row.seconds) < 2:
        return ""
    low, middle, high = quartiles(row.seconds)
    return f"{100 * (high - low) / middle:.0f}%"


def _cpu(row: Row) -> str:
    return duration(quartiles(row.cpu_seconds)[1]) if row.cpu_seconds else ""


def _in_gradients(row: Row, group: Group) -> str:
    if row.median is None or not group.gradient_seconds:
        return ""
    return _digits(row.median / group.gradient_seconds)


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{_digits(row.ratio)}x"


def _memory(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"


def _setup(row: Row) -> str:
    # Making a closure is no preparation.
    if row.setup_seconds is None or row.setup_seconds < 1e-3:
        return ""
    return duration(row.setup_seconds)


def _figure(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2g}"


def _difference(row: Row) -> str:
    return "" if row.difference is None else f"{row.difference:.1e}"


def _note(row: Row) -> str:
    wrong = f"DISAGREES, limit {row.limit:.1e}" if row.disagrees else ""
    return "; ".join(filter(None, [wrong, row.note]))


def show(console: Console, group: Group) -> None:
    """A group's table on the terminal."""
    headings, rows = _narrowed(*columns(group), console.width)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for i, heading in enumerate(headings):
        left = i == 0 or heading == "note"
        # Figures stay whole; names and notes give way on a narrow terminal.
        table.add_column(escape(heading), justify="left" if left else "right", no_wrap=not left)
    for row, cells in zip(group.rows, rows, strict=True):
        table.add_row(*map(escape, cells), style="red" if row.disagrees else None)
    console.print(f"\n[bold]{escape(group.title)}[/bold]\n[dim]{escape(group.description)}[/dim]")
    console.print(table)


# What a narrow terminal goes without, first things first.
_DISPENSABLE = ("CPU time", "IQR", "once before", "gradients", "peak memory")


def _narrowed(
    headings: list[str], rows: list[list[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """The columns that fit into ``width`` characters, as far as there are dispensable ones."""
    for name in _DISPENSABLE:
        taken = sum(2 + max(map(len, column)) for column in zip(headings, *rows, strict=True))
        if taken <= width:
            break
        if name in headings:
            i = headings.index(name)
            headings = headings[:i] + headings[i + 1 :]
            rows = [cells[:i] + cells[i + 1 :] for cells in rows]
    return headings, rows


def markdown(run: dict[str, Any], groups: Sequence[Group]) -> str:
    """The tables as Markdown, with the command and the machine above them."""
    lines = [f"`{run['command']}`, {run['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in _machine_lines(run)]
    for group in groups:
        headings, rows = columns(group)
        lines += ["", f"### {group.title}", "", f"{group.description}.", ""]
        lines.append("| " + " | ".join(headings) + " |")
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(headings) - 1)) + "|")
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows
        ]
    return "\n".join(lines) + "\n"


def _machine_lines(run: dict[str, Any]) -> list[tuple[str, str]]:
    machine = run["machine"]
    peers = [f"{name} {version or 'not installed'}" for name, version in machine["peers"].items()]
    return [
        ("CPU", f"{machine['cpu']}; {machine['instructions']}"),
        ("threads", f"{machine['threads']}; load average before the run {machine['load']:.2f}"),
        ("torch", f"{machine['torch']}, {machine['blas']}"),
        ("hesskern", f"{machine['hesskern']}, kernels {machine['build'].get('sources', '')}"),
        ("peers", ", ".join(peers)),
    ]


def html(run: dict[str, Any], groups: Sequence[Group]) -> str:
    """One page with a chart and a table per group; everything it needs is inside."""
    shown = []
    for group in groups:
        headings, rows = columns(group)
        shown.append({"group": group, "headings": headings, "rows": rows, "bars": _bars(group)})
    return template("bench.html.j2").render(run=run, machine=_machine_lines(run), groups=shown)


def _bars(group: Group) -> list[dict[str, Any]]:
    """Length (percent of the longest), label and kind of every contender's bar."""
    medians = [row.median for row in group.rows if row.median is not None]
    longest = max(medians, default=1.0)
    return [
        {
            "name": row.name,
            "width": 100 * row.median / longest,
            "label": f"{duration(row.median)}  {_ratio(row)}",
            "ours": row.name.startswith("hesskern"),
        }
        for row in group.rows
        if row.median is not None
    ]


def write(run: dict[str, Any], groups: Sequence[Group], folder: Path) -> list[Path]:
    """Writes ``bench.html``, ``bench.json`` and ``bench.md`` into ``folder``; their paths.

    Raises:
        NotDrawnError: the page could not be made; the JSON is written all the same.
        OSError: ``folder`` cannot be written; says where the files are instead.
    """

    def draw() -> dict[str, bytes]:
        return {
            "bench.html": html(run, groups).encode(),
            "bench.md": markdown(run, groups).encode(),
        }

    numbers = {"bench.json": (json.dumps(run, indent=1, allow_nan=False) + "\n").encode()}
    return sorted(drawn_or_kept(folder, numbers, draw))
