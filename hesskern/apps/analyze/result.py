"""What an analysis holds, as JSON gives it back: the keys that report, tables and words read.

Numbers keep six digits; a number that is not finite is None.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

__all__ = [
    "NO_OVERLAPS",
    "AnalysisResult",
    "Curve",
    "Form",
    "LayerEntry",
    "LayerPair",
    "ModelEntry",
    "OverlapFigures",
    "PairEntry",
    "PublishedFigures",
    "Spectra",
]

Form = Literal["exact", "kronecker"]
"""The Hessian itself, or its Kronecker form."""

Curve = Literal["overlap", "captured", "rank_one"]
"""What a layer has at every k."""


class Spectra(TypedDict):
    """Leading eigenvalues, descending."""

    exact: list[float]
    kronecker: list[float]


class Traces(TypedDict):
    """Of the Hessian and of its Kronecker form."""

    exact: float
    kronecker: float


class Decoupling(TypedDict):
    """See :class:`hesskern.diagnostics.metrics.DecouplingError`."""

    spectral: float
    frobenius: float
    frobenius_error: float


class Autocorrelation(TypedDict):
    """See :class:`hesskern.diagnostics.metrics.InputAutocorrelation`."""

    mean_alignment: float
    eigenvalue_ratio: float | None


class Correspondence(TypedDict):
    """[k, m] and [k, d]: the leading eigenvectors along either factor's."""

    output: list[list[float]]
    input: list[list[float]]


class FactorSpectra(TypedDict):
    """Leading eigenvalues of E[M] and of E[x x^T]."""

    output_eigenvalues: list[float]
    input_eigenvalues: list[float]


class _OneGroup(TypedDict, total=False):
    """What layers have whose inputs come in one group."""

    correspondence: Correspondence
    autocorrelation: Autocorrelation
    factors: FactorSpectra


class LayerEntry(_OneGroup):
    """One layer of one model."""

    kind: str
    shape: list[int]
    groups: int
    positions: float
    parameters: int
    is_exact: bool
    inexact_reason: str | None
    pruning_error: float
    trace: Traces
    eigenvalues: Spectra
    residuals: list[float]
    converged: bool
    matvecs: int
    overlap: list[float]
    captured: list[float]
    rank_one: list[float]
    singular_values: list[list[float]]
    decoupling: Decoupling


class Measured(TypedDict):
    """On one split of the data."""

    loss: float
    accuracy: float


class ModelEntry(TypedDict):
    """One model; ``training`` is None where it was loaded."""

    label: str
    seed: int | None
    checkpoint: str | None
    training: dict[str, Any] | None
    train: Measured
    test: Measured
    layers: dict[str, LayerEntry]


class Prediction(TypedDict):
    """See :class:`hesskern.diagnostics.predictor.OverlapPrediction`."""

    applies: bool
    squared_cosine: float
    m: int
    curve: list[float]
    peak: int
    kind: str


class LayerPair(TypedDict):
    """Overlaps of one layer's leading spaces in two models, over k."""

    exact: list[float]
    kronecker: list[float]
    prediction: Prediction | None


class PairEntry(TypedDict):
    """Two models, by their places, and their layers."""

    models: list[int]
    layers: dict[str, LayerPair]


class OverlapFigures(TypedDict):
    """Overlaps of H and its Kronecker form at some k, by layer."""

    k: list[int]
    layers: dict[str, list[float]]


NO_OVERLAPS: OverlapFigures = {"k": [], "layers": {}}
"""Where nothing is published."""


class PointFigure(TypedDict):
    """An overlap between models at one k."""

    k: int
    overlap: float


class AutocorrelationFigures(TypedDict):
    """Over the layers behind the first: the mean, and mean, least and largest ratio."""

    mean_alignment: float
    eigenvalue_ratio: list[float]


class PublishedFigures(TypedDict):
    """Figures of others for the same network and data, to stand beside."""

    network: str
    source: str
    training: str
    precision: float
    eigenvalues: dict[str, Spectra]
    overlap: OverlapFigures
    between: dict[str, PointFigure]
    autocorrelation: AutocorrelationFigures


class DataFacts(TypedDict):
    """The data set."""

    name: str
    source: str
    samples: int
    test_samples: int
    classes: int
    input_shape: list[int]


class NetworkFacts(TypedDict):
    """What all models have in common; ``skipped`` says why layers were left out."""

    name: str
    parameters: int
    layers: list[str]
    skipped: dict[str, str]


class StepTime(TypedDict):
    """Seconds of one step; ``model`` is "" for what is done once for all."""

    model: str
    step: str
    seconds: float


class AnalysisResult(TypedDict):
    """Everything that :func:`hesskern.apps.analyze.analysis.analyze` computes."""

    format: str
    created: str
    command: str | None
    settings: dict[str, Any]
    versions: dict[str, Any]
    data: DataFacts
    network: NetworkFacts
    models: list[ModelEntry]
    pairs: list[PairEntry]
    published: PublishedFigures | None
    warnings: list[str]
    times: list[StepTime]
    seconds: float
