"""What ``hesskern analyze`` computes: one plain dictionary of numbers, no drawing."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesskern.apps.analyze.result import AnalysisResult, PublishedFigures, StepTime
from hesskern.apps.processes import ONE, Processes
from hesskern.apps.resume import NOWHERE, Resume
from hesskern.choices import check_counts
from hesskern.devices import usable_device
from hesskern.diagnostics import metrics
from hesskern.diagnostics.predictor import predict_overlap
from hesskern.factors.compute import kronecker_factors
from hesskern.factors.result import Factors, LayerFactors
from hesskern.operators.layer_hessian import LayerHessian, layer_hessians
from hesskern.ops.extension import build_info
from hesskern.passes.roots import check_fraction
from hesskern.progress import Progress, reporter
from hesskern.solvers.eigsh import eigsh
from hesskern.version import __version__
from hesskern.zoo import data as datasets
from hesskern.zoo import models, training

__all__ = ["Analysis", "Network", "Settings", "analyze", "plain", "versions"]

FORMAT = "hesskern.analyze/1"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_EIGEN_TOLERANCE = 1e-4
# Rows of the correspondence heat maps and of the factors' spectra that are kept.
_SHOWN = 20
_SINGULAR_VALUES = 4
# Bytes for the Kronecker eigenvectors of one layer of one model when models are compared.
_PAIR_BUDGET = 384 * 2**20
# Samples of the rehearsal.
_FEW = 8


@dataclass(frozen=True)
class Settings:
    """What to look at; the fields are the options of ``hesskern analyze``.

    Attributes:
        data, root, limit: see :func:`hesskern.zoo.data.load`.
        model: see :func:`hesskern.zoo.models.build`.
        checkpoints: files to load instead of training, one model each.
        layers: names or patterns of the layers to look at; None for all.
        top: eigenpairs per layer.
        seed, seeds: the models are trained from seeds ``seed`` ... ``seed + seeds - 1``.
        recipe: see :func:`hesskern.zoo.training.recipe_for`.
        epochs: replaces the recipe's.
        batch_size: samples per batch of the curvature passes.
        tolerance: see :func:`hesskern.layer_hessians`.
    """

    data: str = "digits"
    root: Path | None = None
    limit: int | None = None
    model: str = "f64x2"
    checkpoints: tuple[Path, ...] = ()
    layers: tuple[str, ...] | None = None
    top: int = 50
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    seeds: int = 2
    recipe: str = "quick"
    epochs: int | None = None
    batch_size: int = 512
    tolerance: float = 0.0


@dataclass
class Network:
    """One model under study: trained from a seed, or loaded from a checkpoint."""

    label: str
    model: nn.Module
    seed: int | None = None
    checkpoint: Path | None = None
    history: training.History | None = None


@dataclass(frozen=True)
class Analysis:
    """The numbers (ready for JSON) and the models they belong to."""

    result: AnalysisResult
    networks: list[Network]


@dataclass(frozen=True)
class _Spectrum:
    """What the comparison between models needs of one layer."""

    factors: LayerFactors
    vectors: Tensor


class _Clock:
    """Seconds of every step, and progress with the model's label in front."""

    def __init__(self, progress: bool | Progress) -> None:
        self._report = reporter(progress)
        self.rows: list[StepTime] = []
        self.label = ""

    def __call__(self, description: str, done: int, total: int | None) -> None:
        prefix = f"{self.label}: " if self.label else ""
        self._report(f"{prefix}{description}", done, total)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.rows.append(
            {"model": self.label, "step": name, "seconds": time.perf_counter() - started}
        )


def analyze(
    settings: Settings,
    progress: bool | Progress = False,
    command: str | None = None,
    trained: Callable[[Network], None] | None = None,
    published: PublishedFigures | None = None,
    processes: Processes = ONE,
    resume: Resume = NOWHERE,
) -> Analysis:
    """Trains or loads the models, computes everything the report shows.

    Args:
        settings: what to look at.
        progress: see :func:`hesskern.progress.reporter`.
        command: the command line, for the report.
        trained: called with every model as soon as it is trained or loaded, so that its weights can
            be kept should anything fail later.
        published: figures of the same network and data for the report to put beside.
        processes: share the samples; the first trains, and knows of the training.
        resume: where the state of training and passes is kept.

    Raises:
        ValueError: a setting is wrong; the message names it. Settings, checkpoints and layers are
            looked at before the first model is trained.
    """
    _check(settings)
    machine = versions(settings.device)
    started = time.perf_counter()
    clock = _Clock(progress)
    device, dtype = torch.device(settings.device), _DTYPES[settings.dtype]
    with clock.step("read the data"), processes.section("reading the data"):
        data = datasets.load(settings.data, settings.root, limit=settings.limit)
        test = datasets.load(settings.data, settings.root, train=False)
        data, test = data.to(device, dtype), test.to(device, dtype)
    with clock.step("rehearse"):
        processes.on_first("a rehearsal", lambda: _rehearse(settings, data, test))

    entries, spectra, networks = [], [], []
    skipped: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for network in _networks(settings, data, clock, processes, resume):
            clock.label = network.label
            if trained is not None:
                trained(network)
            layers, spectrum, reasons = _look_at(network, data, settings, clock, processes, resume)
            skipped.update(reasons)
            networks.append(network)
            spectra.append(spectrum)
            entries.append(_describe(network, data, test) | {"layers": layers})
    clock.label = ""
    _keep_common(entries, spectra, skipped)
    with clock.step("compare the models"):
        pairs = [
            {
                "models": [i, j],
                "layers": {
                    name: _compare(spectra[i][name], spectra[j][name], settings.top)
                    for name in spectra[i]
                },
            }
            for i in range(len(spectra))
            for j in range(i + 1, len(spectra))
        ]
    parameters = sum(p.numel() for p in networks[0].model.parameters())
    result = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": asdict(settings),
        "versions": machine,
        "data": {
            "name": data.name,
            "source": data.source,
            "samples": len(data),
            "test_samples": len(test),
            "classes": data.classes,
            "input_shape": data.input_shape,
        },
        "network": {
            "name": settings.model,
            "parameters": parameters,
            "layers": list(spectra[0]),
            "skipped": skipped,
        },
        "models": entries,
        "pairs": pairs,
        "published": published,
        "warnings": list(dict.fromkeys(str(w.message) for w in caught)),
        "times": clock.rows,
        "seconds": time.perf_counter() - started,
    }
    return Analysis(cast("AnalysisResult", plain(result)), networks)


def _check(settings: Settings) -> None:
    if settings.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {settings.dtype!r}")
    check_counts(settings, "top", "seeds", "batch_size")
    if settings.epochs is not None and settings.epochs < 0:
        raise ValueError(f"epochs must not be negative, got {settings.epochs}")
    check_fraction("tolerance", settings.tolerance)
    usable_device(settings.device)


def _build(settings: Settings, data: datasets.Dataset, seed: int) -> nn.Module:
    model = models.build(settings.model, data.input_shape, data.classes, seed)
    return model.to(settings.device, _DTYPES[settings.dtype])


def _recipe(settings: Settings) -> training.Recipe:
    recipe = training.recipe_for(settings.recipe, settings.data)
    return recipe if settings.epochs is None else replace(recipe, epochs=settings.epochs)


def _rehearse(settings: Settings, data: datasets.Dataset, test: datasets.Dataset) -> None:
    """Every step that depends on names, shapes and files, with a few samples, before the work.

    Raises:
        ValueError, NotImplementedError: what the work would end with.
    """
    _recipe(settings)
    for path in settings.checkpoints:
        models.load_checkpoint(_build(settings, data, settings.seed), path)
    model, loss = _build(settings, data, settings.seed), nn.CrossEntropyLoss()
    few = [(data.inputs[:_FEW], data.targets[:_FEW])]
    with warnings.catch_warnings():
        # Of these weights and samples; the work has its own.
        warnings.simplefilter("ignore")
        factors = _factors(model, few, settings, reporter(False), None)
        layer_hessians(model, few, loss, _with_hessians(factors), settings.tolerance)
    training.evaluate(model, replace(test, inputs=test.inputs[:_FEW], targets=test.targets[:_FEW]))


def _factors(
    model: nn.Module,
    batches: Any,
    settings: Settings,
    progress: Progress,
    group: Any,
    checkpoint: Path | None = None,
) -> Factors:
    loss = nn.CrossEntropyLoss()
    how: dict[str, Any] = {"progress": progress, "group": group, "checkpoint": checkpoint}
    factors = kronecker_factors(model, batches, loss, settings.layers, **how)
    if not factors:
        raise ValueError(f"model {settings.model!r} has no supported layer: {factors.skipped}")
    return factors


def _with_hessians(factors: Factors) -> list[str]:
    """The layers that have a Hessian, too: a weight that is also looked up has no block."""
    return [name for name, f in factors.items() if f.tied_to is None]


def _keep_common(
    entries: list[dict[str, Any]], spectra: list[dict[str, _Spectrum]], skipped: dict[str, str]
) -> None:
    """Leaves the layers that all models have numbers for.

    Raises:
        ValueError: there are none.
    """
    common = set(spectra[0]).intersection(*spectra)
    if not common:
        reasons = "; ".join(f"{name!r} {reason}" for name, reason in skipped.items())
        raise ValueError(f"no layer has numbers in all models: {reasons}")
    for entry, spectrum in zip(entries, spectra, strict=True):
        for name in spectrum.keys() - common:
            del spectrum[name], entry["layers"][name]


def _networks(
    settings: Settings,
    data: datasets.Dataset,
    clock: _Clock,
    processes: Processes,
    resume: Resume,
) -> Iterator[Network]:
    """Every model, trained or loaded, one after the other."""
    if settings.checkpoints:
        for path in settings.checkpoints:
            model = _build(settings, data, settings.seed)
            load = partial(models.load_checkpoint, model, path)
            processes.weights(model, f"loading {path}", load)
            yield Network(path.stem, model, checkpoint=path)
        return
    recipe = _recipe(settings)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        model = _build(settings, data, seed)
        clock.label = f"seed {seed}"
        with clock.step("train"):
            train = partial(training.train, model, data, recipe, seed, progress=clock)
            train = partial(train, checkpoint=resume.file(f"{clock.label} training"))
            history = processes.weights(model, "training", train)
        yield Network(f"seed {seed}", model, seed, history=history)


def _describe(network: Network, data: datasets.Dataset, test: datasets.Dataset) -> dict[str, Any]:
    def measured(split: datasets.Dataset) -> dict[str, float]:
        loss, accuracy = training.evaluate(network.model, split)
        return {"loss": loss, "accuracy": accuracy}

    return {
        "label": network.label,
        "seed": network.seed,
        "checkpoint": network.checkpoint,
        "training": network.history.to_dict() if network.history else None,
        "train": measured(data),
        "test": measured(test),
    }


def _look_at(
    network: Network,
    data: datasets.Dataset,
    settings: Settings,
    clock: _Clock,
    processes: Processes,
    resume: Resume,
) -> tuple[dict[str, Any], dict[str, _Spectrum], dict[str, str]]:
    """One model: its layers' numbers, what the comparison needs, and the layers left out."""
    model = network.model
    batches, loss = processes.batches(data, settings.batch_size), nn.CrossEntropyLoss()
    with clock.step("Kronecker factors"):
        file = resume.file(f"{network.label} factors")
        factors = _factors(model, batches, settings, clock, processes.group, file)
    with clock.step("exact layer-wise Hessians"):
        hessians = layer_hessians(
            model,
            batches,
            loss,
            _with_hessians(factors),
            settings.tolerance,
            progress=clock,
            group=processes.group,
            checkpoint=resume.file(f"{network.label} Hessians"),
        )
    entries, spectra, skipped = {}, {}, dict(factors.skipped)
    for name, layer_factors in factors.items():
        if layer_factors.tied_to is not None:
            skipped[name] = f"shares its weight with {layer_factors.tied_to!r}, which looks rows up"
            continue
        if not hessians[name].trace() > 0:
            # Behind dead units: nothing relative to it is defined, and no reason to give up.
            skipped[name] = "has no curvature at these weights: its Hessian is zero"
            continue
        entries[name], spectra[name] = _look_at_layer(
            hessians[name], layer_factors, data.classes, settings, clock
        )
    return entries, spectra, skipped


def _look_at_layer(
    H: LayerHessian, factors: LayerFactors, classes: int, settings: Settings, clock: _Clock
) -> tuple[dict[str, Any], _Spectrum]:
    name, K = factors.name, factors.operator()
    size = H.shape[0]
    k = min(settings.top, size)

    def renamed(_: str, done: int, total: int | None) -> None:
        # All pairs may have converged before the solver has verified them.
        clock(f"top eigenpairs of {name}", min(done, k - 1), k)

    with clock.step(f"Kronecker form of {name}"):
        kronecker = factors.eigsh(k)
    with clock.step(f"top eigenpairs of {name}"):
        with warnings.catch_warnings():
            # The result says by itself which pairs did not converge; the report repeats it.
            warnings.simplefilter("ignore", RuntimeWarning)
            exact = eigsh(H, k, tol=_EIGEN_TOLERANCE, start=K, progress=renamed)
        clock(f"top eigenpairs of {name}", k, k)
    with clock.step(f"comparison of {name}"):
        overlap = metrics.subspace_overlap(exact.vectors, kronecker.vectors)
        rayleigh = (kronecker.vectors * (H @ kronecker.vectors)).sum(0).double()
        captured = rayleigh.cumsum(0) / exact.values.double().cumsum(0)
        singular_values = metrics.singular_values(exact.vectors, factors.weight_shape)
    with clock.step(f"decoupling error of {name}"):
        clock(f"decoupling error of {name}", 0, None)
        decoupling = metrics.decoupling_error(H, K)
        clock(f"decoupling error of {name}", 1, 1)
    entry = {
        "kind": factors.kind,
        "shape": factors.layer_shape,
        "groups": factors.groups,
        "positions": factors.positions,
        "parameters": size,
        "is_exact": H.is_exact,
        "inexact_reason": H.inexact_reason,
        "pruning_error": H.pruning_error,
        "trace": {"exact": H.trace(), "kronecker": K.trace()},
        "eigenvalues": {"exact": exact.values, "kronecker": kronecker.values},
        "residuals": exact.residuals,
        "converged": exact.converged,
        "matvecs": exact.matvecs,
        "overlap": overlap,
        "captured": captured,
        "rank_one": singular_values[:, 0],
        "singular_values": singular_values[:_SHOWN, :_SINGULAR_VALUES],
        "decoupling": asdict(decoupling),
    }
    if factors.groups == 1:
        along = metrics.eigenvector_correspondence(exact.vectors, factors)
        entry["correspondence"] = {
            "output": along.output[:_SHOWN],
            "input": along.input[:_SHOWN],
        }
        entry["autocorrelation"] = asdict(metrics.input_autocorrelation(factors))
        entry["factors"] = {
            "output_eigenvalues": _descending(factors.output_hessian)[:_SHOWN],
            "input_eigenvalues": _descending(factors.input_covariance)[:_SHOWN],
        }
    return entry, _Spectrum(factors, exact.vectors)


def _descending(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix.double()).flip(-1)


def _compare(first: _Spectrum, second: _Spectrum, top: int) -> dict[str, Any]:
    """Overlap of one layer's leading spaces in two models.

    The exact eigenvectors give the curve up to ``top``. The Kronecker ones cost next to nothing and
    carry it on past k = m, where the predictor of arXiv 2010.04261, section 4, puts its peak.
    """
    m, d = first.factors.layer_shape
    size = m * d
    affordable = _PAIR_BUDGET // (size * first.vectors.element_size())
    wanted = max(top, math.ceil(2.25 * m))
    k = max(min(wanted, size, affordable, 600), first.vectors.shape[1])
    curves = [s.factors.eigsh(k).vectors for s in (first, second)]
    entry: dict[str, Any] = {
        "exact": metrics.subspace_overlap(first.vectors, second.vectors),
        "kronecker": metrics.subspace_overlap(*curves),
        "prediction": None,
    }
    if first.factors.groups == 1:
        entry["prediction"] = _prediction(first.factors, second.factors, k)
    return entry


def _prediction(first: LayerFactors, second: LayerFactors, k: int) -> dict[str, Any]:
    found = predict_overlap(first, second, k)
    return {
        "applies": found.applies,
        "squared_cosine": found.squared_cosine,
        "m": found.outputs,
        "curve": found.curve,
        "peak": found.peak,
        "kind": found.kind,
    }


def versions(device: str) -> dict[str, Any]:
    """Versions of the libraries, the machine, and how the kernels were built."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    on_cuda = torch.device(device).type == "cuda"
    return {
        "hesskern": __version__,
        "python": platform.python_version(),
        **libraries,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "build": build_info(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


_SIGNIFICANT = 6


def plain(value: Any) -> Any:
    """Nested containers, tensors, paths and numbers as JSON knows them.

    Floats keep six significant digits; infinite ones and NaN become None.
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT}g}") if math.isfinite(value) else None
    return value
