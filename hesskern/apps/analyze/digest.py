"""A result read for people: means over models, the k that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

from hesskern.apps.analyze.result import AnalysisResult, Curve, Form, LayerEntry

__all__ = ["Digest"]


class Digest:
    """Questions that summary and tables ask of a result.

    Attributes:
        result: what :func:`hesskern.apps.analyze.analysis.analyze` computed.
        layers: names in the network's order.
        mark: k = c - 1 for c classes, the number of large eigenvalues that is expected; less
            where fewer eigenpairs were computed.
        columns: the k that tables show.
        with_inputs: layers that have one input covariance (no groups).
    """

    def __init__(self, result: AnalysisResult) -> None:
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

    def entries(self, name: str) -> list[LayerEntry]:
        """The layer's numbers, of every model."""
        return [model["layers"][name] for model in self.result["models"]]

    def mean(self, name: str, pick: Callable[[LayerEntry], float]) -> float:
        """Mean over the models of one number of a layer."""
        return fmean(pick(entry) for entry in self.entries(name))

    def at(self, name: str, curve: Curve, k: int) -> float | None:
        """Mean of a layer's curve at k; None where it is not that long."""
        if any(len(entry[curve]) < k for entry in self.entries(name)):
            return None
        return self.mean(name, lambda entry: entry[curve][k - 1])

    def marked(self, name: str, curve: Curve) -> float:
        """Mean of a layer's curve at :attr:`mark`."""
        return self.mean(name, lambda entry: entry[curve][self.mark - 1])

    def alignment(self, name: str) -> float:
        """Mean of (v_1^T E[x])² / ‖E[x]‖² of a layer's inputs."""
        return self.mean(name, lambda entry: entry["autocorrelation"]["mean_alignment"])

    def ratio(self, name: str) -> float | None:
        """Mean of lambda_1 / lambda_2 of E[x x^T]; None where some lambda_2 is zero."""
        ratios = [e["autocorrelation"]["eigenvalue_ratio"] for e in self.entries(name)]
        known = [ratio for ratio in ratios if ratio is not None]
        return fmean(known) if len(known) == len(ratios) else None

    def between(self, name: str, form: Form, k: int) -> float | None:
        """Mean overlap between models, ``form`` "exact" or "kronecker"; None where not known."""
        curves = [pair["layers"][name][form] for pair in self.result["pairs"]]
        if not curves or any(len(curve) < k for curve in curves):
            return None
        return fmean(curve[k - 1] for curve in curves)
