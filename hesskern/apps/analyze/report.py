"""The report a person reads: HTML with its figures inside, made from the result alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hesskern.apps import plotting
from hesskern.apps.analyze import tables, wording
from hesskern.apps.analyze.digest import Digest
from hesskern.apps.analyze.figures import Figures, file_names
from hesskern.apps.analyze.result import AnalysisResult
from hesskern.apps.pages import template
from hesskern.files import drawn_or_kept

__all__ = ["render", "render_layer", "write_report"]


def render(result: AnalysisResult, figures: Figures | None = None) -> str:
    """The report's HTML.

    Args:
        result: of :func:`hesskern.apps.analyze.analysis.analyze`, or the same read from JSON.
        figures: of the result, where they are at hand.
    """
    layers = result["network"]["layers"]
    return template("report.html.j2").render(
        result=result,
        digest=Digest(result),
        tables=tables,
        wording=wording,
        subject=wording.subject(result),
        colours={name: plotting.colour(i) for i, name in enumerate(layers)},
        figures=(figures or Figures(result)).groups,
        pages={name: f"layers/{file}.html" for name, file in file_names(layers).items()},
        labels=[model["label"] for model in result["models"]],
        trained=all(model["training"] for model in result["models"]),
    )


def render_layer(result: AnalysisResult, name: str, figures: Figures | None = None) -> str:
    """The HTML of one layer's page, ``layers/NAME.html`` beside the report.

    Args:
        result: what :func:`hesskern.apps.analyze.analysis.analyze` computed.
        name: of the layer.
        figures: of the result, where they are at hand.
    """
    figures = figures or Figures(result)
    layers = result["network"]["layers"]
    names = file_names(layers)
    at = layers.index(name)
    neighbours = {
        label: None if other is None else {"name": other, "file": f"{names[other]}.html"}
        for label, other in (
            ("previous", layers[at - 1] if at else None),
            ("next", layers[at + 1] if at + 1 < len(layers) else None),
        )
    }
    digest = Digest(result)
    return template("layer.html.j2").render(
        result=result,
        name=name,
        subject=wording.subject(result),
        colour=plotting.colour(at),
        facts=tables.layer_facts(digest, name),
        rows=tables.layer_models(digest, name),
        columns=digest.columns,
        mark=digest.mark,
        figures=figures.layers[name],
        labels=[model["label"] for model in result["models"]],
        neighbours=neighbours,
    )


def write_report(
    result: AnalysisResult, folder: Path, others: Mapping[str, bytes] | None = None
) -> list[Path]:
    """Writes a result's pages, numbers and figures into ``folder``.

    ``report.html``, ``result.json``, ``overview.png``, a page per layer in ``layers/``, and every
    figure as SVG and PNG in ``figures/``.

    Args:
        result: what :func:`hesskern.apps.analyze.analysis.analyze` computed.
        folder: is made if it is not there.
        others: further files, contents by name.

    Returns:
        the paths, the report first.

    Raises:
        NotDrawnError: a page or figure could not be made; result and ``others`` are written all
            the same.
        OSError: ``folder`` cannot be written; says where the files are instead.
    """
    numbers = {"result.json": (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()}

    def draw() -> dict[str, bytes]:
        figures = Figures(result)
        files = {"report.html": render(result, figures).encode()}
        files["overview.png"] = figures.overview()
        for name, file in file_names(result["network"]["layers"]).items():
            files[f"layers/{file}.html"] = render_layer(result, name, figures).encode()
        return files | {f"figures/{name}": content for name, content in figures.files().items()}

    return drawn_or_kept(folder, {**numbers, **(others or {})}, draw)
