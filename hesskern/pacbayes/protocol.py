"""What must be fixed before the data are read: confidence, prior grid, form of the bound, draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hesskern.pacbayes.bound import FORMS, PriorGrid

__all__ = ["OURS", "PUBLISHED", "RENAMED", "SAMPLINGS", "Protocol"]

RENAMED = {"natural": "truncated"}
"""Old names of methods: taken still, and what files written under them say."""

SAMPLINGS = ("per-example", "networks")


@dataclass(frozen=True)
class Protocol:
    """The terms of a certificate; none of them may depend on the training samples.

    Attributes:
        delta: the bound may fail with this probability (over the samples).
        delta_draws: the estimate of the error of Q may fail with this probability (over the draws).
        grid: variances the prior may have.
        form: "maurer" or "langford-seeger", see :mod:`hesskern.pacbayes.bound`.
        shared_variance: one prior variance for all layers (published) instead of one per layer.
        sampling: "per-example": an independent network for every example and pass; "networks":
            one per pass over the data (published).
        passes: T, passes over the data at the end.
        group: examples that share a draw of weights that are shared over positions.
    """

    delta: float = 0.025
    delta_draws: float = 0.01
    grid: PriorGrid = field(default_factory=PriorGrid)
    form: str = "maurer"
    shared_variance: bool = False
    sampling: str = "per-example"
    passes: int = 100
    group: int = 100

    def __post_init__(self) -> None:
        for name in ("delta", "delta_draws"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {self.form!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                f"sampling must be one of {', '.join(SAMPLINGS)}; got {self.sampling!r}"
            )
        for name in ("passes", "group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    @property
    def confidence(self) -> float:
        """1 - delta - delta'."""
        return 1 - self.delta - self.delta_draws

    def priced(self, indices: Sequence[int]) -> list[int]:
        """The indices the union bound charges for: each layer's, or the common one once.

        Raises:
            ValueError: they differ although the variance is shared.
        """
        if not self.shared_variance:
            return list(indices)
        if len(set(indices)) != 1:
            raise ValueError(f"j must be the same for all layers, got {list(indices)}")
        return [indices[0]]


PUBLISHED = Protocol(
    form="langford-seeger", shared_variance=True, sampling="networks", passes=50_000
)
"""The terms of arXiv 2010.04261."""

OURS = Protocol(grid=PriorGrid(c=1.0, b=10))
"""The terms of "truncated" if none are given: as published, with a higher and coarser grid.

Every index j costs 2 log j + log(pi^2 / 6) nats. A tenth of the steps saves 2 log 10 = 4.6 nats per
layer, and hardly any fit: mean and variances move to the grid together with the prior's.
"""
