"""What a reproduced item consists of: charts, heat maps, tables and verdicts, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

__all__ = [
    "Chart",
    "Curve",
    "HeatMap",
    "Outcome",
    "Table",
    "Verdict",
    "judge",
    "published_points",
    "spread_words",
]


@dataclass(frozen=True)
class Curve:
    """One line of a chart, drawn as the mean over its samples with their range.

    Attributes:
        label: for the legend.
        values: one sequence per seed (or pair of seeds), all of one length.
        x: positions, None for 1, 2, ...
        colour: index into the palette.
        style: "solid", "dashed", "dotted" or "points".
        published: whether these are the published figures.
    """

    label: str
    values: Sequence[Sequence[float]]
    x: Sequence[float] | None = None
    colour: int = 0
    style: str = "solid"
    published: bool = False


def published_points(
    label: str, values: Sequence[Sequence[float]], x: Sequence[float] | None, colour: int
) -> Curve:
    """Published figures, drawn as points."""
    return Curve(label, values, x, colour, "points", published=True)


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        name: of the files it is written to.
        mark: a position on the x axis and what stands there.
        log: whether the y axis is logarithmic.
        unit: whether the y axis is [0, 1].
        integers: whether the x axis counts, from 0.
    """

    name: str
    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    mark: tuple[float, str] | None = None
    log: bool = False
    unit: bool = False
    integers: bool = True


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers in [0, 1], the first row on top."""

    name: str
    title: str
    xlabel: str
    ylabel: str
    rows: Sequence[Sequence[float]]
    colour: int = 0


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column names the row."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """A published figure beside the mean over our seeds.

    Attributes:
        what: the quantity.
        published: the figure, or None where the paper shows it without a number.
        ours, low, high: mean and range.
        count: number of seeds (or pairs of seeds) behind it.
        rule: what counts as agreement, in words; empty where nothing is judged.
        agrees: the verdict; None: there is none, and ``note`` says why.
    """

    what: str
    published: str
    ours: float
    low: float
    high: float
    count: int
    rule: str
    agrees: bool | None
    note: str = ""


def spread_words(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and the range where there are several values."""
    numbers = list(values)
    text = f"{fmean(numbers):.{digits}f}"
    if len(numbers) == 1:
        return text
    return f"{text} [{min(numbers):.{digits}f}, {max(numbers):.{digits}f}]"


def judge(
    what: str,
    ours: Sequence[float],
    published: float | str | None = None,
    *,
    within: float | None = None,
    between: tuple[float, float] | None = None,
    withheld: str = "",
) -> Verdict:
    """The verdict on one figure.

    Args:
        what: the quantity.
        ours: one value per seed.
        published: the figure, or what is published in its place.
        within: largest difference of our mean from ``published``.
        between: or the range that our mean has to lie in, ends included.
        withheld: why there is no verdict in spite of a published figure.

    Raises:
        ValueError: there are no values, or ``within`` without a published number.
    """
    if not ours:
        raise ValueError(f"ours must hold at least one value of {what}")
    mean = fmean(ours)
    rule, agrees = "", None
    if within is not None:
        if not isinstance(published, (int, float)):
            raise ValueError(f"within needs a published number for {what}, got {published!r}")
        rule = f"within {within:g}"
        # The published figures have two or three digits, so that much rounding is not a difference.
        agrees = abs(mean - published) <= within + 1e-9
    elif between is not None:
        low, high = between
        rule = f"in [{low:g}, {high:g}]"
        agrees = low <= mean <= high
    number = f"{published:g}" if isinstance(published, (int, float)) else published or ""
    return Verdict(
        what,
        number,
        mean,
        min(ours),
        max(ours),
        len(ours),
        rule,
        None if withheld else agrees,
        withheld,
    )


@dataclass
class Outcome:
    """All that one item found; :meth:`to_dict` is what its ``result.json`` holds."""

    charts: list[Chart] = field(default_factory=list)
    heat_maps: list[HeatMap] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Nested containers of texts and numbers."""
        return asdict(self)
