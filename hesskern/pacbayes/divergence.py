"""x - 1 - log x without cancellation: every term that the KL divergences here are sums of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["NEAR", "excess", "exponential_excess"]

# Below, the plain difference would lose more than four bits; above, the series too many terms.
NEAR = 0.125
# With |s| <= 1/15 where |t| <= 1/8, what follows is below s^16 / 17 < 1e-20.
_TERMS = 8


def excess(t: Tensor, log: Tensor) -> Tensor:
    """t - log(1 + t) [...], float64, elementwise, never negative. Differentiable.

    Near t = 0 both terms agree in all but a few digits, or in all of them. With s = t / (2 + t),
    log(1 + t) = 2 artanh(s), hence

        t - log(1 + t) = s^2 [2 + t - 2 s (1/3 + s^2/5 + s^4/7 + ...)],

    a square times a factor that lies above 1.8 for |t| <= 1/8, however it is rounded.

    Args:
        t: float64, above -1 or at it; given itself, since 1 + t may be rounded.
        log: float64, log(1 + t) as exact as the caller has it; used away from t = 0 alone, where
            t exceeds it by at least .006.
    """
    near = t.abs() <= NEAR
    # Elsewhere the series is not used, and its gradient must not be infinite.
    inner = torch.where(near, t, 0.0)
    s = inner / (2 + inner)
    square = s.square()
    series = torch.zeros_like(s)
    for i in reversed(range(_TERMS)):
        series = series * square + 1 / (2 * i + 3)
    return torch.where(near, square * (2 + inner - 2 * s * series), t - log)


class _ExponentialExcess(torch.autograd.Function):
    """exp(l) - 1 - l, whose derivative is exp(l) - 1."""

    @staticmethod
    def forward(ctx: Any, log: Tensor) -> Tensor:
        grown = torch.expm1(log)
        ctx.save_for_backward(grown)
        return excess(grown, log)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (grown,) = ctx.saved_tensors
        product: Tensor = gradient * grown
        return product


def exponential_excess(log: Tensor) -> Tensor:
    """exp(l) - 1 - l [...], float64, elementwise, never negative. Differentiable once.

    Args:
        log: l, float64.
    """
    found: Tensor = _ExponentialExcess.apply(log)  # type: ignore[no-untyped-call]
    return found
