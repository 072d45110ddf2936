"""The report a person reads: one HTML file with its figures inside, made from the result alone."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hesskern import plotting, tables, wording
from hesskern.digest import Digest

__all__ = ["overview", "picture", "render", "write_files", "write_report"]

Result = Mapping[str, Any]


def render(result: Result) -> str:
    """The report's HTML.

    Args:
        result: what :func:`hesskern.analysis.analyze` computed, or the same read back from JSON.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hesskern", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    layers = result["network"]["layers"]
    return environment.get_template("report.html.j2").render(
        result=result,
        digest=Digest(result),
        tables=tables,
        wording=wording,
        subject=wording.subject(result),
        colours={name: plotting.colour(i) for i, name in enumerate(layers)},
        figures=_figures(result),
        labels=[model["label"] for model in result["models"]],
        trained=all(model["training"] for model in result["models"]),
    )


def overview(result: Result) -> bytes:
    """A PNG of the result's three main figures side by side."""
    layers = result["network"]["layers"]
    chosen = next((n for n in layers if n in _published(result, "eigenvalues")), layers[0])
    return plotting.overview(
        wording.subject(result),
        layers,
        (chosen, result["models"][0]["layers"][chosen]),
        _curves(result, "overlap"),
        Digest(result).mark,
        _pairs(result),
        result["published"],
    )


def write_report(
    result: Result, folder: Path, others: Mapping[str, bytes] | None = None
) -> list[Path]:
    """Writes ``report.html``, ``result.json`` and ``overview.png`` into ``folder``.

    Args:
        result: what :func:`hesskern.analysis.analyze` computed.
        folder: is made if it is not there.
        others: further files, contents by name.

    Returns:
        the paths, the report first.
    """
    files = {
        "report.html": render(result).encode(),
        "result.json": (json.dumps(result, indent=1, allow_nan=False) + "\n").encode(),
        "overview.png": overview(result),
    }
    return write_files(folder, {**files, **(others or {})})


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes all files or none: each under a temporary name first, then all take their places."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hesskern-", dir=folder) as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        for name in files:
            os.replace(Path(staging) / name, folder / name)
    return [folder / name for name in files]


def _figures(result: Result) -> dict[str, list[dict[str, str]]]:
    layers = result["network"]["layers"]
    first = result["models"][0]["layers"]
    mark = Digest(result).mark
    overlaps, pairs = _curves(result, "overlap"), _pairs(result)
    published = result["published"]
    return {
        "overlap": [
            picture(
                plotting.overlap_panel(
                    layers, overlaps, mark, published["overlap"] if published else None
                ),
                "Overlap of the top-k spaces of the exact Hessian and its Kronecker form, by layer",
            ),
            picture(
                plotting.rank_one_panel(layers, _curves(result, "rank_one"), mark),
                "Largest singular value over Frobenius norm of the leading eigenvectors, by layer",
            ),
        ],
        "eigenvalues": [
            picture(
                plotting.eigenvalue_panel(
                    name, i, first[name], _published(result, "eigenvalues").get(name)
                ),
                f"Leading eigenvalues of the exact Hessian and its Kronecker form, {name}",
            )
            for i, name in enumerate(layers)
        ],
        "between": [
            picture(
                plotting.between_panel(name, i, first[name]["parameters"], pairs[name]),
                f"Overlap of leading spaces between models, {name}",
            )
            for i, name in enumerate(layers)
            if pairs
        ],
        "correspondence": [
            picture(
                plotting.correspondence_panel(name, i, side, first[name]["correspondence"][side]),
                f"Components of the leading eigenvectors of {name} along the {side} factor",
            )
            for side in ("input", "output")
            for i, name in enumerate(layers)
            if "correspondence" in first[name]
        ],
    }


def picture(svg: str, alt: str) -> dict[str, str]:
    """An SVG as an image of its own, so that ids of different figures cannot meet."""
    encoded = base64.b64encode(svg.encode()).decode()
    return {"uri": f"data:image/svg+xml;base64,{encoded}", "alt": alt}


def _curves(result: Result, key: str) -> dict[str, list[list[float]]]:
    return {
        name: [model["layers"][name][key] for model in result["models"]]
        for name in result["network"]["layers"]
    }


def _pairs(result: Result) -> dict[str, list[dict[str, Any]]]:
    if not result["pairs"]:
        return {}
    return {
        name: [pair["layers"][name] for pair in result["pairs"]]
        for name in result["network"]["layers"]
    }


def _published(result: Result, key: str) -> Mapping[str, Any]:
    return result["published"][key] if result["published"] else {}
