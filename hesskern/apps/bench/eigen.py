"""Suite ``eigen``: the leading eigenpairs of every layer of F-200^2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from torch import Tensor

from hesskern.apps.bench import peers
from hesskern.apps.bench.cases import Case, f200
from hesskern.apps.bench.contenders import LOSS, Built, Call, Contender, Problem, eager_product
from hesskern.apps.bench.matvec import LAYERS, TOLERANCE
from hesskern.apps.bench.settings import Settings
from hesskern.factors.compute import kronecker_factors
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.progress import Progress
from hesskern.solvers.eigsh import eigsh

__all__ = ["problems"]

_PAIRS = 20
_RESIDUAL = 1e-4
_VALUES_AGREE = 1e-4
# Lanczos without restart takes as many steps as it is told: these reach about the residual.
_LANCZOS_STEPS = 3 * _PAIRS


@dataclass(frozen=True)
class _Pairs:
    """values [k] descending, vectors [P, k], and products with single vectors."""

    values: Tensor
    vectors: Tensor
    products: int


def problems() -> list[Problem]:
    """One problem per layer."""
    return [
        Problem("eigen", layer, partial(_build, layer), _difference, once=True) for layer in LAYERS
    ]


def _difference(values: Tensor, reference: Tensor) -> float:
    """Largest difference of the eigenvalues, relative to the largest one."""
    return float((values - reference).abs().max() / reference[0].abs())


class _Layer:
    """A layer's exact Hessian for residuals, and the ways to find its leading eigenpairs."""

    def __init__(self, case: Case, layer: str, progress: Progress) -> None:
        self.case, self.layer, self.progress = case, layer, progress
        self.parameter = f"{layer}.weight"
        self.exact = layer_hessians(case.model, case.batch, LOSS, layers=[layer])[layer]

    def figures(self, pairs: _Pairs) -> dict[str, float | str]:
        """Products used, and the worst residual by the exact Hessian."""
        vectors = pairs.vectors / pairs.vectors.norm(dim=0)
        residuals = (self.exact @ vectors - vectors * pairs.values).norm(dim=0)
        return {
            "products": pairs.products,
            "residual": float(residuals.max() / pairs.values[0].abs()),
        }

    def ours(self, tolerance: float, started: bool) -> Call:
        """hesskern's solver, the data passes included in what is timed."""

        def call() -> _Pairs:
            case, name = self.case, [self.layer]
            H = layer_hessians(case.model, case.batch, LOSS, layers=name, tolerance=tolerance)
            start = None
            if started:
                factors = kronecker_factors(case.model, case.batch, LOSS, layers=name)
                start = factors[self.layer].operator()
            found = eigsh(H[self.layer], _PAIRS, tol=_RESIDUAL, start=start)
            return _Pairs(found.values, found.vectors, found.matvecs)

        return call

    def arpack(self) -> Call:
        """ARPACK on double backward.

        ARPACK bounds residuals by tol |θ_i|; scaling tol by λ_1 / λ_k asks for no more than the
        others do, ``residual <= 1e-4 λ_1`` for every pair.
        """
        size = self.exact.shape[0]
        vector = torch.empty(size)
        product = eager_product(self.case, self.parameter, vector)
        known = eigsh(self.exact, _PAIRS, tol=_RESIDUAL)
        tolerance = _RESIDUAL * float(known.values[0] / known.values[-1])

        def call() -> _Pairs:
            count = 0

            def multiply(array: np.ndarray) -> np.ndarray:
                nonlocal count
                count += 1
                self.progress(f"ARPACK on {self.layer}, products", count, None)
                vector.copy_(torch.from_numpy(array.reshape(-1)))
                return product().numpy()

            start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
            operator = sparse.LinearOperator((size, size), matvec=multiply, dtype=np.float32)
            values, vectors = sparse.eigsh(operator, _PAIRS, which="LA", tol=tolerance, v0=start)
            order = np.argsort(-values)
            return _Pairs(
                torch.from_numpy(values[order].copy()),
                torch.from_numpy(vectors[:, order].copy()),
                count,
            )

        return call

    def eigenthings(self) -> Call:
        """Lanczos by hessian-eigenthings, a fixed number of steps."""
        steps = min(_LANCZOS_STEPS, self.exact.shape[0])
        name = f"hessian-eigenthings on {self.layer}, products"
        search = peers.eigenthings_lanczos(
            self.case, self.parameter, _PAIRS, steps, lambda done: self.progress(name, done, steps)
        )

        def call() -> _Pairs:
            found = search()
            return _Pairs(found.eigenvalues, found.eigenvectors.T, int(found.iterations))

        return call


def _build(name: str, settings: Settings, progress: Progress) -> Built:
    case = f200(settings)
    layer = _Layer(case, name, progress)

    def ours(label: str, tolerance: float, started: bool, limit: Any) -> Contender:
        return Contender(
            label,
            lambda: layer.ours(tolerance, started),
            read=_values,
            limit=limit,
            figures=layer.figures,
        )

    contenders = [
        ours("hesskern", 0.0, False, None),
        ours("hesskern, start=K", 0.0, True, _VALUES_AGREE),
        *(
            # Pruning moves eigenvalues by no more than its bound, tolerance times the trace.
            ours(
                f"hesskern, tolerance={TOLERANCE:g}{', start=K' * started}",
                TOLERANCE,
                started,
                lambda reference: (
                    _VALUES_AGREE + TOLERANCE * layer.exact.trace() / float(reference[0])
                ),
            )
            for started in (False, True)
        ),
        Contender(
            "ARPACK on autograd's double backward",
            layer.arpack,
            read=_values,
            limit=_VALUES_AGREE,
            figures=layer.figures,
        ),
        Contender(
            "hessian-eigenthings Lanczos",
            layer.eigenthings,
            "hessian-eigenthings",
            "hessian_eigenthings",
            read=_values,
            figures=layer.figures,
        ),
    ]
    title = f"{case.title}: top {_PAIRS} eigenpairs of {name}, residual {_RESIDUAL:g}"
    return title, f"{case.description}; passes over the data included", contenders


def _values(pairs: _Pairs) -> Tensor:
    return pairs.values.double()
