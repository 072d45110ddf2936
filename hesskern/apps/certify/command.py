"""``hesskern certify``."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from hesskern.apps.certify import report as certify_report
from hesskern.apps.certify.published_nets import NETS, Net, parse_net
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
from hesskern.apps.processes import Processes
from hesskern.devices import usable_device
from hesskern.files import check_writable, write_files
from hesskern.pacbayes import (
    METHODS,
    TRAINED_PRIOR,
    Certificate,
    CertifySettings,
    PublishedSettings,
    TruncatedSettings,
    certify_with,
    load_certificate,
)
from hesskern.pacbayes.procedure import train_start
from hesskern.pacbayes.protocol import RENAMED
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.settings import MethodSettings
from hesskern.progress import Progress
from hesskern.zoo import data

__all__ = ["certify_command"]

_DATA = ("digits", "mnist")
_NET = {"digits": "T-64_10", "mnist": "T-600_10"}
_EPOCHS = {"digits": 200}
_MINUTES = {"mnist": 15.0}
_SMALL_BATCH = 100
# Seconds between two writings of an unfinished run.
_EVERY = 30.0


@click.command("certify")
@click.option(
    "--net",
    help=f"Published name: {', '.join(NETS)}, or another width^depth; x may stand for ^. Without "
    "_10: digits 0-4 against 5-9. R-: random labels.  [default: T-600_10, for digits T-64_10]",
)
@shown_option("--data", "data_name", type=click.Choice(_DATA), default="digits", help="Data set.")
@root_option
@device_option
@shown_option(
    "--method",
    type=click.Choice(["truncated", *RENAMED, *METHODS]),
    default="truncated",
    help="truncated (its old name: natural): ours; the others as published.",
)
@click.option(
    "--minutes",
    type=float,
    help="Time of the optimization.  [default: 15 for mnist]",
)
@click.option(
    "--epochs",
    type=int,
    help="Epochs of the optimization instead of a time.  [default: 200 for digits; the published "
    "methods' own schedule has 2000]",
)
@shown_option("--seed", type=int, default=0, help="Seed of the first run.")
@shown_option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    help="Number of runs, seeds counted up; their mean is what counts.",
)
@shown_option(
    "--passes",
    type=click.IntRange(min=1),
    default=100,
    help="T, passes over the training samples for the error at the end.",
)
@click.option(
    "--whole-networks",
    is_flag=True,
    help="One network per pass, as published (with T = 50000), instead of one per example.",
)
@shown_option(
    "--sgd-epochs",
    type=click.IntRange(min=0),
    default=20,
    help="Epochs of SGD that find the published methods' start.",
)
@click.option(
    "--held-out",
    type=float,
    help="Another method: train the prior on this part of the samples by SGD, certify with the "
    "rest alone. Not comparable with certificates whose prior has seen no data.",
)
@count_option("--batch-size", help="Examples per step.")
@click.option("--learning-rate", type=float, help="Rate at the start (truncated: of the means).")
@click.option(
    "--verify",
    "verified",
    type=click.Path(path_type=Path),
    help="Check this certificate against the data instead of making one: everything is computed "
    "anew, and its error is drawn again.",
)
@output_option(
    "hesskern-certificate",
    "Folder for certificate.html, certificate.json and the certificates themselves; an "
    "unfinished run is kept there too, and continued by the same command.",
)
@json_option()
@click.pass_context
def certify_command(
    context: click.Context,
    /,
    net: str | None,
    data_name: str,
    root: Path | None,
    device: str,
    seed: int,
    seeds: int,
    verified: Path | None,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Bound a network's error with a proof: a PAC-Bayes certificate.

    Trains a stochastic network from a random initialization and certifies, without test data, how
    often it errs. Pixels are scaled to [0, 1]. Ctrl-C ends the optimization early and certifies
    what it has reached; after a kill the same command goes on where the last checkpoint was. Under
    torchrun, where all processes optimize alike (--epochs) and share the draws, it ends as a kill
    does.
    """
    if verified is not None:
        with together(context) as (processes, progress):
            there = usable_device(device)
            with processes.section("reading the data"):
                train = data.load(data_name, root)
            passes = options["passes"]
            certificate = _verify(verified, train, passes, there, progress, processes)
        click.echo(f"holds: {certificate!r}")
        return
    with together(context) as (processes, progress):
        processes.on_first("a look at the output folder", lambda: check_writable(output))
        chosen, there = parse_net(net or _NET[data_name]), usable_device(device)
        with processes.section("reading the data"):
            train = data.load(data_name, root)
            test = None if chosen.random_labels else data.load(data_name, root, train=False)
        certificates: list[Certificate] = []
        for s in range(seed, seed + seeds):
            try:
                found = _run(chosen, train, test, s, there, output, progress, processes, options)
            except (ValueError, TypeError, NotImplementedError) as error:
                if not certificates:
                    raise
                raise ValueError(
                    f"seed {s}: {error}; the certificates of the seeds before it are in {output}"
                ) from error
            # Each as soon as it is there: what comes later may fail.
            kept = partial(write_files, output, {certify_report.file_name(found): found.content()})
            processes.on_first("writing a certificate", kept)
            certificates.append(found)
        result = certify_report.summarize(
            certificates, chosen.name, train.source, command_line(context)
        )
        paths = processes.on_first(
            "writing the report", lambda: certify_report.write(result, certificates, output)
        )
        for certificate in certificates:
            path = _checkpoint(output, certificate.settings["seed"])
            processes.own(path).unlink(missing_ok=True)
        if paths is None:
            return
    console = Console(stderr=as_json, highlight=False)
    _show(console, chosen, certificates, result)
    console.print(f"\n[bold]Report:[/bold] {paths[0]}", soft_wrap=True)
    for path in paths[1:]:
        console.print(f"        {path}", soft_wrap=True)
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))


def _verify(
    path: Path,
    train: data.Dataset,
    passes: int,
    device: torch.device,
    progress: Progress,
    processes: Processes,
) -> Certificate:
    with processes.section(f"reading {path}"):
        certificate = load_certificate(path)
    name = certificate.prior.get("net")
    if name is None:
        raise ValueError(f"{path} was not made by this command; use Certificate.verify(data)")
    samples = _samples(parse_net(name), train, certificate.settings["seed"])
    if (share := certificate.prior.get("held out")) is not None:
        samples = samples.split(share, certificate.prior["seed"])[1]
    certificate.verify(samples.to(device), passes=passes, progress=progress, group=processes.group)
    return certificate


def _checkpoint(output: Path, seed: int) -> Path:
    return output / f"seed{seed}.unfinished.pt"


def _run(
    net: Net,
    train: data.Dataset,
    test: data.Dataset | None,
    seed: int,
    device: torch.device,
    output: Path,
    progress: Progress,
    processes: Processes,
    options: dict[str, Any],
) -> Certificate:
    samples = _samples(net, train, seed).to(device)
    model = net.build(train.input_shape, seed).to(device)
    prior = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = net.prior_record(train.input_shape, seed)
    seen: Samples | None = None
    if options["held_out"] is not None:
        seen, samples = samples.split(options["held_out"], seed)
    epochs, minutes = options["epochs"], options["minutes"]
    if epochs is None and minutes is None:
        epochs, minutes = _EPOCHS.get(train.name), _MINUTES.get(train.name)
    if seen is not None:
        record |= {
            "construction": "SGD on held-out samples",
            "held out": options["held_out"],
            "epochs": options["sgd_epochs"],
        }
    # They say what is wrong with them before the training that may come first.
    settings = CertifySettings(
        options["method"],
        epochs,
        minutes,
        settings=_of_method(options, len(samples)),
        seed=seed,
        prior_record=record,
    )
    settings = replace(
        settings,
        protocol=replace(
            settings.terms,
            sampling="networks" if options["whole_networks"] else "per-example",
            passes=options["passes"],
        ),
    )
    if seen is not None:
        start = partial(train_start, model, seen, options["sgd_epochs"], seed, progress)
        processes.weights(model, "training the prior", start)
        prior = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not settings.ours:
        start = partial(train_start, model, samples, options["sgd_epochs"], seed, progress)
        processes.weights(model, "training the start", start)
    return certify_with(
        settings,
        model,
        prior,
        samples,
        prior_data=seen,
        checkpoint=_checkpoint(output, seed),
        checkpoint_every=_EVERY,
        exact_resume=False,
        test=None if test is None else _samples(net, test, seed).to(device),
        progress=progress,
        group=processes.group,
    )


def _of_method(options: dict[str, Any], n: int) -> MethodSettings:
    """The method's settings, as the options change them, for n samples."""
    size, rate = options["batch_size"], options["learning_rate"]
    settings: MethodSettings
    if options["method"] not in METHODS:
        settings = TruncatedSettings() if options["held_out"] is None else TRAINED_PRIOR
        if n < 100 * settings.batch_size:
            settings = replace(settings, batch_size=_SMALL_BATCH)
        if rate is not None:
            settings = replace(settings, rate_mean=rate)
    else:
        settings = PublishedSettings()
        if rate is not None:
            settings = replace(settings, rate=rate)
    return settings if size is None else replace(settings, batch_size=size)


def _samples(net: Net, dataset: data.Dataset, seed: int) -> Samples:
    """Pixels in [0, 1], a scale that depends on no sample: the data set's own is undone."""
    mean, deviation = data.MOMENTS[dataset.name]
    pixels = dataset.inputs * torch.tensor(deviation) + torch.tensor(mean)
    return Samples(pixels.clamp(0, 1), net.targets(dataset.targets, seed))


def _show(
    console: Console, net: Net, certificates: list[Certificate], result: dict[str, Any]
) -> None:
    first = certificates[0]
    console.print(f"\n{net.name}: error at most {result['bound']:.4f}", style="bold", markup=False)
    if len(certificates) > 1:
        console.print(
            f"mean of {len(certificates)} seeds, standard deviation {result['spread']:.4f}; each "
            f"by itself holds with confidence {first.confidence:.3f}",
            markup=False,
        )
    else:
        console.print(f"with confidence {first.confidence:.3f}, on new samples", markup=False)
    for c in certificates:
        test = "" if c.test is None else f", test error {c.test['error']:.4f}"
        early = ", interrupted" if c.interrupted else ""
        console.print(
            f"• seed {c.settings['seed']}: bound {c.bound:.4f}, training error {c.snn_error:.4f} "
            f"(q {c.q:.4f}), KL {c.kl:,.0f}{test}, n = {c.n:,}{early}",
            markup=False,
        )
