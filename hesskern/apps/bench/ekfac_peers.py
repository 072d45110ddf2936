"""Other packages' EKFAC. All imports are inside.

Each fits the weights of the same layers and returns its eigenbases and S in hesskern's
normalization. What a package needs besides stands at its function.
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.apps.bench import language, lm_peers
from hesskern.apps.bench.contenders import Call
from hesskern.apps.bench.language import TextCase
from hesskern.apps.bench.streams import Bases, Stream

__all__ = ["PEERS", "Bergson", "Kronfluence", "Peer"]


@dataclass(frozen=True)
class Peer:
    """A package.

    Attributes:
        name: as shown.
        package, module: as in :class:`hesskern.apps.bench.contenders.Contender`.
        prepare: gives what is timed, for a stream and whether targets are drawn.
        images: whether it takes networks of images.
    """

    name: str
    package: str
    module: str
    prepare: Callable[[Stream, bool], Call]
    images: bool = True


def _curvlinops(stream: Stream, drawn: bool) -> Call:
    """Its operator of the weights alone; language models' logits flattened, as in suite lm."""
    from curvlinops import EKFACLinearOperator, FisherType, KFACType

    prefix, terms = "", 1
    if isinstance(stream.case, TextCase):
        rows = lm_peers.flat(stream.case)
        model, weights, data = rows.model, rows.weights, rows.data
        prefix, terms = "inner.", rows.terms
    else:
        model, data = stream.model, list(stream.batches)
        weights = {name: layer.get_parameter("weight") for name, layer in stream.layers.items()}

    def call() -> Bases:
        operator = EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(weights.values()),
            data,
            check_deterministic=False,
            fisher_type=FisherType.MC if drawn else FisherType.EMPIRICAL,
            kfac_approx=KFACType.EXPAND,
            num_data=stream.samples,
            num_per_example_loss_terms=terms,
        )
        _ = operator.trace
        found: Bases = {}
        for name in weights:
            (values,) = operator._corrected_eigenvalues[prefix + name].values()
            found[name] = (
                operator._gradient_covariances_eigenvectors[prefix + name],
                operator._input_covariances_eigenvectors[prefix + name],
                values,
            )
        return found

    return call


class _Bias(nn.Module):
    """Adds a bias [m] to outputs [..., m], or [N, m, H, W]."""

    def __init__(self, bias: nn.Parameter, channels: bool) -> None:
        super().__init__()
        self.bias, self.channels = bias, channels

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.bias[:, None, None] if self.channels else self.bias)


def _without_biases(stream: Stream) -> tuple[nn.Module, dict[str, str]]:
    """A copy whose layers have no bias, which a module behind them adds; their new names.

    kronfluence would fit biases as a row of the weight.
    """
    if isinstance(stream.case, TextCase):
        model = language.as_linear(stream.case).model
    else:
        model = copy.deepcopy(stream.model)
    named = {}
    for name in stream.names:
        layer: Any = model.get_submodule(name)
        named[name] = name
        if layer.bias is not None:
            bias, layer.bias = layer.bias, None
            pair = nn.Sequential(layer, _Bias(bias, isinstance(layer, nn.Conv2d)))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, pair)
            named[name] = f"{name}.0"
    return model, named


class Kronfluence:
    """Its fit in memory; ``model``, ``task`` and ``factors`` are what its scores need.

    Attributes:
        names: its layers' names by those of the stream.
        factors: what it calls eigenvectors, eigenvalues and lambdas, by its names, then layers'.
    """

    def __init__(self, stream: Stream, drawn: bool) -> None:
        from kronfluence.arguments import FactorArguments
        from kronfluence.module.utils import wrap_tracked_modules
        from kronfluence.task import Task
        from kronfluence.utils.state import State

        model, self.names = _without_biases(stream)
        tracked = list(self.names.values())

        class Fit(Task):  # type: ignore[misc]
            fitting = True

            def compute_train_loss(
                self, batch: Any, model: nn.Module, sample: bool = False
            ) -> Tensor:
                if self.fitting:
                    return stream.root(model, batch, sample)
                return stream.losses(model, batch)

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return stream.losses(model, batch)

            def get_influence_tracked_modules(self) -> list[str]:
                return tracked

        self.task = Fit()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = wrap_tracked_modules(model, self.task)
        self.state = State(cpu=True)
        self.arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=not drawn)
        self.factors: dict[str, Any] = {}
        self._stream = stream

    def fit(self) -> None:
        """Covariances, their eigenvectors (in float64, its default) and lambdas."""
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
        from kronfluence.factor.eigen import (
            fit_lambda_matrices_with_loader,
            perform_eigendecomposition,
        )

        self.task.fitting = True
        settings = (self.model, self.state, self.task, self._stream.batches, self.arguments)
        _, found = fit_covariance_matrices_with_loader(*settings, disable_tqdm=True)
        eigen = perform_eigendecomposition(
            found, self.model, self.state, self.arguments, disable_tqdm=True
        )
        del found
        _, values = fit_lambda_matrices_with_loader(*settings, eigen, disable_tqdm=True)
        self.factors = {**eigen, **values}
        self.task.fitting = False

    def bases(self) -> Bases:
        """The fit in hesskern's normalization."""
        from kronfluence.utils.constants import (
            ACTIVATION_EIGENVECTORS_NAME,
            GRADIENT_EIGENVECTORS_NAME,
            LAMBDA_MATRIX_NAME,
        )

        return {
            name: (
                self.factors[GRADIENT_EIGENVECTORS_NAME][theirs],
                self.factors[ACTIVATION_EIGENVECTORS_NAME][theirs],
                self.factors[LAMBDA_MATRIX_NAME][theirs] / self._stream.samples,
            )
            for name, theirs in self.names.items()
        }


def _kronfluence(stream: Stream, drawn: bool) -> Call:
    """Biases left out by :func:`_without_biases`."""
    fitted = Kronfluence(stream, drawn)

    def call() -> Bases:
        fitted.fit()
        return fitted.bases()

    return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bergson's log on standard output and its bars on standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class Bergson:
    """Its fit on the native model, by the collectors of its own pipeline.

    It writes eigenvectors and corrections to files, here in a temporary folder. Language models
    alone, as it takes inputs [N, T, d].
    """

    def __init__(self, stream: Stream, drawn: bool) -> None:
        self.model = lm_peers.embeddings_alone(stream.model)
        self._stream, self._drawn = stream, drawn
        self._names = set(stream.names)

    def fit(self) -> Bases:
        """Covariances, their eigenvectors (in float64), corrections."""
        with language.without_torchvision():
            from bergson.hessians.eigenvectors import LambdaCollector, eigendecompose_owned
            from bergson.hessians.kfac import CovarianceCollector
        stream = self._stream
        with _quiet(), tempfile.TemporaryDirectory(prefix="hesskern-bench-") as folder:
            covariances = CovarianceCollector(
                model=self.model, target_modules=self._names, dtype=torch.float32, path=folder
            )
            self._collect(covariances)

            def decomposed(sums: dict[str, Tensor], shapes: Any, kind: str) -> dict[str, Tensor]:
                vectors, _ = eigendecompose_owned(
                    sums,
                    shapes,
                    None,
                    stream.samples,
                    str(Path(folder) / f"eigen_{kind}_sharded"),
                    torch.float32,
                )
                return vectors

            inputs = decomposed(covariances.A_cov_dict, covariances.A_shapes, "activation")
            outputs = decomposed(covariances.S_cov_dict, covariances.S_shapes, "gradient")
            corrections = LambdaCollector(
                model=self.model,
                target_modules=self._names,
                path=folder,
                num_documents=stream.samples,
                eigenvectors=(inputs, outputs),
            )
            self._collect(corrections)
            # It clears them once they are written.
            values = {
                name: total / stream.samples
                for name, total in corrections.eigenvalue_corrections.items()
            }
            corrections.teardown()
        return {name: (outputs[name], inputs[name], values[name]) for name in stream.names}

    def _collect(self, collector: Any) -> None:
        stream = self._stream
        with collector:
            for batch in stream.batches:
                collector.with_batch(batch["attention_mask"].bool())
                stream.root(self.model, batch, self._drawn).backward()
                self.model.zero_grad()


def _bergson(stream: Stream, drawn: bool) -> Call:
    """See :class:`Bergson`."""
    return Bergson(stream, drawn).fit


PEERS = (
    Peer("curvlinops EKFAC", "curvlinops-for-pytorch", "curvlinops", _curvlinops),
    Peer("kronfluence", "kronfluence", "kronfluence.factor.eigen", _kronfluence),
    Peer("bergson", "bergson", "bergson.hessians.eigenvectors", _bergson, images=False),
)
