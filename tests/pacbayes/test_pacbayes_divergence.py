"""KL divergences near zero: no cancellation, never negative, in float32 and float64."""

import math
from fractions import Fraction

import pytest
import torch

from hesskern.pacbayes.bound import bound_rate, kl, kl_inverse
from hesskern.pacbayes.divergence import excess
from hesskern.pacbayes.posterior import LayerPosterior, gaussian_kl
from hesskern.pacbayes.protocol import OURS


def exactly(t):
    """t - log(1 + t) to 40 terms in rational numbers; |t| <= 1/4."""
    t = Fraction(t)
    return float(sum((-1) ** k * t**k / k for k in range(2, 42)))


@pytest.mark.parametrize("size", [0.25, 0.126, 0.125, 0.124, 1e-1, 1e-3, 1e-8, 1e-16, 1e-150])
@pytest.mark.parametrize("sign", [1, -1])
def test_excess_has_full_precision(size, sign):
    t = torch.tensor(sign * size, dtype=torch.float64)
    found = float(excess(t, torch.log1p(t)))
    assert found == pytest.approx(exactly(float(t)), rel=1e-14, abs=0)
    assert found > 0


def test_excess_of_zero_and_far_away():
    t = torch.tensor([0.0, -1.0, 1e300], dtype=torch.float64)
    logs = torch.tensor([0.0, -700.0, 300 * math.log(10)], dtype=torch.float64)
    assert excess(t, logs).tolist() == [0.0, 699.0, 1e300]


def test_gradient_of_excess_crosses_the_border_and_is_finite():
    t = torch.tensor(
        [-0.99, -0.126, -0.124, 0.0, 0.124, 0.126, 1e10, 1e300],
        dtype=torch.float64,
        requires_grad=True,
    )
    excess(t, torch.log1p(t)).sum().backward()
    expected = t.detach() / (1 + t.detach())
    assert torch.allclose(t.grad, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_kl_is_zero_of_equals_and_never_negative(dtype):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(60, 70, generator=generator, dtype=dtype)
    # The variance of j = 17 as the caller's dtype has it, which is not what the grid has.
    prior = OURS.grid.variance(17)
    variance = torch.full((60, 70), prior, dtype=dtype)
    found = gaussian_kl(mean, mean, variance, prior)
    assert found.dtype == torch.float64
    assert 0 <= float(found) <= 60 * 70 * float(torch.finfo(dtype).eps) ** 2
    nudged = variance * (1 + 1e-4 * torch.randn(60, 70, generator=generator, dtype=dtype))
    t = (nudged.double() - prior) / prior
    expected = 0.5 * math.fsum(exactly(v) for v in t.flatten().tolist())
    assert float(gaussian_kl(mean, mean, nudged, prior)) == pytest.approx(expected, rel=1e-10)


def test_gaussian_kl_adds_both_parts():
    prior, ones = 0.3, torch.ones(4, 5, dtype=torch.float64)
    variance, moved = 1e-9 * ones, 0.2 * ones
    found = gaussian_kl(moved, 0 * ones, variance, prior)
    ratio = 1e-9 / prior
    expected = 0.5 * 20 * (ratio - 1 - math.log(ratio) + 0.04 / prior)
    assert float(found) == pytest.approx(expected, rel=1e-13)
    layer = LayerPosterior(True, moved, 0 * ones, variance, None, None, 1)
    of_mean, of_variance = layer.kl_parts(prior)
    assert of_mean == pytest.approx(0.5 * 20 * 0.04 / prior, rel=1e-13)
    assert of_mean + of_variance == layer.kl(prior)


@pytest.mark.parametrize("q", [1e-300, 1e-12, 1e-3, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("step", [-1e-3, -1e-7, 1e-13, 1e-9, 1e-4])
def test_binary_kl_near_zero(q, step):
    p = q + step * min(q, 1 - q)
    # q log(q / p) + (1 - q) log((1 - q) / (1 - p)) = q e(t) + (1 - q) e(t'), e(t) = t - log(1 + t).
    of = Fraction(p) - Fraction(q)
    one, other = of / Fraction(q), -of / (1 - Fraction(q))
    expected = q * exactly(one) + (1 - q) * exactly(other)
    assert float(kl(q, p)) == pytest.approx(expected, rel=1e-12, abs=0)


def test_binary_kl_at_the_ends():
    found = kl(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5]), torch.tensor([0, 1, 0.25, 0.25, 0, 1]))
    assert found.tolist() == [0, 0, pytest.approx(-math.log(0.75)), math.log(4), math.inf, math.inf]
    assert float(kl(0.0, 1e-20)) == pytest.approx(1e-20, rel=1e-14)
    assert float(kl(5e-324, 1.0)) == math.inf


@pytest.mark.parametrize("rate", [1e-18, 1e-12, 1e-6, 1e-2])
@pytest.mark.parametrize("q", [0.0, 0.01, 0.5])
def test_kl_inverse_at_small_rates_stays_above_and_near(q, rate):
    p = kl_inverse(q, rate)
    assert float(kl(q, p)) >= rate
    # What 64 halvings of [0, 1] leave, or the next number below.
    below = torch.minimum(p - 2.0**-63, torch.nextafter(p, torch.zeros_like(p))).clamp(min=q)
    assert float(kl(q, below)) <= rate


def test_a_bound_of_no_divergence():
    mean = torch.randn(30, 20)
    variance = torch.full((30, 20), OURS.grid.variance(40), dtype=torch.float32)
    layer = LayerPosterior(True, mean, mean, variance, None, None, 40)
    divergence = layer.kl(OURS.grid.variance(40))
    assert 0 <= divergence < 1e-10
    assert float(bound_rate(divergence, 100, [40], 0.025)) > 0
