"""What a benchmark found: plain numbers that go into JSON and come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["Group", "Row", "quartiles"]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return float(low), float(middle), float(high)


@dataclass
class Row:
    """One contender's figures on one problem.

    Attributes:
        name: as shown.
        seconds: time of each round; empty where it did not run.
        cpu_seconds: processor time of the same, all threads together; says what a busy machine
            took away.
        setup_seconds: what had to be done once before (a pass over the data, a compilation).
        ratios: per round, this contender's time over that of the problem's subject.
        peak_bytes: peak memory beyond an idle process with the same imports and data.
        difference: relative difference of its result to the reference; None: not compared.
        limit: what ``difference`` must not exceed; None: shown only.
        figures: further numbers, by heading (e.g. products with the operator).
        note: why there are no figures, or what else to know.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    setup_seconds: float | None = None
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    difference: float | None = None
    limit: float | None = None
    figures: dict[str, float | str] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float | None:
        return quartiles(self.seconds)[1] if self.seconds else None

    @property
    def ratio(self) -> float | None:
        return quartiles(self.ratios)[1] if self.ratios else None

    @property
    def disagrees(self) -> bool:
        """Whether the result is further from the reference than it may be, or not a number."""
        return (
            self.difference is not None
            and self.limit is not None
            and not self.difference <= self.limit
        )


@dataclass
class Group:
    """All contenders on one problem.

    Attributes:
        suite, key: of the problem.
        title, description: for people.
        rows: the subject first (the contender that ratios refer to).
        gradient_seconds: median time of one gradient of the same batch; None where there is none.
    """

    suite: str
    key: str
    title: str
    description: str
    rows: list[Row]
    gradient_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with medians and quartiles beside the raw times."""
        result = asdict(self)
        for row, plain in zip(self.rows, result["rows"], strict=True):
            for name in ("seconds", "cpu_seconds", "ratios"):
                values = getattr(row, name)
                plain[f"{name}_quartiles"] = list(quartiles(values)) if values else None
            plain["disagrees"] = row.disagrees
        return result
