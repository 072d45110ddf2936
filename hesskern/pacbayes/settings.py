"""How a certificate is to be found: one frozen object, checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hesskern.choices import Method, check_choice
from hesskern.pacbayes.loop import Budget
from hesskern.pacbayes.protocol import OURS, PUBLISHED, RENAMED, Protocol
from hesskern.pacbayes.published_methods import PublishedSettings
from hesskern.pacbayes.truncated_method import TruncatedSettings

__all__ = ["CertifySettings", "MethodSettings", "Start", "seed_for"]

Start = Literal["prior", "model"]

MethodSettings = TruncatedSettings | PublishedSettings

_DECLARED = "declared data-free by the user"
_DEFAULT_EPOCHS = 100


@dataclass(frozen=True)
class CertifySettings:
    """What :func:`hesskern.pacbayes.certify` is to do; its keywords are these fields.

    Attributes:
        method: "truncated" (ours; "natural" is its old name), or a published one: "base", "appr",
            "iter", "iter_d", "iter_m".
        epochs: passes of the optimization; None, with ``minutes`` None too: 100.
        minutes: wall-clock time of the optimization instead.
        protocol: confidence, prior grid, form of the bound, T; fixed before the data. None:
            ``OURS`` for "truncated", ``PUBLISHED`` (T = 50,000 whole networks) for the others.
        settings: of the method; None: its defaults.
        start: where the mean starts: "prior" (default of "truncated": the model's weights are not
            used, only its shape) or "model" (default and only choice of the published methods).
        seed: of the order of samples, of the optimization's noise, and of the final draws.
        n: the number of samples there must be; None: as many as there are.
        prior_record: how the prior was made, e.g. ``{"construction": ..., "seed": ...}``; None:
            the certificate says 'declared data-free by the user'.

    Raises:
        ValueError: a value is out of range, or two do not go together; names the field.
        TypeError: ``settings`` belong to another method.
    """

    method: Method | Literal["natural"] = "truncated"
    epochs: int | None = None
    minutes: float | None = None
    protocol: Protocol | None = None
    settings: MethodSettings | None = None
    start: Start | None = None
    seed: int = 0
    n: int | None = None
    prior_record: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", RENAMED.get(self.method, self.method))
        _ = self.budget
        check_choice("method", self.method, Method)
        expected = TruncatedSettings if self.ours else PublishedSettings
        if self.settings is not None and not isinstance(self.settings, expected):
            raise TypeError(
                f"settings of method {self.method!r} must be {expected.__name__}, got "
                f"{type(self.settings).__name__}"
            )
        if self.start is not None:
            check_choice("start", self.start, Start)
        if self.start == "prior" and not self.ours:
            raise ValueError(f"start: method {self.method!r} starts from the model's weights")
        missing = {"construction", "seed"} - self.record.keys()
        if missing:
            raise ValueError(
                f"prior_record must hold 'construction' and 'seed', {min(missing)!r} is missing"
            )

    @property
    def ours(self) -> bool:
        """Whether the method is "truncated", not a published one."""
        return self.method == "truncated"

    @property
    def budget(self) -> Budget:
        """How long to optimize."""
        unlimited = self.epochs is None and self.minutes is None
        return Budget(_DEFAULT_EPOCHS if unlimited else self.epochs, self.minutes)

    @property
    def terms(self) -> Protocol:
        """The protocol, or the method's own."""
        return self.protocol or (OURS if self.ours else PUBLISHED)

    @property
    def starts_at(self) -> Start:
        """``start``, or the method's own."""
        return self.start or ("prior" if self.ours else "model")

    @property
    def record(self) -> dict[str, Any]:
        """What is on record of the prior."""
        if self.prior_record is None:
            return {"construction": _DECLARED, "seed": None}
        return dict(self.prior_record)

    def seed_for(self, purpose: str) -> int:
        """See :func:`seed_for`."""
        return seed_for(self.seed, purpose)


def seed_for(seed: int, purpose: str) -> int:
    """Seeds of different purposes, far apart, from one."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return int.from_bytes(digest[:6], "little")
