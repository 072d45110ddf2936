"""The whole spectrum of an operator from products alone: density and trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.parallel.ranks import section_of
from hesskern.progress import Progress, reporter
from hesskern.solvers.alike import agree_alike, ranks_of
from hesskern.solvers.subspace import SymmetricOperator, on_the_host

__all__ = ["SpectralDensity", "TraceEstimate", "hutchpp_trace", "spectral_density"]


@dataclass(frozen=True)
class SpectralDensity:
    """Gauss quadrature of the spectral density: sums of w f(theta) approximate tr f(H) / P.

    Attributes:
        size: P.
        nodes: [probes, steps] float64, Ritz values theta; runs that ended early repeat nodes of
            weight zero.
        weights: [probes, steps] float64, each row sums to one.
    """

    size: int
    nodes: Tensor
    weights: Tensor

    def mean(self, power: int = 1) -> float:
        """Estimate of tr(H^power) / P."""
        return float((self.weights * self.nodes**power).sum(1).mean())

    def above(self, threshold: float) -> float:
        """Estimate of the number of eigenvalues above ``threshold``."""
        return float((self.weights * (self.nodes > threshold)).sum(1).mean()) * self.size

    def on(self, grid: Tensor, width: float) -> Tensor:
        """The density, smoothed with a Gaussian, at points.

        Args:
            grid: [g] points.
            width: standard deviation of the Gaussian, positive.

        Returns:
            [g] float64; integrates to one.
        """
        if not width > 0:
            raise ValueError(f"width must be positive, got {width!r}")
        distance = (grid.double().cpu()[:, None, None] - self.nodes) / width
        bumps = torch.exp(-0.5 * distance**2) / (width * math.sqrt(2 * math.pi))
        return (bumps * self.weights).sum(2).mean(1)


def spectral_density(
    H: SymmetricOperator,
    steps: int = 80,
    probes: int = 8,
    seed: int = 0,
    progress: bool | Progress = False,
    group: Any = None,
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    All probes run in step, so that each step is one product with a block [P, probes]; the basis is
    kept orthogonal in full. With ``steps`` >= P a probe's quadrature is exact. On a device the host
    reads once, at the end.

    Args:
        H: [P, P], anything with ``shape``, ``dtype``, ``device`` and ``H @ v``.
        steps: Lanczos steps; polynomials up to degree 2 steps - 1 are integrated exactly.
        probes: random sign vectors.
        seed: of the random vectors.
        progress: True for a bar, or a callback.
        group: ranks of torch.distributed that all call this, as for :func:`hesskern.eigsh`.

    Raises:
        ValueError: ``steps`` or ``probes`` is not positive.
        RankError: with a group, ranks have other arguments or come to other bits, or another rank
            has failed.
    """
    ranks, what = ranks_of(group, H), "spectral density"
    with section_of(ranks, what):
        for name, value in (("steps", steps), ("probes", probes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        report = reporter(progress)
        if ranks is not None:
            report = ranks.watching(what, report)
            agree_alike(ranks, what, {**_facts(H, seed), "steps": steps, "probes": probes})
        size = int(H.shape[0])
        steps = min(steps, size)
        vectors = _signs(H, probes, seed) / math.sqrt(size)
        # [probes, steps, P], so that a probe's basis is contiguous.
        basis = torch.zeros(probes, steps, size, dtype=H.dtype, device=H.device)
        # Diagonals of the probes' tridiagonal matrices, and what stands beside them.
        bands = torch.zeros(2, probes, steps, dtype=torch.float64, device=H.device)
        diagonal, beside = bands.unbind(0)
        alive = torch.ones(probes, dtype=torch.bool, device=H.device)
        for step in range(steps):
            basis[:, step] = vectors.T
            images = (H @ vectors).T.contiguous()
            diagonal[:, step] = (images * basis[:, step]).sum(1, dtype=torch.float64)
            rest = images
            for _ in range(2):
                known = basis[:, : step + 1]
                along = torch.matmul(known, rest.unsqueeze(2))
                rest = rest - torch.matmul(along.transpose(1, 2), known).squeeze(1)
            lengths = torch.linalg.vector_norm(rest, dim=1, dtype=torch.float64)
            scale = diagonal[:, : step + 1].abs().amax(1) + beside[:, : step + 1].amax(1)
            # An invariant space ends a probe: what is left is rounding.
            alive &= lengths > 1e3 * torch.finfo(H.dtype).eps * scale
            beside[:, step] = torch.where(alive, lengths, 0.0)
            safe = torch.where(alive, lengths, 1.0).to(rest)
            vectors = torch.where(alive[:, None], rest / safe[:, None], 0.0).T
            vectors = vectors.contiguous()
            report("spectral density", step + 1, steps)
        diagonal, beside = on_the_host(bands).unbind(0)
        tridiagonal = torch.diag_embed(diagonal)
        tridiagonal += torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
        nodes, small = torch.linalg.eigh(tridiagonal)
        agree_alike(ranks, what, {}, nodes=nodes, weights=small[:, 0])
        return SpectralDensity(size, nodes, small[:, 0].square())


@dataclass(frozen=True)
class TraceEstimate:
    """A trace and the standard error of its random part; 0 where nothing was left to chance."""

    value: float
    error: float


def hutchpp_trace(
    H: SymmetricOperator, products: int = 60, seed: int = 0, group: Any = None
) -> TraceEstimate:
    """tr(H) by Hutch++ (Meyer, Musco, Musco & Woodruff 2021).

    A third of the products finds a space that holds the large eigenvalues, a third takes the trace
    on it exactly, and a third estimates the rest with random sign vectors. Each third is one block;
    on a device the host reads once.

    Args:
        H: [P, P], anything with ``shape``, ``dtype``, ``device`` and ``H @ v``.
        products: with single vectors, at least 6.
        seed: of the random vectors.
        group: ranks of torch.distributed that all call this, as for :func:`hesskern.eigsh`.

    Raises:
        ValueError: ``products`` is less than 6.
        RankError: with a group, ranks have other arguments or come to other bits, or another rank
            has failed.
    """
    ranks, what = ranks_of(group, H), "the trace by Hutch++"
    with section_of(ranks, what):
        if isinstance(products, bool) or not isinstance(products, int) or products < 6:
            raise ValueError(f"products must be an integer of at least 6, got {products!r}")
        if ranks is not None:
            agree_alike(ranks, what, {**_facts(H, seed), "products": products})
        size, third = int(H.shape[0]), products // 3
        if third >= size:
            eye = torch.eye(size, dtype=H.dtype, device=H.device)
            return TraceEstimate(float(on_the_host((H @ eye).diagonal().double().sum())), 0.0)
        signs = _signs(H, 2 * third, seed)
        basis = torch.linalg.qr(H @ signs[:, :third].contiguous()).Q
        inside = (basis * (H @ basis)).sum(dtype=torch.float64)
        rest = signs[:, third:]
        rest = rest - basis @ (basis.T @ rest)
        values = (rest * (H @ rest.contiguous())).sum(0, dtype=torch.float64)
        found = on_the_host(torch.stack([inside, values.mean(), values.std()]))
        agree_alike(ranks, what, {}, found=found)
        inside_it, mean, deviation = found.tolist()
        return TraceEstimate(inside_it + mean, deviation / math.sqrt(third))


def _facts(H: SymmetricOperator, seed: int) -> dict[str, Any]:
    """What all ranks must have alike."""
    return {"P": int(H.shape[0]), "dtype": str(H.dtype), "seed": seed}


def _signs(H: SymmetricOperator, count: int, seed: int) -> Tensor:
    """[P, count] random signs, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (int(H.shape[0]), count), generator=generator)
    return (2 * bits - 1).to(H.dtype).to(H.device)
