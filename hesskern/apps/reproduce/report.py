"""An item's files, and the page that shows all items of one folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hesskern.apps.analyze.analysis import plain
from hesskern.apps.pages import svg_uri, template
from hesskern.apps.reproduce.drawing import draw_chart, draw_heat_map
from hesskern.apps.reproduce.items import Item
from hesskern.apps.reproduce.lab import Lab, Network
from hesskern.apps.reproduce.results import Outcome
from hesskern.files import drawn_or_kept, write_files
from hesskern.text import counted, listed

__all__ = ["FORMAT", "describe", "verdict_words", "write_item", "write_page"]

FORMAT = "hesskern.reproduce/1"
RESULT, PAGE = "result.json", "report.html"


def describe(lab: Lab, networks: Sequence[Network]) -> list[dict[str, Any]]:
    """What the networks of an item are and how they were trained."""
    rows = []
    for network in networks:
        fits = [lab.fit(network, seed) for seed in lab.seeds_asked(network)]
        trained = [fit for fit in fits if fit]
        recipe = lab.recipe(network)
        words = [
            counted(recipe.epochs, "epoch"),
            f"learning rate {recipe.learning_rate:g}",
            f"batch {recipe.batch_size}",
            f"momentum {recipe.momentum:g}" if recipe.momentum else "no momentum",
            f"weight decay {recipe.weight_decay:g}" if recipe.weight_decay else "no weight decay",
        ]
        used = len(lab.batches(network).inputs)
        rows.append(
            {
                "name": network.name,
                "samples": len(lab.data(network)),
                "curvature_samples": used,
                "recipe": ", ".join(words),
                "seeds": len(trained),
                "train_loss": _mean(trained, "train_loss"),
                "train_accuracy": _mean(trained, "train_accuracy"),
                "seconds": sum(t["seconds"] for t in trained),
            }
        )
    return rows


def _mean(fits: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """None where there is nothing, or a value is infinite."""
    values = [fit[key] for fit in fits]
    return None if not values or None in values else fmean(values)


def _fixed(value: float | None, digits: int = 3) -> str:
    """The number; a dash for what was infinite or none, which JSON does not hold."""
    return "–" if value is None else f"{value:.{digits}f}"


def verdict_words(verdict: Mapping[str, Any]) -> str:
    """One line: published, ours, seeds, spread."""
    published = verdict["published"]
    ours = _fixed(verdict["ours"])
    if verdict["count"] > 1:
        low, high = _fixed(verdict["low"]), _fixed(verdict["high"])
        ours += f" [{low}, {high}] of {verdict['count']}"
    judged = {True: "agrees", False: "DIFFERS", None: "no verdict"}[verdict["agrees"]]
    detail = verdict["rule"] if verdict["agrees"] is not None else verdict["note"]
    parts = [f"published {published}" if published else "", f"ours {ours}"]
    return f"{verdict['what']}: {', '.join(p for p in parts if p)}: {judged}" + (
        f" ({detail})" if detail else ""
    )


_HERE = " (here: "


def _title(item: Item, facts: Mapping[str, Any]) -> str:
    """The item's title, and what was looked at in its place."""
    if not facts["changed"] or not facts["networks"]:
        return item.title
    words = [n["name"] for n in facts["networks"]]
    return f"{item.title}{_HERE}{listed(words)}; {facts['changed']})"


def write_item(folder: Path, item: Item, outcome: Outcome, facts: Mapping[str, Any]) -> list[Path]:
    """Writes ``result.json`` and every figure as SVG and PNG into the item's folder.

    Args:
        folder: of the profile.
        item: what was computed.
        outcome: what came out.
        facts: profile, what was changed about it (empty: nothing), networks, command, versions,
            seconds.

    Returns:
        the paths, the result first.

    Raises:
        NotDrawnError: a figure could not be made; the result is written all the same.
        OSError: the folder cannot be written; says where the files are instead.
    """
    result = {
        "format": FORMAT,
        "item": item.name,
        "title": _title(item, facts),
        "shows": item.shows,
        **facts,
        **outcome.to_dict(),
    }
    numbers = {RESULT: (json.dumps(plain(result), indent=1, allow_nan=False) + "\n").encode()}

    def draw() -> dict[str, bytes]:
        files = {}
        charts = [(chart.name, draw_chart(chart)) for chart in outcome.charts]
        for name, picture in charts + [(h.name, draw_heat_map(h)) for h in outcome.heat_maps]:
            files[f"{name}.svg"] = picture.svg.encode()
            files[f"{name}.png"] = picture.png
        return files

    paths = drawn_or_kept(folder / item.name, numbers, draw)
    return sorted(paths, key=lambda path: path.name != RESULT)


def write_page(folder: Path, order: Sequence[str]) -> Path:
    """One page of all items whose results are in ``folder``, in this order; figures inside.

    Warns:
        RuntimeWarning: a result of another time cannot be shown; it is left out.
    """
    results = []
    for name in order:
        path = folder / name / RESULT
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text())
            render(folder, [result])
            results.append(result)
        except Exception as error:  # templates raise types of their own
            warnings.warn(
                f"{path} is left out of the page: it cannot be shown "
                f"({type(error).__name__}: {error}); remove it to compute it anew",
                RuntimeWarning,
                stacklevel=2,
            )
    return write_files(folder, {PAGE: render(folder, results).encode()})[0]


def render(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """The page's HTML, with the figures whose files are there."""
    judged = [v for r in results for v in r["verdicts"] if v["agrees"] is not None]
    return template("reproduce.html.j2").render(
        results=results,
        contents={r["item"]: r["title"].partition(_HERE)[0] for r in results},
        figures={r["item"]: _figures(folder / r["item"], r) for r in results},
        captions={r["item"]: _caption(r) for r in results},
        fixed=_fixed,
        agree=sum(v["agrees"] for v in judged),
        judged=len(judged),
        profile=results[0]["profile"] if results else "",
        changed=results[0]["changed"] if results else "",
    )


def _figures(folder: Path, result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Charts and heat maps; ``uri`` is empty where the file cannot be read."""
    figures = []
    for figure in (*result["charts"], *result["heat_maps"]):
        path = folder / f"{figure['name']}.svg"
        try:
            uri = svg_uri(path.read_bytes())
        except OSError:
            uri = ""
        figures.append({"uri": uri, "alt": figure["title"], "file": path.name})
    return figures


def _caption(result: Mapping[str, Any]) -> str:
    """What the marks in an item's figures mean, of those that there are."""
    curves = [curve for chart in result["charts"] for curve in chart["curves"]]
    words = []
    if any(curve["style"] != "points" for curve in curves):
        words.append("lines: means over seeds (or pairs of seeds)")
        if any(len(curve["values"]) > 1 for curve in curves if curve["style"] != "points"):
            words.append("shade: their range")
    if any(curve["published"] for curve in curves):
        words.append("crosses: published, read off plots to ±.01")
    if result["heat_maps"]:
        words.append("squares: the darker, the larger")
    text = "; ".join(words)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
