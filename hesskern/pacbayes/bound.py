"""The PAC-Bayes bound: binary kl, its inverse, the terms of the union bound, the prior grid.

Setting: n independent samples, a loss in [0, 1], a prior P fixed before the samples are seen, and
for every posterior Q its expected error e(Q) and the mean over the samples ê(Q).

**Langford-Seeger** (Langford and Seeger 2001; the published form): with probability 1 - delta, for
all Q at once, kl(ê(Q) ‖ e(Q)) <= [KL(Q ‖ P) + log(n / delta)] / (n - 1).

**Maurer** (Maurer 2004, theorem 5; n >= 8): the same with [KL(Q ‖ P) + log(2 sqrt(n) / delta)] / n.

**Choosing the prior's variance.** The bound holds for one P. With a countable family P_j and
weights sum_j w_j <= 1, apply it to each P_j with delta w_j: it then holds for all j at once at
the price of -log w_j. Here w_j = 6 / (pi^2 j^2) for integers j >= 1, so the price is
2 log j + log(pi^2 / 6), once per layer that chooses its own j (the product of such weights sums to
one over all tuples). j = 0 has no weight, hence no bound.

**From draws to ê(Q).** ê(Q) is not computed but estimated by errors of networks drawn from Q. If
X_1..X_N are independent with values in [0, 1] and P-mean mu = E[mean X], then for every t > 0
E exp(t sum X_i) <= prod (1 - mu_i + mu_i e^t) <= (1 - mu + mu e^t)^N, by convexity of exp and
concavity of the logarithm (Hoeffding 1963, theorem 1); Chernoff's method gives
P(mean X <= m) <= exp(-N kl(m ‖ mu)) for m <= mu. Hence mu <= kl^-1(mean X, log(1 / delta') / N)
with probability 1 - delta'; log(2 / delta') is what is published and used here, as if both sides
were needed. The X_i need not be identically distributed, so one may draw an independent network for
every sample and pass: N = T n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.choices import check_counts
from hesskern.pacbayes.divergence import NEAR, excess

__all__ = ["FORMS", "PriorGrid", "bound_rate", "draws_rate", "kl", "kl_inverse"]

FORMS = ("maurer", "langford-seeger")
_BISECTIONS = 64


def kl(q: Tensor | float, p: Tensor | float) -> Tensor:
    """kl(q ‖ p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), float64, elementwise.

    Args:
        q: in [0, 1], any shape.
        p: in [0, 1], broadcast against q.

    Raises:
        ValueError: a value lies outside [0, 1] or is NaN.
    """
    q, p = _double(q), _double(p)
    _check_probabilities("q", q)
    _check_probabilities("p", p)
    return _kl(q, p)


def _kl(q: Tensor, p: Tensor) -> Tensor:
    # q log(q / p) + (1 - q) log((1 - q) / (1 - p)) with p - q + (q - p) = 0 added to it.
    return _term(q, p, p - q) + _term(1 - q, 1 - p, q - p)


def _term(q: Tensor, p: Tensor, difference: Tensor) -> Tensor:
    """q (p / q - 1 - log(p / q)), never negative; p where q is 0.

    ``difference`` is p - q, which 1 - p and 1 - q no longer tell exactly.
    """
    divisor = q.clamp(min=torch.finfo(torch.float64).tiny)
    t, logs = difference / divisor, torch.log(p / divisor)
    # xlogy gives 0 log 0 = 0, and q t may overflow where q is tiny.
    far = difference - torch.special.xlogy(q, p / divisor)
    return torch.where(t.abs() <= NEAR, q * excess(t, logs), far)


def kl_inverse(q: Tensor | float, rate: Tensor | float) -> Tensor:
    """kl^-1(q, rate) = max{p in [q, 1]: kl(q ‖ p) <= rate}, float64, elementwise, differentiable.

    Found by bisection to the last bit, from above: kl(q ‖ result) >= rate unless the result is 1.
    Gradients follow from the implicit function theorem with p = kl^-1(q, rate):
    dp/drate = p (1 - p) / (p - q) and dp/dq = dp/drate (log(p / (1 - p)) - log(q / (1 - q))).

    Args:
        q: in [0, 1], any shape.
        rate: non-negative, broadcast against q.

    Returns:
        float64, the broadcast shape.

    Raises:
        ValueError: q lies outside [0, 1], rate is negative, or one of them is NaN.
    """
    given, limit = torch.broadcast_tensors(_double(q), _double(rate))
    _check_probabilities("q", given)
    if not bool((limit >= 0).all()):
        raise ValueError(f"rate must be non-negative, got {_first(limit, limit >= 0)}")
    result: Tensor = _KlInverse.apply(given, limit)  # type: ignore[no-untyped-call]
    return result


class _KlInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, rate: Tensor) -> Tensor:
        low, high = q.clone(), torch.ones_like(q)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            inside = _kl(q, middle) < rate
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        high = torch.where(rate == 0, q, high)
        ctx.save_for_backward(q, high)
        return high

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, p = ctx.saved_tensors
        tiny = torch.finfo(torch.float64).tiny
        d_rate = torch.where(p < 1, p * (1 - p) / (p - q).clamp(min=tiny), 0.0)
        # Towards q = 0 the slope in q is infinite; at the nearest representable q it is finite.
        inner = q.clamp(torch.finfo(torch.float64).eps, 1 - torch.finfo(torch.float64).eps)
        slope = torch.logit(p.clamp(min=tiny)) - torch.logit(inner)
        d_q = torch.where(p > q, d_rate * slope, 1.0)
        d_q = torch.where(p < 1, d_q, 0.0)
        return grad * d_q, grad * d_rate


def _double(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.tensor(float(value), dtype=torch.float64)


def _check_probabilities(name: str, value: Tensor) -> None:
    good = (value >= 0) & (value <= 1)
    if not bool(good.all()):
        raise ValueError(f"{name} must lie in [0, 1], got {_first(value, good)}")


def _first(value: Tensor, good: Tensor) -> float:
    return float(value[~good].flatten()[0])


@dataclass(frozen=True)
class PriorGrid:
    """The variances a prior may have: lambda_j = c exp(-j / b) for integers j >= 1.

    Attributes:
        c: upper end of the grid.
        b: steps per factor e.
    """

    c: float = 0.1
    b: int = 100

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and self.c > 0):
            raise ValueError(f"c must be positive, got {self.c}")
        check_counts(self, "b")

    def variance(self, j: int) -> float:
        """lambda_j.

        Raises:
            ValueError: j is no integer >= 1.
        """
        _check_index(j)
        return self.c * math.exp(-j / self.b)

    def index(self, variance: float) -> int:
        """The j of a variance on the grid.

        Raises:
            ValueError: the variance is not on the grid, or belongs to j < 1.
        """
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"lambda must be positive, got {variance}")
        j = round(self.b * math.log(self.c / variance))
        if j < 1:
            raise ValueError(
                f"lambda {variance:.6g} is not below c = {self.c}: it belongs to j = {j}, and the "
                "union bound counts integers j >= 1 alone"
            )
        if not math.isclose(self.variance(j), variance, rel_tol=1e-9):
            raise ValueError(
                f"lambda {variance!r} is off the grid c exp(-j/b), c = {self.c}, b = {self.b}; the "
                f"nearest is {self.variance(j)!r} (j = {j})"
            )
        return j

    def nearest(self, variance: float) -> int:
        """The j >= 1 whose variance is nearest to ``variance`` on a logarithmic scale."""
        return max(1, round(self.b * math.log(self.c / variance)))

    def neighbours(self, variance: float) -> tuple[int, ...]:
        """The one or two j >= 1 whose variances enclose ``variance``."""
        exact = self.b * math.log(self.c / variance)
        return tuple(sorted({max(1, math.floor(exact)), max(1, math.ceil(exact))}))

    def price(self, j: int) -> float:
        """Nats of the union bound for choosing j: 2 log j + log(pi^2 / 6).

        Raises:
            ValueError: j is no integer >= 1.
        """
        _check_index(j)
        return 2 * math.log(j) + math.log(math.pi**2 / 6)


def _check_index(j: int) -> None:
    if isinstance(j, bool) or not isinstance(j, int) or j < 1:
        raise ValueError(f"j must be an integer >= 1 (j = 0 is outside the union bound), got {j!r}")


def bound_rate(
    kl_divergence: Tensor | float,
    n: int,
    indices: Iterable[int],
    delta: float,
    form: str = "maurer",
    grid: PriorGrid | None = None,
) -> Tensor:
    """What kl(ê(Q) ‖ e(Q)) stays below with probability 1 - delta (BRE in arXiv 2010.04261).

    Args:
        kl_divergence: KL(Q ‖ P), scalar; gradients flow through it.
        n: number of training samples the prior has not seen.
        indices: the j of every prior variance that was chosen.
        delta: in (0, 1).
        form: "maurer" or "langford-seeger" (the published one).
        grid: the prior grid.

    Returns:
        a float64 scalar.

    Raises:
        ValueError: an argument is out of its range, or a j is below 1.
    """
    grid = grid or PriorGrid()
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    if n < 8:
        raise ValueError(f"n must be at least 8, got {n}")
    _check_confidence("delta", delta)
    divergence = _double(kl_divergence)
    if not bool(divergence >= 0):
        raise ValueError(f"kl_divergence must be non-negative, got {float(divergence)}")
    price = sum(grid.price(j) for j in indices)
    if form == "maurer":
        return (divergence + price + math.log(2 * math.sqrt(n) / delta)) / n
    return (divergence + price + math.log(n / delta)) / (n - 1)


def draws_rate(count: int, delta: float) -> float:
    """log(2 / delta) / count, the rate of the Chernoff step for ``count`` independent draws.

    Raises:
        ValueError: ``count`` is not positive or delta not in (0, 1).
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    _check_confidence("delta_draws", delta)
    return math.log(2 / delta) / count


def _check_confidence(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {value}")
