"""Norms of a curvature operator H and of its distance from an approximation K, from products."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hesskern.devices import on_host
from hesskern.operators.base import CurvatureOperator
from hesskern.operators.corrected import eigenvalue_corrected
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.operators.layer_hessian import LayerHessian
from hesskern.solvers.subspace import OnItsWay, lengths

__all__ = ["Lanczos", "relative_norms"]

_LANCZOS_STEPS = 60


class Lanczos:
    """Lanczos with full reorthogonalization until the largest absolute Ritz value stands still.

    A norm needs no gap and no multiplicity, so this takes far fewer products than an eigenpair.
    Steps look at no value: what they found is told to :meth:`look`, at once or some steps later,
    and steps that turn out to be too many are forgotten.

    Args:
        start: [P], not zero.

    Attributes:
        basis: [s, P], orthonormal rows.
        products: with the basis, each [P]; one fewer while a product is awaited.
        norm: estimate of the spectral norm, from below, to about 1e-3 once ``done``.
        done: whether it stands still.
    """

    def __init__(self, start: Tensor) -> None:
        self.basis = (start / lengths(start)).unsqueeze(0)
        self.products: list[Tensor] = []
        self.norm = 0.0
        self.done = False
        self._diagonal: list[float] = []
        self._beside: list[float] = []

    @property
    def open(self) -> bool:
        """Whether another step may be of use."""
        return not self.done and len(self.products) < min(_LANCZOS_STEPS, self.basis.shape[1])

    def step(self, product: Tensor) -> Tensor:
        """Takes the product [P] with the last vector of the basis.

        Returns:
            [2] float64, what :meth:`look` wants to know of the step.
        """
        self.products.append(product)
        diagonal = self.basis[-1].double() @ product.double()
        for _ in range(2):
            product = product - self.basis.T @ (self.basis @ product)
        rest = lengths(product)
        following = product / rest.clamp_min(torch.finfo(product.dtype).tiny)
        self.basis = torch.cat([self.basis, following.unsqueeze(0)])
        return torch.stack([diagonal, rest])

    def look(self, diagonal: float, rest: float) -> None:
        """Learns what the first step found that it has not been told of yet."""
        if self.done:
            return
        self._diagonal.append(diagonal)
        previous, self.norm = self.norm, self._largest()
        steps = len(self._diagonal)
        self.done = (
            rest <= 1e-6 * self.norm
            or (steps > 5 and self.norm - previous <= 1e-4 * self.norm)
            or steps == min(_LANCZOS_STEPS, self.basis.shape[1])
        )
        self._beside.append(rest)
        if self.done:
            self.basis, self.products = self.basis[:steps], self.products[:steps]

    def _largest(self) -> float:
        tridiagonal = torch.diag(torch.tensor(self._diagonal, dtype=torch.float64))
        if self._beside:
            beside = torch.tensor(self._beside, dtype=torch.float64)
            tridiagonal += torch.diag(beside, 1) + torch.diag(beside, -1)
        return float(torch.linalg.eigvalsh(tridiagonal).abs().max())


def relative_norms(
    H: CurvatureOperator, K: CurvatureOperator, probes: int, seed: int
) -> tuple[float, float, float]:
    """‖H - K‖_2 / ‖H‖_2, an estimate of ‖H - K‖_F / ‖H‖_F, and its standard error.

    Inside the Krylov spaces of Lanczos, which hold much of the norms, products are known;
    ``probes`` random vectors tell the rest (as in Hutch++, Meyer et al. 2021, applied to the
    square). Where so many span all the rest, the result is exact.

    Args:
        H, K: [P, P] of one dtype on one device.
        probes: random vectors, at least two.
        seed: of Lanczos' start and of the random vectors.

    Raises:
        ValueError: H is zero.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    if isinstance(H, LayerHessian) and isinstance(K, EigenbasisOperator):
        E = eigenvalue_corrected(H, K)
        whole, gap, residual = _run_lanczos(H, [None, K, E], seed)
        spectral = _spectral(whole, gap)
        return spectral, *_projected(H, K, E, residual, probes, generator)
    whole, gap = _run_lanczos(H, [None, K], seed)
    spectral = _spectral(whole, gap)
    outer, inner = (_Rest(run.basis, H, probes, generator) for run in (gap, whole))
    products = H @ torch.cat([outer.vectors, inner.vectors], 1)
    split = outer.vectors.shape[1]
    top, top_error = outer.total(
        torch.stack(gap.products, 1), products[:, :split] - K @ outer.vectors
    )
    bottom, bottom_error = inner.total(torch.stack(whole.products, 1), products[:, split:])
    ratio = (top / bottom) ** 0.5
    relative = ((top_error / top) ** 2 + (bottom_error / bottom) ** 2) ** 0.5 if top > 0 else 0.0
    return spectral, ratio, 0.5 * ratio * relative


def _spectral(whole: Lanczos, gap: Lanczos) -> float:
    if whole.norm == 0:
        raise ValueError("H is zero, so a relative error is not defined")
    return gap.norm / whole.norm


def _run_lanczos(
    H: CurvatureOperator, approximations: Sequence[CurvatureOperator | None], seed: int
) -> list[Lanczos]:
    """Lanczos for H minus each of these, in step: where products run the model, one run serves all.

    On a device the host reads once a step for all of them, when the next step is queued: what is
    found is the same, after one step more.

    Args:
        H: [P, P].
        approximations: [P, P] of H's dtype, on its device; None for zero.
        seed: of the random start, one for all.
    """
    start = _normal(H, 1, torch.Generator().manual_seed(seed))[:, 0]
    runs = [Lanczos(start) for _ in approximations]
    late = 0 if on_host(start) else 1
    found: deque[tuple[list[int], OnItsWay]] = deque()
    while not all(run.done for run in runs):
        running = [i for i, run in enumerate(runs) if run.open]
        if running:
            vectors = torch.stack([runs[i].basis[-1] for i in running], 1)
            numbers = []
            for i, product in zip(running, (H @ vectors).unbind(1), strict=True):
                K = approximations[i]
                numbers.append(
                    runs[i].step(product if K is None else product - K @ runs[i].basis[-1])
                )
            found.append((running, OnItsWay(torch.stack(numbers))))
        if len(found) > late or not running:
            told, values = found.popleft()
            for i, (diagonal, rest) in zip(told, values.awaited().tolist(), strict=True):
                runs[i].look(diagonal, rest)
    return runs


def _projected(
    H: LayerHessian,
    K: EigenbasisOperator,
    E: EigenbasisOperator,
    residual: Lanczos,
    probes: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """The ratio from H's projection E on all matrices with K's eigenvectors, and probes for H - E.

    E has H's diagonal in K's eigenbasis (:func:`hesskern.eigenvalue_corrected`) and is known
    exactly. H - E is orthogonal to E and to K, so that

        ‖H‖²     = ‖H - E‖² + ‖E‖²
        ‖H - K‖² = ‖H - E‖² + ‖E - K‖²

    Only ‖H - E‖² is random, and no term is subtracted: a small distance does not cancel. It
    depends on K's eigenvectors alone, so that forms that share them are compared without noise.

    Args:
        residual: of Lanczos for H - E.
    """
    outside = _Rest(residual.basis, H, probes, generator)
    rest, rest_error = outside.total(
        torch.stack(residual.products, 1), H @ outside.vectors - E @ outside.vectors
    )
    known = E.squared_norm()
    apart = _squared_distance(E, K)
    ratio = ((rest + apart) / (rest + known)) ** 0.5
    # d(ratio²) / d rest = (‖E‖² - ‖E - K‖²) / ‖H‖^4
    slope = abs(known - apart) / (rest + known) ** 2
    return ratio, 0.5 * slope * rest_error / ratio if ratio > 0 else 0.0


def _squared_distance(E: EigenbasisOperator, K: EigenbasisOperator) -> float:
    """‖E - K‖_F² of two operators with the same eigenvectors."""
    pairs = zip(E.eigenbases[2], K.eigenbases[2], strict=True)
    return sum(float((e.double() - s.double()).square().sum()) for e, s in pairs)


class _Rest:
    """Vectors that tell a squared Frobenius norm outside a space.

    Attributes:
        vectors: [P, k] random ones orthogonal to the basis [s, P], or a basis of all the rest.
    """

    def __init__(
        self, basis: Tensor, H: CurvatureOperator, probes: int, generator: torch.Generator
    ) -> None:
        steps, size = basis.shape
        self._complete = size - steps <= probes
        if self._complete:
            self.vectors = torch.linalg.qr(basis.T, mode="complete").Q[:, steps:]
        else:
            noise = _normal(H, probes, generator)
            self.vectors = noise - basis.T @ (basis @ noise)

    def total(self, inside: Tensor, outside: Tensor) -> tuple[float, float]:
        """The squared norm and its standard error.

        Args:
            inside: [P, s] products with the basis.
            outside: [P, k] products with ``vectors``.
        """
        squares = outside.double().square().sum(0)
        known = float(inside.double().square().sum())
        if self._complete:
            return known + float(squares.sum()), 0.0
        return known + float(squares.mean()), float(squares.std() / len(squares) ** 0.5)


def _normal(H: CurvatureOperator, count: int, generator: torch.Generator) -> Tensor:
    """[P, count] standard normal vectors, the same on every device."""
    noise = torch.randn(H.shape[0], count, generator=generator, dtype=torch.float64)
    return noise.to(H.dtype).to(H.device)
