"""``hesskern reproduce``."""

from __future__ import annotations

import json
import re
import time
import traceback
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hesskern.apps.analyze.analysis import versions
from hesskern.apps.command_line import (
    command_line,
    count_option,
    device_option,
    json_option,
    output_option,
    root_option,
    shown_option,
    together,
)
from hesskern.apps.reproduce.catalogue import ITEMS
from hesskern.apps.reproduce.items import Item
from hesskern.apps.reproduce.lab import PROFILES, Lab, Overrides
from hesskern.apps.reproduce.report import RESULT, describe, verdict_words, write_item, write_page
from hesskern.devices import usable_device
from hesskern.files import NotDrawnError, check_writable
from hesskern.parallel.ranks import RankError
from hesskern.text import counted
from hesskern.zoo.data import DATASETS
from hesskern.zoo.models import KNOWN_MODELS

__all__ = ["parse_budget", "reproduce"]

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


@click.command("reproduce")
@click.argument("items", nargs=-1, metavar="[ITEM | all]...")
@click.option("--list", "listing", is_flag=True, help="Name the items, with expected times.")
@shown_option(
    "--profile",
    type=click.Choice(PROFILES),
    default="quick",
    help="Training: minutes (fewer epochs), or the published 1000 epochs, plain or with momentum.",
)
@click.option("--budget", help="Time, e.g. 2h or 45m: items that do not fit are left out.")
@output_option(
    "hesskern-reproduce",
    "Folder for pages, figures, numbers, and the checkpoints that a later run goes on from.",
)
@root_option
@device_option
@count_option("--seeds", help="Number of seeds.  [default: 3; paper: 5]")
@count_option("--top", help="Exact eigenpairs per layer.  [default: 50; paper: 200]")
@shown_option(
    "--memory",
    type=click.FloatRange(min=0),
    default=4.0,
    help="GiB of samples that Hessians keep; layers above it run the network again.",
)
@click.option("--data", type=click.Choice(list(DATASETS)), help="Other data than the item's.")
@click.option("--model", help=f"Another network than the item's: {KNOWN_MODELS}.")
@count_option("--epochs", least=0, help="Epochs instead of the profile's.")
@count_option("--limit", help="Only the first so many samples.")
@json_option("the results")
@click.pass_context
def reproduce(
    context: click.Context,
    /,
    items: tuple[str, ...],
    listing: bool,
    profile: str,
    budget: str | None,
    output: Path,
    root: Path | None,
    device: str,
    memory: float,
    as_json: bool,
    **changes: Any,
) -> None:
    """Reproduce published figures and tables of arXiv 2010.04261, and say what agrees.

    Each ITEM (see --list; all for every one) trains its networks or goes on from their checkpoints,
    computes, draws its figures with the published ones beside them, and prints a verdict line for
    every published number. A run that was interrupted goes on where it stopped. Of several items
    one that cannot be done (no data, another kind of network) is left out, and the status is then
    1. With --data, --model, --epochs or --limit the subject is another one, and there are no
    verdicts.
    """
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        # A file or a pipe has no width; rich would take 80.
        console.width = 160
    if listing:
        _list(console, profile)
        return
    with together(context) as (processes, progress):
        chosen = _chosen(items)
        seconds = None if budget is None else parse_budget(budget)
        overrides = Overrides(**changes)
        processes.on_first("a look at the output folder", lambda: check_writable(output))
        there = usable_device(device)
        folder = output / _folder_name(profile, overrides, there)
        machine = versions(device)
        budgeted = int(memory * 2**30)
        lab = Lab(folder, profile, root, overrides, progress, budgeted, there, processes)
        words = " ".join([command_line(context), *items])
        clock = _Budget(seconds, profile)
        done = []
        failed: dict[str, str] = {}
        for item in chosen:
            if not processes.same(clock.fits(item)):
                continue
            lab.begin_item()
            started = time.perf_counter()
            try:
                with processes.all_or_none(item.name):
                    networks = lab.networks(item.networks)
                    outcome = item.run(lab, networks)
                if not processes.first:
                    continue
                took = time.perf_counter() - started
                clock.spent(item, took)
                facts = {
                    "profile": folder.name,
                    "changed": overrides.words,
                    "networks": describe(lab, networks),
                    "command": words,
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "versions": machine,
                    "seconds": took,
                }
                path = write_item(folder, item, outcome, facts)[0]
            except RankError:
                raise
            except Exception as error:
                if len(chosen) == 1:
                    raise
                # What one item cannot do is no reason to go without the others.
                failed[item.name] = str(error)
                if not isinstance(error, (ValueError, NotImplementedError, OSError, NotDrawnError)):
                    # Nobody's input: whoever looks for the reason needs more than its name.
                    traceback.print_exc()
                    failed[item.name] = f"{type(error).__name__}: {error}"
                continue
            result = json.loads(path.read_text())
            done.append(result)
            _show(console, result)
            page = write_page(folder, list(ITEMS))
    left_out = clock.left_out | failed
    for name, why in left_out.items():
        console.print(f"Left out: {name} ({why})", style="yellow", markup=False, soft_wrap=True)
    if done:
        console.print(f"\n[bold]Page:[/bold] {page}", soft_wrap=True)
        console.print(f"Numbers: {folder}/ITEM/{RESULT}", soft_wrap=True, markup=False)
    if as_json:
        missing = [{"item": name, "left_out": why} for name, why in left_out.items()]
        click.echo(json.dumps([*done, *missing], allow_nan=False))
    if failed:
        context.exit(1)


def _chosen(names: tuple[str, ...]) -> list[Item]:
    """The items of these names, in the catalogue's order.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    if not names:
        raise ValueError("name at least one item, or all; --list shows them")
    for name in names:
        if name != "all" and name not in ITEMS:
            raise ValueError(f"there is no item {name!r}; there are {', '.join(ITEMS)}")
    return [item for item in ITEMS.values() if "all" in names or item.name in names]


def parse_budget(text: str) -> float:
    """Seconds of ``2h``, ``1h30m``, ``45m`` or ``90s``.

    Raises:
        ValueError: it is no such duration, or zero.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = [float(part) if part else 0.0 for part in match.groups()] if match else []
    seconds = sum(p * unit for p, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds > 0:
        raise ValueError(f"budget must be a time such as 2h, 1h30m or 45m; got {text!r}")
    return seconds


@dataclass
class _Budget:
    """What is left of the time, with expectations scaled by how long items really took."""

    seconds: float | None
    profile: str

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        self._expected = self._measured = 0.0
        self.left_out: dict[str, str] = {}

    def fits(self, item: Item) -> bool:
        """Whether the item's expected time is left; says so where it is not."""
        if self.seconds is None:
            return True
        # Cached items take no time; they must not make new ones look cheap.
        pace = max(1.0, self._measured / self._expected) if self._expected else 1.0
        expected = item.expected_seconds(self.profile) * pace
        left = self.seconds - (time.perf_counter() - self._started)
        if expected <= left:
            return True
        self.left_out[item.name] = (
            f"expected {expected / 60:.0f} min, {max(left, 0) / 60:.0f} min left"
        )
        return False

    def spent(self, item: Item, seconds: float) -> None:
        """Notes how long an item took."""
        self._expected += item.expected_seconds(self.profile)
        self._measured += seconds


def _folder_name(profile: str, overrides: Overrides, device: torch.device) -> str:
    """The profile, and what was changed about it: such results are never mixed."""
    changes = replace(overrides, seeds=None, top=None)
    parts = [
        f"{key}-{str(value).replace(':', '-').replace('^', 'x')}"
        for key in ("data", "model", "limit", "epochs")
        if (value := getattr(changes, key)) is not None
    ]
    return "-".join([profile, *parts, *([] if device.type == "cpu" else [device.type])])


def _list(console: Console, profile: str) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("item", "minutes", "what"):
        table.add_column(heading, justify="right" if heading == "minutes" else "left")
    for item in ITEMS.values():
        table.add_row(item.name, f"{item.expected_seconds(profile) / 60:g}", item.title)
    console.print(table)
    console.print(
        f"Minutes on two cores with nothing trained yet, profile {profile}; items share networks.",
        style="dim",
        markup=False,
    )


def _show(console: Console, result: dict[str, Any]) -> None:
    console.print(f"\n{result['title']}", style="bold", markup=False)
    for network in result["networks"]:
        accuracy = network["train_accuracy"]
        fit = f", {100 * accuracy:.1f} % right on them" if accuracy is not None else ""
        console.print(
            f"  {network['name']}: {network['samples']:,} training samples, {network['recipe']}, "
            f"{counted(network['seeds'], 'seed')}{fit}",
            style="dim",
            markup=False,
        )
    colours = {True: "green", False: "red", None: ""}
    for verdict in result["verdicts"]:
        console.print(
            f"• {verdict_words(verdict)}",
            style=colours[verdict["agrees"]],
            markup=False,
            soft_wrap=True,
        )
    if not result["verdicts"]:
        for table in result["tables"]:
            _show_table(console, table)
    for note in result["notes"]:
        console.print(note, style="dim", markup=False, soft_wrap=True)


def _show_table(console: Console, table: dict[str, Any]) -> None:
    shown = Table(title=table["title"], title_justify="left", title_style="", box=None)
    for number, heading in enumerate(table["headings"]):
        shown.add_column(escape(heading), justify="left" if number == 0 else "right")
    for row in table["rows"]:
        shown.add_row(*map(escape, row))
    console.print(shown)
    if table["note"]:
        console.print(table["note"], style="dim", markup=False, soft_wrap=True)
