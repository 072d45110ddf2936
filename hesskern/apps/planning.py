"""``hesskern plan``."""

from __future__ import annotations

import json
from typing import Any, get_args

import click
import torch
from torch import nn

from hesskern.apps.command_line import count_option, device_option, json_option, shown_option
from hesskern.choices import Bias, Output
from hesskern.devices import usable_device
from hesskern.planning.compute import plan
from hesskern.planning.requests import What
from hesskern.spill.rooms import Spill
from hesskern.zoo.models import build

__all__ = ["plan_command"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


# Not generic in click before 8.2, which cannot be told its type.
class _Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as 500MiB or 4G."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        text = str(value).strip().lower().removesuffix("b").removesuffix("i")
        number, unit = (text[:-1], text[-1]) if text and text[-1] in _UNITS else (text, "")
        try:
            found = float(number) * _UNITS[unit]
            if not 0 <= found < 2**62:
                raise ValueError
        except ValueError:
            self.fail(f"{value!r} is no number of bytes, such as 500M or 4GiB", param, ctx)
        return int(found)


@click.command("plan")
@click.argument("model")
@shown_option(
    "--what",
    type=click.Choice(get_args(What)),
    default="factors",
    help="Kronecker factors, EKFAC, layer Hessians or input covariances.",
)
@shown_option("--input-shape", default="3x32x32", help="Shape of one input, such as 3x32x32.")
@shown_option("--classes", type=click.IntRange(min=1), default=10, help="Number of classes.")
@shown_option("--batch-size", type=click.IntRange(min=1), default=128, help="Samples of a batch.")
@count_option("--samples", help="Samples of all of the data.  [default: one batch]")
@click.option(
    "--output",
    type=click.Choice(get_args(Output)),
    help="Root rows of all classes, of drawn targets, or of the data's.  [default: exact; mc for "
    "ekfac]",
)
@click.option(
    "--layers",
    help="Names of layers, or patterns such as *.mlp.*, separated by commas.  [default: all]",
)
@shown_option(
    "--bias", type=click.Choice(get_args(Bias)), default="none", help="Weights only, or joint."
)
@click.option("--diagonal", is_flag=True, help="With diagonal blocks of norms and biases.")
@click.option(
    "--memory-budget", type=_Bytes(), help="As in the function, such as 4GiB.  [default: its own]"
)
@click.option(
    "--spill",
    type=click.Choice(get_args(Spill)),
    help="Where factors, or samples above the budget, go instead.  [default: nowhere]",
)
@click.option(
    "--available", type=_Bytes(), help="Memory that may be used.  [default: what is free]"
)
@device_option
@click.option("--no-timing", is_flag=True, help="Do not pass two batches for the time.")
@json_option("the plan")
def plan_command(
    model: str,
    what: What,
    input_shape: str,
    classes: int,
    samples: int | None,
    layers: str | None,
    device: str,
    no_timing: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what a pass will take in memory, operations and time, before it is made.

    MODEL is the name of a network, as for analyze, or module:function for one of your own. It is
    planned with inputs of one shape and cross-entropy; hesskern.plan in Python takes any batch and
    any loss.
    """
    try:
        found = plan(
            _built(model, input_shape, classes, device),
            _sample(input_shape, device),
            nn.CrossEntropyLoss(),
            _parts(layers),
            what,
            num_samples=samples,
            timing=not no_timing,
            **options,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else str(found))


def _parts(layers: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in layers.split(",")) if layers else None


def _shape(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"input-shape must be sizes such as 3x32x32, got {text!r}")
    return found


def _built(model: str, input_shape: str, classes: int, device: str) -> nn.Module:
    return build(model, _shape(input_shape), classes).to(usable_device(device))


def _sample(input_shape: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample."""
    return torch.randn(1, *_shape(input_shape)), torch.zeros(1, dtype=torch.long)
