"""Contenders: hesskern and autograd; other packages stand in :mod:`hesskern.apps.bench.peers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.settings import Settings
from hesskern.choices import Output
from hesskern.factors.compute import kronecker_factors
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.progress import Progress

__all__ = [
    "Build",
    "Built",
    "Contender",
    "Problem",
    "compiled_product",
    "eager_product",
    "gradient",
    "hesskern_factors",
    "hesskern_product",
    "kept_graph_product",
    "relative_difference",
]

Call = Callable[[], Any]
LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Contender:
    """One way to solve a problem.

    Attributes:
        name: as shown.
        prepare: what is done once (a pass over the data, a compilation); returns what is timed.
        package: distribution it comes from if that is another one; it may be missing.
        module: what to import of it, so that memory is counted without the package itself.
        read: brings a result into the form that the problem compares; None: not compared.
        limit: what the difference to the reference must not exceed, or a function of the
            reference for bounds that come out of ``prepare``; None: shown only.
        figures: further numbers from a result.
        warm: whether the first call compiles, so that memory is that of the second.
        unit: whether this is the gradient in whose units times are given.
        reference: it runs once, untimed, and all results are compared with its, the subject's too;
            where several are given the first that works counts. None: the subject is the reference.
    """

    name: str
    prepare: Callable[[], Call]
    package: str | None = None
    module: str | None = None
    read: Callable[[Any], Any] | None = None
    limit: float | Callable[[Any], float] | None = None
    figures: Callable[[Any], dict[str, float | str]] | None = None
    warm: bool = False
    unit: bool = False
    reference: bool = False


Built = tuple[str, str, list[Contender]]
"""Title, description, and the contenders, the subject first."""

Build = Callable[[Settings, Progress], Built]


@dataclass(frozen=True)
class Problem:
    """What contenders compete on; the first contender is the subject that ratios refer to.

    Attributes:
        suite, key: its name; ``key`` is unique within the suite.
        build: makes the data, returns title, description and contenders; those that take minutes
            report their progress.
        difference: relative difference of a result to the reference, as ``read`` gives them.
        memory: whether peak memory is measured.
        once: whether contenders that take over ten seconds run only once (the first call counts).
    """

    suite: str
    key: str
    build: Build
    difference: Callable[[Any, Any], float] | None = None
    memory: bool = False
    once: bool = False


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """‖result - reference‖ / ‖reference‖, in float64."""
    expected = reference.double()
    return float((result.double() - expected).norm() / expected.norm())


def gradient(case: Case) -> Contender:
    """The unit: loss and gradient of all parameters on the same batch."""

    def prepare() -> Call:
        parameters = list(case.model.parameters())

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(LOSS(case.model(case.inputs), case.targets), parameters)

        return call

    return Contender("one gradient (loss.backward)", prepare, unit=True)


def hesskern_factors(case: Case, output: Output) -> Call:
    """Kronecker factors of every layer."""
    return lambda: kronecker_factors(case.model, case.batch, LOSS, output=output)


def hesskern_product(case: Case, layer: str, vector: Tensor, tolerance: float) -> Call:
    """H v of one layer from stored samples."""
    H = layer_hessians(case.model, case.batch, LOSS, layers=[layer], tolerance=tolerance)[layer]
    return lambda: H @ vector


def _loss_of_weight(case: Case, name: str) -> tuple[Tensor, Callable[..., Tensor]]:
    """A parameter's value and the loss as a function of it, the inputs and the targets."""
    values = {key: value.detach() for key, value in case.model.named_parameters()}
    weight = values.pop(name)

    def loss(w: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = torch.func.functional_call(case.model, {**values, name: w}, (inputs,))
        return F.cross_entropy(logits, targets)

    return weight, loss


def eager_product(case: Case, parameter: str, vector: Tensor) -> Call:
    """H v by double backward: gradient with ``create_graph``, and its gradient along v."""
    weight = case.model.get_parameter(parameter)
    shaped = vector.reshape(weight.shape)

    def call() -> Tensor:
        loss = LOSS(case.model(case.inputs), case.targets)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(first, weight, shaped)[0].flatten()

    return call


def kept_graph_product(case: Case, parameter: str, vector: Tensor) -> Call:
    """H v by double backward, the gradient's graph made once and kept."""
    weight = case.model.get_parameter(parameter)
    shaped = vector.reshape(weight.shape)
    loss = LOSS(case.model(case.inputs), case.targets)
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    return lambda: torch.autograd.grad(first, weight, shaped, retain_graph=True)[0].flatten()


def compiled_product(case: Case, parameter: str, vector: Tensor) -> Call:
    """H v as ``torch.compile`` of ``torch.func.jvp`` of ``torch.func.grad``."""
    weight, loss = _loss_of_weight(case, parameter)
    shaped = vector.reshape(weight.shape)

    @torch.compile
    def product(w: Tensor, v: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        def slope(point: Tensor) -> Tensor:
            return torch.func.grad(loss)(point, inputs, targets)

        return torch.func.jvp(slope, (w,), (v,))[1]

    def call() -> Tensor:
        with torch.no_grad():
            return product(weight, shaped, case.inputs, case.targets).flatten()

    # Compiling takes far longer than a product; it belongs to what is done once.
    call()
    return call
