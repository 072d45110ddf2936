"""A result read for people: means over models, the k that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

__all__ = ["Digest"]

Entry = Mapping[str, Any]


class Digest:
    """Questions that summary and tables ask of a result.

    Attributes:
        result: what :func:`hesskern.analysis.analyze` computed.
        layers: names in the network's order.
        mark: k = c - 1 for c classes, the number of large eigenvalues that is expected; less
            where fewer eigenpairs were computed.
        columns: the k that tables show.
        with_inputs: layers that have one input covariance (no groups).
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self.layers: list[str] = result["network"]["layers"]
        lengths = [len(entry["overlap"]) for n in self.layers for entry in self.entries(n)]
        self.mark = min(max(result["data"]["classes"] - 1, 1), *lengths)
        candidates = (1, self.mark, 2 * (self.mark + 1), max(lengths))
        self.columns = sorted({k for k in candidates if k <= max(lengths)})
        self.with_inputs = [
            n for n in self.layers if all("autocorrelation" in e for e in self.entries(n))
        ]

    @property
    def inexact_reasons(self) -> list[str]:
        """Why layers have a Gauss-Newton block instead of the Hessian; each reason once."""
        return self.reasons_of(self.layers)

    def reasons_of(self, names: Iterable[str]) -> list[str]:
        """The same for some layers."""
        reasons = {entry["inexact_reason"] for n in names for entry in self.entries(n)}
        return sorted(reason for reason in reasons if reason)

    @property
    def frobenius_error(self) -> float:
        """Largest standard error of a Frobenius norm ratio; 0 where all were computed exactly."""
        return max(e["decoupling"]["frobenius_error"] for n in self.layers for e in self.entries(n))

    def entries(self, name: str) -> list[Entry]:
        """The layer's numbers, of every model."""
        return [model["layers"][name] for model in self.result["models"]]

    def mean(self, name: str, pick: Callable[[Entry], float]) -> float:
        """Mean over the models of one number of a layer."""
        return fmean(pick(entry) for entry in self.entries(name))

    def part(self, name: str, key: str, part: str) -> float:
        """Mean over the models of ``entry[key][part]``."""
        return self.mean(name, lambda entry: entry[key][part])

    def at(self, name: str, curve: str, k: int) -> float | None:
        """Mean of a layer's curve at k; None where it is not that long."""
        if any(len(entry[curve]) < k for entry in self.entries(name)):
            return None
        return self.mean(name, lambda entry: entry[curve][k - 1])

    def marked(self, name: str, curve: str) -> float:
        """Mean of a layer's curve at :attr:`mark`."""
        return self.mean(name, lambda entry: entry[curve][self.mark - 1])

    def alignment(self, name: str) -> float:
        """Mean of (v_1^T E[x])² / ‖E[x]‖² of a layer's inputs."""
        return self.part(name, "autocorrelation", "mean_alignment")

    def ratio(self, name: str) -> float | None:
        """Mean of lambda_1 / lambda_2 of E[x x^T]; None where some lambda_2 is zero."""
        ratios = [e["autocorrelation"]["eigenvalue_ratio"] for e in self.entries(name)]
        return None if any(r is None for r in ratios) else fmean(ratios)

    def between(self, name: str, form: str, k: int) -> float | None:
        """Mean overlap between models, ``form`` "exact" or "kronecker"; None where not known."""
        curves = [pair["layers"][name][form] for pair in self.result["pairs"]]
        if not curves or any(len(curve) < k for curve in curves):
            return None
        return fmean(curve[k - 1] for curve in curves)
