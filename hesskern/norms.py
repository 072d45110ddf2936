"""Norms of a curvature operator H and of its distance from an approximation K, from products."""

from __future__ import annotations

import torch
from torch import Tensor

from hesskern.layer_hessian import LayerHessian
from hesskern.operators import CurvatureOperator, KroneckerOperator

__all__ = ["Lanczos", "relative_frobenius", "run_lanczos"]

_LANCZOS_STEPS = 60


class Lanczos:
    """Lanczos with full reorthogonalization until the largest absolute Ritz value stands still.

    A norm needs no gap and no multiplicity, so this takes far fewer products than an eigenpair.

    Args:
        start: [P], not zero.

    Attributes:
        basis: [s, P], orthonormal rows.
        products: with the basis, each [P]; one fewer while a product is awaited.
        norm: estimate of the spectral norm, from below, to about 1e-3 once ``done``.
        done: whether it stands still.
    """

    def __init__(self, start: Tensor) -> None:
        self.basis = (start / start.norm()).unsqueeze(0)
        self.products: list[Tensor] = []
        self.norm = 0.0
        self.done = False
        self._diagonal: list[float] = []
        self._beside: list[float] = []

    def step(self, product: Tensor) -> None:
        """Takes the product [P] with the last vector of the basis."""
        self.products.append(product)
        self._diagonal.append(float(self.basis[-1].double() @ product.double()))
        previous, self.norm = self.norm, self._largest()
        for _ in range(2):
            product = product - self.basis.T @ (self.basis @ product)
        rest, steps = float(product.norm()), len(self._diagonal)
        self.done = (
            rest <= 1e-6 * self.norm
            or (steps > 5 and self.norm - previous <= 1e-4 * self.norm)
            or steps == min(_LANCZOS_STEPS, len(product))
        )
        if not self.done:
            self._beside.append(rest)
            self.basis = torch.cat([self.basis, (product / rest).unsqueeze(0)])

    def _largest(self) -> float:
        tridiagonal = torch.diag(torch.tensor(self._diagonal, dtype=torch.float64))
        if self._beside:
            beside = torch.tensor(self._beside, dtype=torch.float64)
            tridiagonal += torch.diag(beside, 1) + torch.diag(beside, -1)
        return float(torch.linalg.eigvalsh(tridiagonal).abs().max())


def run_lanczos(H: CurvatureOperator, K: CurvatureOperator, seed: int) -> tuple[Lanczos, Lanczos]:
    """Lanczos for H and for H - K, in step: where products run the model, one run serves both.

    Args:
        H, K: [P, P] of one dtype on one device.
        seed: of the random start.
    """
    start = _normal(H, 1, torch.Generator().manual_seed(seed))[:, 0]
    whole, gap = Lanczos(start), Lanczos(start)
    running = [whole, gap]
    while running:
        vectors = torch.stack([run.basis[-1] for run in running], 1)
        for run, product in zip(running, (H @ vectors).unbind(1), strict=True):
            run.step(product if run is whole else product - K @ run.basis[-1])
        running = [run for run in running if not run.done]
    return whole, gap


def relative_frobenius(
    H: CurvatureOperator,
    K: CurvatureOperator,
    whole: Lanczos,
    gap: Lanczos,
    probes: int,
    seed: int,
) -> tuple[float, float]:
    """Estimate of ‖H - K‖_F / ‖H‖_F and its standard error; H is not zero.

    Inside the Krylov spaces of ``whole`` and ``gap``, which hold much of the norms, products are
    known; ``probes`` random vectors tell the rest (as in Hutch++, Meyer et al. 2021, applied to the
    square). Where so many span all the rest, the result is exact.

    Args:
        H, K: [P, P] of one dtype on one device.
        whole, gap: from :func:`run_lanczos`.
        probes: random vectors, at least two.
        seed: of the random vectors.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    if isinstance(H, LayerHessian) and isinstance(K, KroneckerOperator):
        return _projected(H, K, gap, probes, generator)
    outer, inner = (_Rest(run.basis, H, probes, generator) for run in (gap, whole))
    products = H @ torch.cat([outer.vectors, inner.vectors], 1)
    split = outer.vectors.shape[1]
    top, top_error = outer.total(
        torch.stack(gap.products, 1), products[:, :split] - K @ outer.vectors
    )
    bottom, bottom_error = inner.total(torch.stack(whole.products, 1), products[:, split:])
    ratio = (top / bottom) ** 0.5
    relative = ((top_error / top) ** 2 + (bottom_error / bottom) ** 2) ** 0.5 if top > 0 else 0.0
    return ratio, 0.5 * ratio * relative


def _projected(
    H: LayerHessian, K: KroneckerOperator, gap: Lanczos, probes: int, generator: torch.Generator
) -> tuple[float, float]:
    """The ratio from H's projection on K, and probes for the rest alone.

    With beta = <H, K> / ‖K‖², both exact, H - beta K is orthogonal to K, so that

        ‖H‖²     = ‖H - beta K‖² + beta² ‖K‖²
        ‖H - K‖² = ‖H - beta K‖² + (1 - beta)² ‖K‖²

    Only ‖H - beta K‖² is random, and no term is subtracted: a small distance does not cancel.
    """
    known = K.squared_norm()
    beta = H.inner(K) / known if known > 0 else 0.0
    outside = _Rest(gap.basis, H, probes, generator)
    rest, rest_error = outside.total(
        torch.stack(gap.products, 1) + (1 - beta) * (K @ gap.basis.T),
        H @ outside.vectors - beta * (K @ outside.vectors),
    )
    distance, whole = rest + (1 - beta) ** 2 * known, rest + beta**2 * known
    ratio = (distance / whole) ** 0.5
    # d(ratio²) / d rest = (2 beta - 1) ‖K‖² / ‖H‖^4
    slope = abs(2 * beta - 1) * known / whole**2
    return ratio, 0.5 * slope * rest_error / ratio if ratio > 0 else 0.0


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
