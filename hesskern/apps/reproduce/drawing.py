"""Charts and heat maps as SVG and PNG, in the report's style."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hesskern.apps import plotting
from hesskern.apps.reproduce.results import Chart, Curve, HeatMap

__all__ = ["draw_chart", "draw_heat_map"]

_LINE = 40
_LINES = {"solid": "-", "dashed": "--", "dotted": ":"}


def draw_chart(chart: Chart) -> plotting.Picture:
    """Curves as means with their range; published figures as crosses."""

    def draw(axes: Axes) -> None:
        for curve in chart.curves:
            _draw_curve(axes, curve)
        if any(c.published and not c.label for c in chart.curves):
            axes.plot([], [], "x", color=plotting.MUTED, label="published")
        # Without a positive, finite value there is no logarithmic axis.
        if chart.log and np.isfinite(axes.yaxis.get_minpos()):
            axes.set_yscale("log")
            plotting.readable_log_axis(axes)
        if chart.mark is not None:
            plotting.mark_at(axes, *chart.mark)
        axes.set(title=_wrapped(chart.title), ylabel=chart.ylabel)
        if chart.integers:
            plotting.k_axis(axes, chart.xlabel)
        else:
            axes.set_xlabel(chart.xlabel)
        if chart.unit:
            axes.set_ylim(0, 1.03)
        elif not chart.log:
            axes.set_ylim(0, None)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            axes.legend(ncols=2 if len(labels) > 4 else 1)

    return plotting.Picture(draw)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    rows = np.array(curve.values, dtype=float)
    x = np.arange(1, rows.shape[1] + 1) if curve.x is None else np.array(curve.x)
    colour = plotting.colour(curve.colour)
    label: dict[str, Any] = {"label": curve.label} if curve.label else {}
    if curve.style == "points":
        marker = "x" if curve.published else "o"
        for i, row in enumerate(rows):
            axes.plot(
                x,
                row,
                marker,
                color=colour,
                markersize=6,
                markeredgewidth=1.6,
                clip_on=False,
                **(label if i == 0 else {}),
            )
        return
    line = _LINES[curve.style]
    width = 1.2 if curve.style == "dotted" else 1.8
    points: dict[str, Any] = {"marker": "o", "markersize": 4} if rows.shape[1] <= 25 else {}
    axes.plot(x, rows.mean(0), line, color=colour, linewidth=width, **points, **label)
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)


def draw_heat_map(heat: HeatMap) -> plotting.Picture:
    """A matrix, darker for larger."""

    def draw(axes: Axes) -> None:
        plotting.heat_map(axes, _rectangle(heat.rows), heat.colour)
        axes.set(title=_wrapped(heat.title), xlabel=heat.xlabel, ylabel=heat.ylabel)

    return plotting.Picture(draw)


def _wrapped(title: str) -> str:
    """In as many lines as a panel's width needs, broken after commas where there are some."""
    lines: list[str] = []
    for part in title.split(", "):
        if lines and len(lines[-1]) + len(part) + 2 <= _LINE:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return "\n".join(line for part in lines for line in textwrap.wrap(part, _LINE))


def _rectangle(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array(rows, dtype=float)
