"""The page about influence scores, made from a study's numbers and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hesskern.apps import plotting
from hesskern.apps.influence.study import Study
from hesskern.apps.pages import picture_uri, svg_uri, template
from hesskern.files import drawn_or_kept
from hesskern.text import counted, number, percent, seconds

__all__ = ["render", "summary", "write_report"]


def summary(result: Mapping[str, Any]) -> list[str]:
    """Sentences that say what was found."""
    queries, n = result["queries"], result["data"]["samples"]
    wrong = sum(q["class"] != q["predicted"] for q in queries)
    chosen = (
        "named on the command line"
        if result["settings"]["query"]
        else "those with the largest losses"
    )
    found = [
        f"{counted(len(queries), 'test sample')}, {chosen}; the network takes {wrong} of them for "
        "another class."
    ]
    for kind, effect in (("helpful", "lower"), ("harmful", "raise")):
        total = sum(len(q[kind]) for q in queries)
        own = sum(q["own_class"][kind] for q in queries)
        if total:
            found.append(
                f"Of the {total} training samples shown that {effect} a query's loss most, {own} "
                "are of the query's own class."
            )
    curve = result["concentration"]
    # None where every score is zero.
    half = next(
        (k for k, s in zip(curve["samples"], curve["share"], strict=True) if s >= 0.5), None
    )
    if half is not None:
        found.append(
            f"Half of the sum of absolute scores comes from about {counted(half, 'sample')} "
            f"({percent(half / n)}), on average over the queries."
        )
    if curve["without"]:
        found.append(
            f"All scores of {counted(curve['without'], 'test sample')} are zero: the loss has no "
            "gradient left there."
        )
    return found


def render(result: Mapping[str, Any], images: Mapping[tuple[str, int], Tensor]) -> str:
    """The page's HTML.

    Args:
        result: of a :class:`Study`.
        images: of it.
    """
    uris = {
        f"{split}/{index}": picture_uri(pixels.numpy()) for (split, index), pixels in images.items()
    }
    figures = [
        {
            "uri": svg_uri(plotting.score_panel(result["histogram"]).svg.encode()),
            "alt": "Histogram of the scores, relative to their query's root mean square",
        },
        {
            "uri": svg_uri(plotting.concentration_panel(result["concentration"]).svg.encode()),
            "alt": "Share of the sum of absolute scores in the largest ones",
        },
    ]
    return template("influence.html.j2").render(
        result=result,
        summary=summary(result),
        images=uris,
        figures=figures,
        colours={name: plotting.colour(i) for i, name in enumerate(result["layers"])},
        number=number,
        percent=percent,
        seconds=seconds,
    )


def write_report(study: Study, folder: Path, others: Mapping[str, bytes]) -> list[Path]:
    """Writes ``report.html``, ``influence.json`` and ``scores.safetensors``, and other files.

    Returns:
        the paths, the page first.

    Raises:
        NotDrawnError: the page could not be made; the numbers are written all the same.
        OSError: ``folder`` cannot be written; says where the files are instead.
    """
    numbers = {
        "influence.json": (json.dumps(study.result, indent=1, allow_nan=False) + "\n").encode(),
        "scores.safetensors": study.scores.packed(),
        **others,
    }
    return drawn_or_kept(
        folder, numbers, lambda: {"report.html": render(study.result, study.images).encode()}
    )
