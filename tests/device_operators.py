"""Dense operators on the device that the CPU plays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from played_device import Counts, OnDevice, counting, generators, played
from spectra import symmetric
from torch import Tensor

from hesskern.solvers.result import EigenResult

LA, SA, LM = "LA", "SA", "LM"


class Operator:
    """A dense symmetric matrix on the device; notes how many vectors each product takes."""

    device = played()

    def __init__(self, matrix: Tensor, broken_from: int | None = None, by: float = math.nan):
        self.shape, self.dtype = tuple(matrix.shape), matrix.dtype
        self.matrix = OnDevice(matrix)
        self.products: list[int] = []
        self._broken_from, self._by = broken_from, by

    @property
    def count(self) -> int:
        return sum(self.products)

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products.append(1 if v.dim() == 1 else v.shape[1])
        image = self.matrix @ v
        if self._broken_from is not None and self.count > self._broken_from:
            image[7] = self._by
        return image


@contextmanager
def played_device() -> Iterator[Counts]:
    """Inside, the device's values are out of reach but by copies to the host."""
    played()
    with torch.no_grad(), generators(), counting(strict=True) as counts:
        yield counts


def fetched(result: EigenResult) -> EigenResult:
    """The result on the host."""
    parts = (result.values, result.vectors, result.residuals)
    assert all(isinstance(part, OnDevice) for part in parts)
    return EigenResult(*(part.inner for part in parts), result.converged, result.matvecs)  # type: ignore[attr-defined]


# what is counted


def decaying(dtype: torch.dtype = torch.float64, size: int = 400) -> Tensor:
    return symmetric(0.93 ** torch.arange(size), dtype=dtype)
