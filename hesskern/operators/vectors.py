"""Vectors of several layers: whether they are finite, random ones; matrices that are symmetric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hesskern.devices import on_host
from hesskern.operators.damping import said
from hesskern.ops import foreach

__all__ = ["check_symmetric", "draws", "require_finite"]

# Of the largest entry, what entries (i, j) and (j, i) may differ by: sums of float32 numbers in
# another order. Other dtypes have few digits.
_ALIKE = {torch.float64: 1e-10, torch.float32: 1e-4}
_ALIKE_NARROW = 0.05


def check_symmetric(letter: str, factor: Tensor) -> None:
    """Raises ValueError where a factor [d, d] or [g, d, d] is not symmetric up to rounding."""
    if not factor.numel() or factor.is_meta:
        return
    off, largest = (factor - factor.mT).abs().max(), factor.abs().max()
    # What is not finite is said where the factor is decomposed.
    if bool(off > _ALIKE.get(factor.dtype, _ALIKE_NARROW) * largest):
        raise ValueError(
            f"{letter} must be symmetric, but entries (i, j) and (j, i) differ by up to "
            f"{float(off):.3g} (largest entry {float(largest):.3g})"
        )


def require_finite(blocks: Sequence[Tensor], names: Sequence[str | None]) -> None:
    """Raises ValueError where vectors hold NaN or Inf, with the layer's name."""
    kept = [i for i, block in enumerate(blocks) if block.numel() > 0]
    # One NaN or Inf is enough for a sum to be none either, and a sum is read faster; one that
    # overflows says nothing.
    if not kept or all(math.isfinite(blocks[i].sum()) for i in kept if on_host(blocks[i])):
        kept = [i for i in kept if not on_host(blocks[i])]
    if not kept:
        return
    flags, order = foreach.are_finite([blocks[i] for i in kept])
    for flag, i in zip(torch.cat(flags).tolist(), order, strict=True):
        if not flag:
            name = names[kept[i]]
            where = "" if name is None else f"those of {said(name)} "
            raise ValueError(f"vectors must be finite, but {where}hold NaN or Inf")


def draws(n: int, scales: Sequence[Tensor], generator: Generator | None) -> list[Tensor]:
    """Standard normal draws times scales, one scale after the other.

    Args:
        n: number of draws.
        scales: each [r, q].
        generator: on any device; None for torch's own on the scales' device.

    Returns:
        per scale [n, r, q], on its device.

    Raises:
        TypeError, ValueError: ``n`` is no number >= 0; ``generator`` is none.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    found = []
    for scale in scales:
        device = scale.device if generator is None else generator.device
        z = torch.randn(n, *scale.shape, dtype=scale.dtype, device=device, generator=generator)
        found.append(z.to(scale.device).mul_(scale))
    return found
