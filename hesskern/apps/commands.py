"""The subcommands of ``hesskern``: they read options, call the library, show what comes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from hesskern.apps.analyze.analysis import Network, Settings, analyze
from hesskern.apps.analyze.digest import Digest
from hesskern.apps.analyze.report import write_report
from hesskern.apps.analyze.result import AnalysisResult
from hesskern.apps.analyze.tables import layer_table
from hesskern.apps.analyze.wording import notes, subject, summary
from hesskern.apps.bench.command import bench
from hesskern.apps.certify.command import certify_command
from hesskern.apps.command_line import (
    command_line,
    device_option,
    json_option,
    output_option,
    root_option,
    shown_option,
    together,
)
from hesskern.apps.influence.command import influence_command
from hesskern.apps.planning import plan_command
from hesskern.apps.reproduce.command import reproduce
from hesskern.apps.reproduce.published import figures_for
from hesskern.apps.resume import Resume, resume_option
from hesskern.files import check_writable, write_files
from hesskern.ops.extension import build_info
from hesskern.tensor_files import savable
from hesskern.text import counted, listed
from hesskern.version import __version__
from hesskern.zoo.data import DATASETS
from hesskern.zoo.models import DEFAULT_MODELS, KNOWN_MODELS
from hesskern.zoo.training import RECIPES

__all__ = ["hesskern"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hesskern")
def hesskern() -> None:
    """Curvature of neural-network layers: exact Hessians and their Kronecker form."""


@hesskern.command("analyze")
@shown_option("--data", type=click.Choice(list(DATASETS)), default="digits", help="Data set.")
@root_option
@click.option(
    "--model",
    help=f"Network: {KNOWN_MODELS}.  [default: f64x2 for digits, f200x2 for mnist, lenet5 for "
    "cifar10]",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(path_type=Path),
    help="State dict (.pt or .safetensors) to load instead of training; repeat to compare models.",
)
@click.option(
    "--layers",
    help="Names of layers, or patterns such as *.mlp.*, separated by commas.  [default: all]",
)
@shown_option("--top", type=int, default=50, help="Exact eigenpairs of every layer.")
@device_option
@shown_option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    help="Arithmetic of model and Hessians.",
)
@shown_option("--seed", type=int, default=0, help="Seed of the first model.")
@shown_option("--seeds", type=int, default=2, help="Number of models, seeds counted up.")
@shown_option(
    "--recipe",
    type=click.Choice(["quick", *RECIPES]),
    default="quick",
    help="Training: quick, or the published settings (1000 epochs) without or with momentum.",
)
@click.option("--epochs", type=int, help="Epochs of training instead of the recipe's; 0 for none.")
@click.option("--limit", type=int, help="Use only the first so many training samples.")
@shown_option(
    "--tolerance",
    type=float,
    default=0.0,
    help="Leave out samples while the error of H is certain to stay below this part of its trace.",
)
@output_option(
    "hesskern-report",
    "Folder for report.html, a page per layer, figures, result.json and the trained weights.",
)
@resume_option
@json_option()
@click.pass_context
def analyze_command(
    context: click.Context,
    /,
    model: str | None,
    layers: str | None,
    output: Path,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Look at a network's curvature and write a report about it.

    Trains a small network twice (or loads checkpoints), computes the exact layer-wise Hessians,
    their Kronecker form and the leading eigenpairs of both, compares them with each other and
    between the models, and writes one HTML page with every figure.
    """
    settings = Settings(
        model=model or DEFAULT_MODELS[options["data"]],
        layers=tuple(part.strip() for part in layers.split(",")) if layers else None,
        **options,
    )
    with together(context) as (processes, progress):
        processes.on_first("a look at the output folder", lambda: check_writable(output))
        trained: list[Network] = []
        states = Resume.of(output, resume)
        try:
            analysis = analyze(
                settings,
                progress,
                command_line(context),
                trained.append,
                figures_for(settings.data, settings.model),
                processes,
                states,
            )
        except Exception:
            if processes.first:
                _keep_weights(trained, output)
            raise
        if not processes.first:
            return
        paths = write_report(analysis.result, output, _weights(analysis.networks))
        states.finished()
    console = Console(stderr=as_json, highlight=False)
    _show(console, analysis.result)
    console.print(f"\n[bold]Report:[/bold] {paths[0]}", soft_wrap=True)
    for path in paths[1:]:
        if path.parent == paths[0].parent:
            console.print(f"        {path}", soft_wrap=True)
    for folder, what in (("layers", "a page for every layer"), ("figures", "as SVG and PNG")):
        console.print(f"        {output / folder}: {what}", soft_wrap=True, markup=False)
    if as_json:
        click.echo(json.dumps(analysis.result, allow_nan=False))


def _weights(networks: Sequence[Network]) -> dict[str, bytes]:
    """The trained models' state dicts as files, to be looked at again with ``--checkpoint``."""
    return {
        f"seed{network.seed}.safetensors": save(savable(network.model.state_dict()))
        for network in networks
        if network.history is not None
    }


def _keep_weights(trained: Sequence[Network], output: Path) -> None:
    """Writes what was trained before an error, and says so."""
    weights = _weights([n for n in trained if n.history is not None and n.history.loss])
    if not weights:
        return
    try:
        paths = ", ".join(map(str, write_files(output, weights)))
        click.echo(f"The trained weights are in {paths}; --checkpoint takes them.", err=True)
    except OSError as error:
        # The error before it is the one to be told last.
        click.echo(f"The trained weights: {error}", err=True)


def _show(console: Console, result: AnalysisResult) -> None:
    """The summary's sentences and the table of layers, on the terminal."""
    digest = Digest(result)
    models = listed([model["label"] for model in result["models"]])
    samples = counted(result["data"]["samples"], "training sample")
    console.print(f"\nCurvature of {subject(result)}", style="bold", markup=False)
    console.print(f"{samples}; {models}\n", markup=False)
    for sentence in summary(digest):
        console.print(f"• {sentence}", markup=False)
    headings, rows = layer_table(digest)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(
        "k: overlap of the top-k spaces of H and its Kronecker form K; captured: curvature of H "
        f"along K's top {digest.mark}, of what is possible; errors are relative.",
        style="dim",
        markup=False,
    )
    for note in notes(result):
        console.print(note, style="yellow", markup=False)


@hesskern.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def info(as_json: bool) -> None:
    """Show versions and how the compiled kernels were built."""
    import torch

    facts = {
        "hesskern": __version__,
        "torch installed": torch.__version__,
        "threads": torch.get_num_threads(),
        "CUDA available": torch.cuda.is_available(),
        **{f"built: {key}": value for key, value in build_info().items()},
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(box=None, show_header=False, padding=(0, 1))
    for key, value in facts.items():
        table.add_row(key, "none" if value in ("", [], None) else str(value))
    Console(highlight=False).print(table)


hesskern.add_command(bench)
hesskern.add_command(certify_command)
hesskern.add_command(influence_command)
hesskern.add_command(plan_command)
hesskern.add_command(reproduce)
