"""Figures of the report: small panels as SVG, and one picture of the whole as PNG.

Every panel is about as wide as a phone, so that a page can lay them side by side or one below the
other without shrinking their type.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from hesskern.apps.analyze.result import (
    Form,
    LayerEntry,
    LayerPair,
    OverlapFigures,
    PublishedFigures,
    Spectra,
)

__all__ = [
    "MUTED",
    "Picture",
    "between_panel",
    "colour",
    "correspondence_panel",
    "eigenvalue_panel",
    "heat_map",
    "history_panel",
    "k_axis",
    "mark_at",
    "overlap_panel",
    "overview",
    "rank_one_panel",
    "readable_log_axis",
    "share_panel",
    "singular_value_panel",
    "spectra_panel",
    "variance_panel",
]

# Okabe and Ito's palette without its yellow: told apart by colour-blind readers and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, MUTED, _GRID = "#1b1f24", "#5b6470", "#e3e6ea"
_PANEL = (4.4, 3.15)
_SHOWN_EIGENVALUES = 20
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "hesskern",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": _INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}

Curves = Sequence[Sequence[float]]


def _style() -> AbstractContextManager[None]:
    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def colour(index: int) -> str:
    """The colour of the layer with this index, the same in every figure."""
    return _COLOURS[index % len(_COLOURS)]


class Picture:
    """One panel, drawn when it is asked for; the same numbers give the same bytes.

    Args:
        draw: fills the axes.
        size: in inches.
    """

    def __init__(self, draw: Callable[[Axes], None], size: tuple[float, float] = _PANEL) -> None:
        self._draw, self._size = draw, size

    @cached_property
    def svg(self) -> str:
        """A standalone SVG document."""
        stream = io.StringIO()
        with _style():
            self._figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        return stream.getvalue()

    @cached_property
    def png(self) -> bytes:
        """A PNG of twice its size on screen."""
        stream = io.BytesIO()
        with _style():
            self._figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
        return stream.getvalue()

    @cached_property
    def _figure(self) -> Figure:
        figure = Figure(figsize=self._size, layout="constrained")
        self._draw(figure.add_subplot())
        # The axes find their places once, for both files.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure


def eigenvalue_panel(
    name: str, index: int, layer: LayerEntry, published: Spectra | None = None
) -> Picture:
    """Leading eigenvalues of H and of its Kronecker form, on a logarithmic axis."""
    return Picture(lambda axes: _eigenvalues(axes, name, index, layer, published))


def _eigenvalues(
    axes: Axes,
    name: str,
    index: int,
    layer: LayerEntry,
    published: Spectra | None,
) -> None:
    looks: tuple[tuple[Form, str, str, str], ...] = (
        ("exact", "exact H", "-", colour(index)),
        ("kronecker", "Kronecker form", "--", "white"),
    )
    for key, label, line, face in looks:
        values = [v for v in layer["eigenvalues"][key][:_SHOWN_EIGENVALUES] if v > 0]
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=colour(index),
            label=label,
            marker="o",
            markersize=5,
            markerfacecolor=face,
            linestyle=line,
            linewidth=1.2,
        )
    for key, label, marker in (("exact", "exact", "x"), ("kronecker", "Kronecker", "+")):
        values = list(published[key]) if published else []
        if values:
            axes.plot(
                range(1, len(values) + 1),
                values,
                marker,
                color=_INK,
                markersize=6,
                markeredgewidth=1.2,
                label=f"published, {label}",
            )
    axes.set_yscale("log")
    readable_log_axis(axes)
    axes.set(title=name, xlabel="index", ylabel="eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def readable_log_axis(axes: Axes) -> None:
    """Plain numbers on the axis, and enough of them when it spans less than two decades."""
    low, high = axes.get_ylim()
    narrow = high / low < 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def overlap_panel(
    layers: Sequence[str],
    curves: Mapping[str, Curves],
    mark: int,
    published: OverlapFigures | None = None,
) -> Picture:
    """Overlap of the top-k spaces of H and of its Kronecker form: mean and range over models.

    Args:
        layers: names in the network's order.
        curves: per layer, one curve [k] of every model.
        mark: the k = c - 1 that is marked.
        published: ``k`` and, under ``layers``, the overlaps at those k.
    """
    return Picture(lambda axes: _overlap(axes, layers, curves, mark, published))


def _overlap(
    axes: Axes,
    layers: Sequence[str],
    curves: Mapping[str, Curves],
    mark: int,
    published: OverlapFigures | None = None,
) -> None:
    for index, name in enumerate(layers):
        _band(axes, curves[name], index, name)
        if published and name in published["layers"]:
            axes.plot(
                published["k"],
                published["layers"][name],
                "x",
                color=colour(index),
                markersize=6,
                markeredgewidth=1.6,
                clip_on=False,
            )
    if published:
        axes.plot([], [], "x", color=MUTED, label="published")
    mark_at(axes, mark, f"k = c − 1 = {mark}")
    axes.set(
        title="Exact H against its Kronecker form",
        ylabel="overlap",
        ylim=(0, 1.03),
    )
    k_axis(axes)
    axes.legend(ncols=2 if len(layers) > 3 else 1, loc="lower right")


def _band(axes: Axes, curves: Curves, index: int, label: str, **look: Any) -> None:
    """Mean curve with the range over models, from k = 1."""
    stacked = np.array(curves)
    k = np.arange(1, stacked.shape[1] + 1)
    axes.plot(k, stacked.mean(0), color=colour(index), label=label, **look)
    if len(stacked) > 1:
        axes.fill_between(
            k, stacked.min(0), stacked.max(0), color=colour(index), alpha=0.15, linewidth=0
        )


def k_axis(axes: Axes, label: str = "k, dimension of the leading space") -> None:
    axes.set_xlim(0, None)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def mark_at(axes: Axes, x: float, text: str) -> None:
    axes.axvline(x, color=MUTED, linewidth=0.9, linestyle=":")
    axes.annotate(
        text,
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        color=MUTED,
        fontsize=9,
        va="top",
    )


def between_panel(name: str, index: int, parameters: int, pairs: Sequence[LayerPair]) -> Picture:
    """Overlap of one layer's leading spaces between models trained from different seeds.

    Args:
        name, index, parameters: of the layer.
        pairs: per pair of models ``exact`` [k], ``kronecker`` [k'], ``prediction``.
    """
    return Picture(lambda axes: _between(axes, name, index, parameters, pairs))


def _between(
    axes: Axes, name: str, index: int, parameters: int, pairs: Sequence[LayerPair]
) -> None:
    exact = [pair["exact"] for pair in pairs]
    kronecker = [pair["kronecker"] for pair in pairs]
    _band(axes, kronecker, index, "Kronecker form", linestyle="--", linewidth=1.3)
    _band(axes, exact, index, "exact H", linewidth=2.4)
    longest = len(kronecker[0])
    axes.plot(
        [0, longest], [0, longest / parameters], color=MUTED, linewidth=1, label="random spaces"
    )
    predictions = [p["prediction"] for p in pairs if p["prediction"] is not None]
    top = max(max(map(max, kronecker)), max(map(max, exact)))
    if predictions:
        m = predictions[0]["m"]
        if m <= longest:
            mark_at(axes, m, f"k = m = {m}")
        curve = np.mean([p["curve"] for p in predictions], axis=0)
        top = max(top, float(curve.max()))
        k = np.arange(1, len(curve) + 1)
        axes.plot(k, curve, color=_INK, linewidth=1, linestyle=":", label="predicted")
    axes.set(
        title=name,
        ylabel="overlap between models",
        ylim=(0, min(1.03, 1.25 * top)),
    )
    k_axis(axes)
    axes.legend()


def rank_one_panel(layers: Sequence[str], curves: Mapping[str, Curves], mark: int) -> Picture:
    """‖Mat(h)‖_2 / ‖Mat(h)‖_F of the leading eigenvectors of H: mean and range over models."""

    def draw(axes: Axes) -> None:
        for index, name in enumerate(layers):
            _band(axes, curves[name], index, name)
        mark_at(axes, mark, f"k = c − 1 = {mark}")
        axes.set(
            title="How close eigenvectors are to rank one",
            ylim=(0, 1.03),
        )
        k_axis(axes, "index of the eigenvector of H")
        axes.set_ylabel(r"$\Vert\mathrm{Mat}(h)\Vert_2\,/\,\Vert\mathrm{Mat}(h)\Vert_F$")
        axes.legend(ncols=2 if len(layers) > 3 else 1, loc="lower right")

    return Picture(draw)


def share_panel(name: str, index: int, curves: Mapping[str, Curves], mark: int) -> Picture:
    """One layer's overlap of H and its Kronecker form beside the curvature captured, over k.

    Args:
        name, index: of the layer.
        curves: by label, one curve [k] of every model; the first solid, the others dashed.
        mark: the k = c - 1 that is marked.
    """

    def draw(axes: Axes) -> None:
        for i, (label, values) in enumerate(curves.items()):
            _band(axes, values, index, label, linestyle="--" if i else "-")
        mark_at(axes, mark, f"k = c − 1 = {mark}")
        axes.set(title=f"{name}: Kronecker form", ylabel="share", ylim=(0, 1.03))
        k_axis(axes)
        axes.legend(loc="lower right")

    return Picture(draw)


def spectra_panel(name: str, index: int, spectra: Mapping[str, Sequence[float]]) -> Picture:
    """Leading eigenvalues of the two factors over the largest, on a logarithmic axis.

    Args:
        name, index: of the layer.
        spectra: by label, largest first.
    """

    def draw(axes: Axes) -> None:
        for i, (label, values) in enumerate(spectra.items()):
            shown = [v / values[0] for v in values[:_SHOWN_EIGENVALUES] if v > 0 < values[0]]
            axes.plot(
                range(1, len(shown) + 1),
                shown,
                "--o" if i else "-o",
                color=colour(index),
                markersize=5,
                markerfacecolor="white" if i else colour(index),
                linewidth=1.2,
                label=label,
            )
        axes.set_yscale("log")
        readable_log_axis(axes)
        axes.set(title=f"{name}: the two factors", xlabel="index", ylabel="eigenvalue / largest")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return Picture(draw)


def singular_value_panel(name: str, index: int, values: Curves, mark: int) -> Picture:
    """Squared singular values of the eigenvectors as matrices, stacked; a full bar is rank one.

    Args:
        name, index: of the layer.
        values: per eigenvector its largest singular values, over the Frobenius norm.
        mark: the last of the c - 1 leading eigenvectors.
    """
    squares = np.square(np.array(values))
    at = np.arange(1, len(squares) + 1)

    def draw(axes: Axes) -> None:
        base = np.zeros(len(squares))
        for i, column in enumerate(squares.T):
            shade = _shades(index)(0.55 / (1 + 1.2 * i))
            axes.bar(at, column, 0.85, base, color=shade, label=f"σ{i + 1}²".translate(_SUBSCRIPT))
            base += column
        axes.bar(at, 1 - base, 0.85, base, color=_GRID, label="the rest")
        mark_at(axes, mark + 0.5, f"c − 1 = {mark}")
        axes.grid(False)
        axes.set(
            title=f"{name}: eigenvectors as matrices",
            xlabel="index of the eigenvector of H",
            ylabel="share of ‖Mat(h)‖²",
            ylim=(0, 1.0),
            xlim=(0.4, len(squares) + 0.6),
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.0)

    return Picture(draw)


def _shades(index: int) -> LinearSegmentedColormap:
    """White, the layer's colour at one half, a dark shade of it."""
    return LinearSegmentedColormap.from_list(f"layer{index}", ["white", colour(index), "#101418"])


def correspondence_panel(name: str, index: int, side: str, squares: Curves) -> Picture:
    """Heat map of squared components of H's eigenvectors along a factor's eigenvectors.

    Args:
        name, index: of the layer.
        side: ``"input"`` or ``"output"``.
        squares: [rows, k], row i for the factor's eigenvector i, columns for those of H.
    """

    def draw(axes: Axes) -> None:
        heat_map(axes, np.array(squares)[:_SHOWN_EIGENVALUES, :_SHOWN_EIGENVALUES], index)
        factor = "E[x xᵀ]" if side == "input" else "E[M]"
        axes.set(
            title=f"{name}, {side} side",
            xlabel="eigenvector of H",
            ylabel=f"eigenvector of {factor}",
        )

    return Picture(draw)


def heat_map(axes: Axes, matrix: np.ndarray, index: int) -> None:
    """A matrix [rows, columns] of numbers in [0, 1], the first row on top, with a colour bar."""
    rows, columns = matrix.shape
    image = axes.imshow(
        matrix,
        cmap=_shades(index),
        vmin=0,
        vmax=1,
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
        interpolation="nearest",
        aspect="auto",
    )
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.02)
    bar.outline.set(linewidth=0.6, edgecolor=MUTED)


def overview(
    title: str,
    layers: Sequence[str],
    eigenvalues: tuple[str, LayerEntry],
    curves: Mapping[str, Curves],
    mark: int,
    pairs: Mapping[str, Sequence[LayerPair]],
    published: PublishedFigures | None = None,
) -> bytes:
    """One PNG of three panels: eigenvalues of one layer, overlaps, the same between models.

    Args:
        title: of the network and data.
        layers: names in the network's order.
        eigenvalues: the layer shown on the left, and its numbers.
        curves, mark, published: see :func:`overlap_panel`; ``published`` holds both figures.
        pairs: per layer, see :func:`between_panel`; may be empty.
    """
    shown_name, layer = eigenvalues
    count = 3 if pairs else 2
    with _style():
        figure = Figure(figsize=(4.3 * count, 3.4), layout="constrained", dpi=150)
        axes = figure.subplots(1, count)
        shown = published["eigenvalues"].get(shown_name) if published else None
        _eigenvalues(axes[0], shown_name, layers.index(shown_name), layer, shown)
        axes[0].set_title(f"{title}: eigenvalues of {shown_name}")
        _overlap(axes[1], layers, curves, mark, published["overlap"] if published else None)
        if pairs:
            for index, name in enumerate(layers):
                _band(axes[2], [pair["exact"] for pair in pairs[name]], index, name)
            axes[2].set(
                title="Exact H between seeds",
                ylabel="overlap between models",
                ylim=(0, 1.03),
            )
            k_axis(axes[2])
            axes[2].legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def variance_panel(
    layers: Mapping[str, Mapping[str, Sequence[float]]], side: str, kronecker: bool
) -> Picture:
    """Posterior over prior variance by index, a curve per layer, both axes logarithmic.

    Args:
        layers: ``index`` and ``ratio`` by layer name.
        side: "input" or "output".
        kronecker: whether indices count eigenvectors of the Kronecker factors.
    """

    def draw(axes: Axes) -> None:
        for i, (name, curve) in enumerate(layers.items()):
            axes.plot(curve["index"], curve["ratio"], color=colour(i), label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Decades of a nearly constant curve would have no tick at all.
        low = min(min(curve["ratio"]) for curve in layers.values())
        axes.set_ylim(min(0.5 * low, 0.05), 2)
        what = "eigenvector" if kronecker else "coordinate"
        axes.set_xlabel(f"{side} {what} (index)")
        axes.set_ylabel("variance / prior's")
        axes.set_title(f"Variance by {side} index")
        axes.legend(loc="lower right")

    return Picture(draw)


def history_panel(history: Sequence[Mapping[str, float]], bound: float) -> Picture:
    """Estimates of bound and error after each epoch, and the certificate itself."""

    def draw(axes: Axes) -> None:
        epochs = [entry["epoch"] for entry in history]
        axes.plot(
            epochs, [e["estimate"] for e in history], color=colour(0), label="bound, estimate"
        )
        axes.plot(epochs, [e["error"] for e in history], color=colour(1), label="error, estimate")
        axes.plot([epochs[-1]], [bound], "o", color=_INK, label="certificate")
        axes.set_ylim(0, min(1.0, 2.5 * bound))
        axes.set_xlabel("epoch")
        axes.set_title("Course of the optimization")
        axes.legend(loc="upper right")

    return Picture(draw)


def score_panel(histogram: Mapping[str, Sequence[float]]) -> Picture:
    """Histogram of influence scores, counts on a logarithmic axis.

    Args:
        histogram: ``edges`` and ``counts``, of scores over their query's root mean square.
    """

    def draw(axes: Axes) -> None:
        edges, counts = histogram["edges"], histogram["counts"]
        for index, sign in enumerate((1, -1)):
            chosen = [
                (low, high, count)
                for low, high, count in zip(edges, edges[1:], counts, strict=False)
                if sign * (low + high) >= 0 and count
            ]
            axes.bar(
                [low for low, _, _ in chosen],
                [count for _, _, count in chosen],
                [high - low for low, high, _ in chosen],
                align="edge",
                color=colour(index),
                label=("helpful", "harmful")[index],
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.set_xlabel("score / root mean square of the query's")
        axes.set_ylabel("training samples, all queries")
        axes.set_title("Histogram of the scores")
        axes.legend(loc="upper right")

    return Picture(draw)


def concentration_panel(curve: Mapping[str, Sequence[float]]) -> Picture:
    """Share of the sum of absolute scores in the largest so many.

    Args:
        curve: ``samples`` and ``share``.
    """

    def draw(axes: Axes) -> None:
        axes.plot(curve["samples"], curve["share"], color=colour(2))
        axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("training samples, largest scores first")
        axes.set_ylabel("share of absolute scores")
        axes.set_title("How few samples carry it")

    return Picture(draw)
