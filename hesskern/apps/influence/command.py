"""``hesskern influence``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import nn

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
from hesskern.apps.influence.report import summary, write_report
from hesskern.apps.influence.study import Settings, study
from hesskern.apps.resume import Resume, resume_option
from hesskern.files import check_writable, write_files
from hesskern.tensor_files import savable
from hesskern.text import number
from hesskern.zoo.data import DATASETS
from hesskern.zoo.models import DEFAULT_MODELS, KNOWN_MODELS
from hesskern.zoo.training import RECIPES

__all__ = ["influence_command"]


@click.command("influence")
@shown_option("--data", type=click.Choice(list(DATASETS)), default="digits", help="Data set.")
@root_option
@count_option("--limit", help="Use only the first so many training samples.")
@click.option("--model", help=f"Network: {KNOWN_MODELS}.  [default: as for analyze]")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="State dict (.pt or .safetensors) to load instead of training.",
)
@shown_option("--seed", type=int, default=0, help="Seed of the model.")
@shown_option(
    "--recipe", type=click.Choice(["quick", *RECIPES]), default="quick", help="Training settings."
)
@click.option("--epochs", type=int, help="Epochs of training instead of the recipe's; 0 for none.")
@click.option(
    "--layers",
    help="Layers to go through: names, or patterns such as fc*, separated by commas.  "
    "[default: all]",
)
@click.option(
    "--query",
    multiple=True,
    type=int,
    help="Index of a test sample to explain; repeat for several.  [default: by --queries]",
)
@shown_option(
    "--queries",
    type=click.IntRange(min=1),
    default=8,
    help="Explain so many test samples, those with the largest losses.",
)
@shown_option(
    "--shown", type=click.IntRange(min=1), default=6, help="Samples of either kind on the page."
)
@click.option(
    "--damping",
    type=float,
    help="Added to the curvature's eigenvalues.  [default: a tenth of each layer's mean]",
)
@device_option
@output_option(
    "hesskern-influence",
    "Folder for report.html, influence.json, all scores and the trained weights.",
)
@resume_option
@json_option()
@click.pass_context
def influence_command(
    context: click.Context,
    /,
    model: str | None,
    layers: str | None,
    output: Path,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the training samples behind a network's answers.

    Trains a small network (or loads a checkpoint), estimates for test samples that it gets wrong
    how much each training sample helps or harms them (influence functions with a Kronecker
    curvature), and writes one HTML page that shows the most helpful and most harmful ones.
    """
    if options["query"]:
        options["queries"] = len(options["query"])
    settings = Settings(
        model=model or DEFAULT_MODELS[options["data"]],
        layers=tuple(part.strip() for part in layers.split(",")) if layers else None,
        **options,
    )
    with together(context) as (processes, progress):
        processes.on_first("a look at the output folder", lambda: check_writable(output))
        trained: list[nn.Module] = []
        states = Resume.of(output, resume)
        try:
            found = study(
                settings,
                progress,
                command_line(context),
                trained.append,
                processes,
                states,
            )
        except Exception:
            if trained and processes.first:
                paths = write_files(output, _weights(settings, trained[0]))
                click.echo(
                    f"The trained weights are in {paths[0]}; --checkpoint takes them.", err=True
                )
            raise
        if not processes.first:
            return
        weights = _weights(settings, found.model) if found.trained else {}
        paths = write_report(found, output, weights)
        states.finished()
    console = Console(stderr=as_json, highlight=False)
    _show(console, found.result)
    console.print(f"\n[bold]Report:[/bold] {paths[0]}", soft_wrap=True)
    for path in paths[1:]:
        console.print(f"        {path}", soft_wrap=True)
    if as_json:
        click.echo(json.dumps(found.result, allow_nan=False))


def _weights(settings: Settings, model: nn.Module) -> dict[str, bytes]:
    return {f"seed{settings.seed}.safetensors": save(savable(model.state_dict()))}


def _show(console: Console, result: dict[str, Any]) -> None:
    network = result["network"]
    console.print(
        f"\nInfluence on {network['name']}, {result['data']['name']}", style="bold", markup=False
    )
    for sentence in summary(result):
        console.print(f"• {sentence}", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("query", "class", "taken for", "loss", "most helpful", "most harmful"):
        table.add_column(heading, no_wrap=True)
    for q in result["queries"]:
        table.add_row(
            str(q["index"]),
            str(q["class"]),
            str(q["predicted"]),
            number(q["loss"]),
            *(
                " ".join(f"{e['index']} ({e['class']})" for e in q[kind][:2]) or "none"
                for kind in ("helpful", "harmful")
            ),
        )
    console.print()
    console.print(table)
    console.print("Training samples with their class in brackets.", style="dim")
    for text in result["warnings"]:
        console.print(text, style="yellow", markup=False)
