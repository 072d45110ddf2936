"""The page about one or several certificates, made from their numbers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hesskern.apps import plotting
from hesskern.apps.analyze.figures import Figure
from hesskern.apps.pages import template
from hesskern.files import drawn_or_kept
from hesskern.pacbayes import Certificate
from hesskern.text import number, percent, seconds

__all__ = ["file_name", "render", "summarize", "write"]

Result = Mapping[str, Any]
_CURVE_POINTS = 200


def summarize(
    certificates: Sequence[Certificate], net: str, data: str, command: str
) -> dict[str, Any]:
    """Everything the page shows, ready for JSON.

    Args:
        certificates: of the same network and data, one per seed.
        net: its name, e.g. ``T-600_10``.
        data: where the samples come from.
        command: as it was typed.
    """
    bounds = [c.bound for c in certificates]
    return {
        "net": net,
        "data": data,
        "command": command,
        "bound": fmean(bounds),
        "spread": stdev(bounds) if len(bounds) > 1 else None,
        "certificates": [{**c.header(), "layers": _layers(c)} for c in certificates],
    }


def _layers(certificate: Certificate) -> dict[str, Any]:
    variances = certificate.prior_variances
    found = {}
    for name, layer in certificate.layers.items():
        ratio = (layer.variance.double() / variances[name]).cpu()
        of_mean, of_variance = layer.kl_parts(variances[name])
        found[name] = {
            "shape": list(layer.mean.shape),
            "kl": of_mean + of_variance,
            "kl_mean": of_mean,
            "kl_variance": of_variance,
            "j": layer.index,
            "prior_deviation": math.sqrt(variances[name]),
            "kronecker": layer.V is not None,
            "by_input": _curve(ratio.mean(0).tolist()),
            "by_output": _curve(ratio.mean(1).tolist()),
        }
    return found


def _curve(values: list[float]) -> dict[str, list[float]]:
    """At most a few hundred points, denser at small indices, as on a logarithmic axis."""
    count = len(values)
    index = sorted(
        {round(count ** (i / (_CURVE_POINTS - 1))) for i in range(_CURVE_POINTS)} | {1, count}
    )
    return {"index": [float(i) for i in index], "ratio": [values[i - 1] for i in index]}


def render(result: Result) -> str:
    """The page's HTML."""
    first = result["certificates"][0]
    return template("certificate.html.j2").render(
        result=result,
        first=first,
        number=number,
        percent=percent,
        seconds=seconds,
        confidence=1 - first["protocol"]["delta"] - first["protocol"]["delta_draws"],
        colours={name: plotting.colour(i) for i, name in enumerate(first["layers"])},
        figures=_figures(first),
        interrupted=any(c["interrupted"] for c in result["certificates"]),
    )


def _figures(first: Mapping[str, Any]) -> dict[str, list[Figure]]:
    layers = first["layers"]
    basis = all(layer["kronecker"] for layer in layers.values())
    return {
        "variance": [
            Figure(
                f"variance-{side}",
                f"Variances of the posterior over those of the prior, by {side} index",
                plotting.variance_panel(
                    {name: layer[f"by_{side}"] for name, layer in layers.items()}, side, basis
                ),
            )
            for side in ("input", "output")
        ],
        "history": [
            Figure(
                "history",
                "Course of the bound",
                plotting.history_panel(first["history"], first["bound"]),
            )
        ]
        if len(first["history"]) > 1
        else [],
    }


def file_name(certificate: Certificate) -> str:
    """Of a certificate made by the command."""
    return f"seed{certificate.settings['seed']}.safetensors"


def write(result: Result, certificates: Sequence[Certificate], folder: Path) -> list[Path]:
    """Writes ``certificate.html``, ``certificate.json`` and a file per certificate.

    Returns:
        the paths, the page first.

    Raises:
        NotDrawnError: the page could not be made; the others are written all the same.
        OSError: ``folder`` cannot be written; says where the files are instead.
    """
    numbers = {
        "certificate.json": (json.dumps(result, indent=1, allow_nan=False) + "\n").encode(),
        **{file_name(certificate): certificate.content() for certificate in certificates},
    }
    return drawn_or_kept(folder, numbers, lambda: {"certificate.html": render(result).encode()})
