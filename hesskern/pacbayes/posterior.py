"""Gaussian posteriors that are diagonal in a Kronecker basis: KL divergence and draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesskern import ops
from hesskern.pacbayes.divergence import excess
from hesskern.pacbayes.slots import Slot

__all__ = [
    "ExampleDraw",
    "GroupDraw",
    "LayerPosterior",
    "draws_of",
    "eigenbasis",
    "gaussian_kl",
    "gaussian_kl_parts",
    "spread_out",
]


def gaussian_kl(
    mean: Tensor, prior_mean: Tensor, variance: Tensor, prior_variance: Tensor | float
) -> Tensor:
    """KL(N(w, Sigma) ‖ N(w0, lambda I)) for Sigma with eigenvalues s, in any orthonormal basis.

    1/2 [sum(s) / lambda + ‖w - w0‖^2 / lambda - D + D log lambda - sum(log s)], float64, never
    negative: the sum of :func:`gaussian_kl_parts`. Differentiable.

    Args:
        mean, prior_mean: one shape, D entries.
        variance: D eigenvalues, any shape.
        prior_variance: lambda, scalar.
    """
    of_mean, of_variance = gaussian_kl_parts(mean, prior_mean, variance, prior_variance)
    return of_mean + of_variance


def gaussian_kl_parts(
    mean: Tensor, prior_mean: Tensor, variance: Tensor, prior_variance: Tensor | float
) -> tuple[Tensor, Tensor]:
    """What the mean and what the variances cost, both float64 scalars and never negative.

    1/2 ‖w - w0‖^2 / lambda, and 1/2 sum of s / lambda - 1 - log(s / lambda), term by term without
    cancellation. Arguments as for :func:`gaussian_kl`.
    """
    s, scale = variance.double(), prior_variance
    if isinstance(scale, Tensor):
        scale = scale.double()
    spread = excess((s - scale) / scale, torch.log(s / scale)).sum()
    moved = (mean.double() - prior_mean.double()).square().sum() / scale
    return 0.5 * moved, 0.5 * spread


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [d], clamped at zero, and eigenvectors [d, d] in float64, largest first."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0).clamp(min=0), vectors.flip(1).contiguous()


@dataclass(frozen=True, eq=False)
class LayerPosterior:
    """Q and P of one layer: vec(W) ~ N(mean, (U (x) V) diag(variance) (U (x) V)^T), row-major.

    Attributes:
        per_example: see :class:`hesskern.pacbayes.slots.Slot`.
        mean, prior_mean: [m, d], the bias as last column where the layer has one.
        variance: [m, d], in the basis U (x) V.
        U: [m, m] orthogonal, float64; None for the standard basis.
        V: [d, d] orthogonal, float64; None for the standard basis.
        index: j of the prior variance.
    """

    per_example: bool
    mean: Tensor
    prior_mean: Tensor
    variance: Tensor
    U: Tensor | None
    V: Tensor | None
    index: int

    def to(self, device: torch.device) -> LayerPosterior:
        """The same on another device."""
        return replace(
            self,
            mean=self.mean.to(device),
            prior_mean=self.prior_mean.to(device),
            variance=self.variance.to(device),
            U=None if self.U is None else self.U.to(device),
            V=None if self.V is None else self.V.to(device),
        )

    def kl(self, prior_variance: float) -> float:
        """KL(Q ‖ P) of this layer, in float64, never negative.

        Raises:
            ValueError: a variance is not positive, or a value not finite.
        """
        return sum(self.kl_parts(prior_variance))

    def kl_parts(self, prior_variance: float) -> tuple[float, float]:
        """What the mean and what the variances contribute to :meth:`kl`.

        Raises:
            ValueError: as :meth:`kl`.
        """
        if not bool((self.variance > 0).all()):
            raise ValueError(
                f"variance must be positive everywhere, its minimum is {float(self.variance.min())}"
            )
        of_mean, of_variance = (
            float(part)
            for part in gaussian_kl_parts(self.mean, self.prior_mean, self.variance, prior_variance)
        )
        if not math.isfinite(of_mean + of_variance):
            raise ValueError(f"KL divergence must be finite, got {of_mean + of_variance}")
        return of_mean, of_variance

    def orthogonality_error(self) -> float:
        """The larger of ‖U^T U - I‖_F and ‖V^T V - I‖_F; 0 in the standard basis."""
        error = 0.0
        for basis in (self.U, self.V):
            if basis is not None:
                B = basis.double()
                identity = torch.eye(B.shape[1], dtype=torch.float64, device=B.device)
                error = max(error, float(torch.linalg.matrix_norm(B.T @ B - identity)))
        return error

    def sample(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """One weight [m, d]: mean + U (sqrt(s) . noise) V^T."""
        noise = torch.randn(
            self.mean.shape, generator=generator, dtype=dtype, device=self.mean.device
        )
        return self.mean.to(dtype) + rotated_back(
            self.variance.to(dtype).sqrt() * noise, self.U, self.V
        )


def rotated_back(coordinates: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """U X V^T for X [m, d]; None stands for the identity."""
    if U is not None and V is not None:
        return ops.from_eigenbasis(U.to(coordinates.dtype), V.to(coordinates.dtype), coordinates)
    if U is not None:
        return U.to(coordinates.dtype) @ coordinates
    if V is not None:
        return coordinates @ V.to(coordinates.dtype).T
    return coordinates


class ExampleDraw:
    """A layer of which every example sees its own, independent weight.

    For rows x and W ~ Q the outputs W x of different examples are independent Gaussians,
    W x = mean x + U (sqrt(s (V^T x)^2) . noise) with noise [m] standard normal: entry i of
    U^T (W - mean) x is sum_j xi_ij (V^T x)_j with independent xi_ij of variance s_ij. Drawing these
    m numbers per example is the same as drawing a whole network per example, as long as the layer
    is used once (local reparametrization, Kingma et al. 2015, in the basis U (x) V).
    """

    def __init__(
        self, slot: Slot, layer: LayerPosterior, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        self._slot, self._generator = slot, generator
        m, d = layer.mean.shape
        self._mean_t = layer.mean.to(dtype).T.contiguous()
        # Equal variances behind the leading rows or columns need no coordinates of their own there.
        self._rows = m if layer.U is None else _distinct(layer.variance)
        self._columns = d if layer.V is None else _distinct(layer.variance.T)
        kept = layer.variance[: self._rows + 1, : self._columns + 1]
        self._variance_t = kept.to(dtype).T.contiguous()
        self._U = None if layer.U is None else layer.U[:, : self._rows].to(dtype).contiguous()
        self._V = None if layer.V is None else layer.V[:, : self._columns].to(dtype).contiguous()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, m] of W x, and its deviations [N, rows], for x [N, d].

        The deviations are those along U's leading columns and, if these are not all, the one that
        all other directions share.
        """
        extended = self._slot.extended(x)
        squares = (extended if self._V is None else extended @ self._V).square()
        if len(self._variance_t) > self._columns:
            rest = extended.square().sum(1, keepdim=True) - squares.sum(1, keepdim=True)
            squares = torch.cat([squares, rest.clamp(min=0)], 1)
        return extended @ self._mean_t, (squares @ self._variance_t).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """W x for x [N, d], every row with a W of its own."""
        # The first layer sees the same samples in every pass: its moments are computed once. The
        # input is kept, so its memory cannot belong to another tensor meanwhile.
        if self._last is None or not _same_memory(self._last[0], x):
            self._last = (x, *self.moments(x)) if self._slot.reads_data else None
        _, mean, deviation = self._last or (x, *self.moments(x))
        return spread_out(mean, deviation, self._U, self._generator)

    def renew(self) -> None:
        """Nothing to do: every call draws anew."""


def spread_out(
    mean: Tensor, deviation: Tensor, U: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Mean [N, m] plus normal noise, independent along U's columns and across rows.

    ``deviation`` is [N, r] for r columns of U, or [N, r + 1] with the deviation of the whole
    complement last: isotropic noise g, of which the components along U are rescaled.
    """
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    if U is None:
        return mean + deviation * noise
    if U.shape[1] == mean.shape[1]:
        return torch.addmm(mean, deviation * noise, U.T)
    rest = deviation[:, -1:]
    drawn = mean + rest * noise
    if U.shape[1] == 0:
        return drawn
    return torch.addmm(drawn, (deviation[:, :-1] - rest) * (noise @ U), U.T)


def _distinct(variance: Tensor) -> int:
    """Leading rows up to which the rows of [r, q] differ; all of them if that saves nothing."""
    differing = (variance != variance[-1:]).any(1).nonzero()
    count = int(differing[-1]) + 1 if len(differing) else 0
    return count if 2 * count < len(variance) else len(variance)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class GroupDraw:
    """A layer that keeps one drawn weight until it is renewed: one network per group of examples.

    For layers whose weight meets an example more than once (convolutions, sequences, reuse).
    """

    def __init__(
        self, slot: Slot, layer: LayerPosterior, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        self._slot, self._layer = slot, layer
        self._generator, self._dtype = generator, dtype
        self._weight: Tensor | None = None

    def renew(self) -> None:
        """The next call draws a new weight."""
        self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for x [N, ...] with the weight that is kept."""
        if self._weight is None:
            self._weight = self._layer.sample(self._generator, self._dtype)
        return self._slot.apply(x, self._weight)


def draws_of(
    slots: Mapping[str, Slot],
    layers: Mapping[str, LayerPosterior],
    generator: torch.Generator,
    dtype: torch.dtype,
    whole_networks: bool = False,
) -> dict[str, Any]:
    """The replacement of every layer's forward, by name: independent per example where possible."""
    return {
        name: (ExampleDraw if layer.per_example and not whole_networks else GroupDraw)(
            slots[name], layer, generator, dtype
        )
        for name, layer in layers.items()
    }
