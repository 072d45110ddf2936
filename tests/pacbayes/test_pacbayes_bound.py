"""The bound: kl, its inverse and gradients, the prior grid, the audit of the published table."""

import math

import pytest
import torch

from hesskern.pacbayes import PriorGrid, bound_rate, draws_rate, kl, kl_inverse

N, DELTA = 60_000, 0.025

# arXiv 2010.04261: bound / KL / q / log(lambda) / 2, of every row that states lambda.
TABLE = """
T-600      .154/4612.6/.03373/-1.3313 .1432/3980.6/.03417/-1.6063 .1198/3766.1/.02347/-1.2913
T-600      .1199/3751.1/.02366/-1.2913 .1255/3929.9/.02494/-1.3213
T-600^2    .1921/6966.6/.03262/-1.4163 .1658/5176.1/.03468/-2.0963 .1456/5086.5/.02473/-1.7963
T-600^2    .1443/4956.8/.02523/-1.7963 .1502/5024.5/.02767/-1.8363
T-1200     .1754/5917.6/.03295/-1.5463 .1725/5318.8/.03701/-1.8313 .1417/5071/.02292/-1.4763
T-1200     .1413/5021.1/.02316/-1.4763 .1493/5185.4/.02576/-1.5363
T-300^2    .1686/5514.9/.03329/-1.1513 .1434/4105.4/.03296/-1.8063 .1249/3873.2/.02514/-1.4763
T-300^2    .1244/3833.7/.02526/-1.4763 .1308/3987.2/.02721/-1.5713
R-600      .6046/1144.8/.507/-1.8263 .5653/390.25/.5066/-2.4713 .5681/431.62/.5066/-2.4513
R-600      .5616/340.62/.5065/-2.5263
T-200^2_10 .4165/21896/.04706/-1.1513 .2621/11068/.0366/-1.4213 .2145/9821/.02229/-1.1513
T-200^2_10 .2311/9758.5/.03071/-1.1513 .2728/13406/.02605/-1.1513
T-600_10   .2879/12674/.03854/-1.1513 .2424/9095.8/.04159/-1.6013 .2132/8697.9/.02947/-1.3063
T-600_10   .2227/8870.9/.03294/-1.4613
T-600^2_10 .3472/17212/.03884/-1.1513 .2896/11618/.04723/-2.0563 .2431/10568/.03057/-1.5713
"""
ROWS = [
    (name, *(float(value) for value in entry.split("/")))
    for name, *entries in (line.split() for line in TABLE.strip().splitlines())
    for entry in entries
]


def published(divergence, q, index, n=N):
    return float(kl_inverse(q, bound_rate(divergence, n, [index], DELTA, "langford-seeger")))


@pytest.mark.parametrize("row", [r for r in ROWS if r[4] != -1.1513], ids=str)
def test_published_bounds_follow_from_their_kl_error_and_lambda(row):
    _, bound, divergence, q, half_log = row
    grid = PriorGrid()
    index = round(grid.b * math.log(grid.c / math.exp(2 * half_log)))
    # lambda is printed to four digits, so it lies on the grid within .01 steps.
    assert math.isclose(0.5 * math.log(grid.variance(index)), half_log, abs_tol=6e-5)
    assert abs(published(divergence, q, index) - bound) <= 1e-4


def test_the_published_rows_at_j_0_are_refused_and_cost_more_at_j_1():
    rows = [r for r in ROWS if r[4] == -1.1513]
    assert len(rows) == 7
    grid = PriorGrid()
    for _, bound, divergence, q, half_log in rows:
        with pytest.raises(ValueError, match=r"j = 0.*j >= 1"):
            grid.index(0.1)
        assert math.isclose(half_log, 0.5 * math.log(0.1), abs_tol=1e-4)
        with pytest.raises(ValueError, match="integer >= 1"):
            bound_rate(divergence, N, [0], DELTA, "langford-seeger")
        assert 0.0002 - 5e-5 <= published(divergence, q, 1) - bound <= 0.0005 + 5e-5


def test_earlier_work_counted_55000_samples():
    # T-600 of Dziugaite and Roy: .161 / 5144 / .028; lambda is not printed.
    values = {n: published(5144, 0.028, 100, n) for n in (55_000, 60_000)}
    assert abs(values[55_000] - 0.161) < 6e-4
    assert abs(values[60_000] - 0.161) > 5e-3


def test_kl_has_its_closed_values():
    assert float(kl(0.3, 0.3)) == 0
    assert math.isclose(float(kl(0.0, 0.4)), -math.log(0.6), rel_tol=1e-14)
    assert math.isclose(float(kl(1.0, 0.4)), -math.log(0.4), rel_tol=1e-14)
    assert float(kl(0.5, 1.0)) == math.inf
    q, p = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.15, 0.9, 0.6])
    pair = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(pair(q.double()), pair(p.double()))
    torch.testing.assert_close(kl(q, p), expected)


def brute_force(q, rate):
    """The largest p of a fine grid, refined four times, with kl(q || p) <= rate."""
    low, high = q, 1.0
    for _ in range(4):
        points = torch.linspace(low, high, 2001, dtype=torch.float64)
        good = points[(kl(q, points) <= rate) & (points >= q)]
        low = float(good[-1])
        high = min(1.0, low + float(points[1] - points[0]))
    return low


@pytest.mark.parametrize("q", [0.0, 1e-6, 0.02, 0.5, 0.97])
@pytest.mark.parametrize("rate", [1e-6, 0.003, 0.1, 2.0])
def test_the_inverse_agrees_with_brute_force(q, rate):
    assert math.isclose(
        float(kl_inverse(q, rate)), brute_force(q, rate), rel_tol=1e-9, abs_tol=1e-12
    )


def test_the_inverse_is_exact_to_the_last_digits_and_errs_upwards():
    q = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rate = torch.logspace(-7, 0.5, 500, dtype=torch.float64)
    p = kl_inverse(q, rate)
    assert p.shape == (500,)
    inside = p < 1
    assert bool((kl(q, p)[inside] >= rate[inside] - 1e-15).all())
    assert bool((kl(q, (p - 1e-12).maximum(q))[inside] <= rate[inside]).all())
    assert float(kl_inverse(0.3, 0.0)) == 0.3
    assert float(kl_inverse(1.0, 0.1)) == 1.0


def test_the_inverse_has_the_gradients_of_finite_differences():
    q = torch.tensor([0.01, 0.2, 0.6], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.05, 0.3, 0.01], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kl_inverse, (q, rate), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize(
    ("q", "rate", "match"),
    [
        (-0.1, 0.1, r"q must lie in \[0, 1\], got -0.1"),
        (1.1, 0.1, "q must lie"),
        (math.nan, 0.1, "q must lie"),
        (0.1, -1.0, "rate must be non-negative, got -1"),
        (0.1, math.nan, "rate must be non-negative"),
    ],
)
def test_the_inverse_refuses_what_is_no_probability(q, rate, match):
    with pytest.raises(ValueError, match=match):
        kl_inverse(q, rate)


def test_both_forms_are_what_they_say():
    price = PriorGrid().price(7) + PriorGrid().price(20)
    maurer = float(bound_rate(100.0, 1000, [7, 20], 0.05))
    seeger = float(bound_rate(100.0, 1000, [7, 20], 0.05, "langford-seeger"))
    assert math.isclose(maurer, (100 + price + math.log(2 * math.sqrt(1000) / 0.05)) / 1000)
    assert math.isclose(seeger, (100 + price + math.log(1000 / 0.05)) / 999)
    assert math.isclose(PriorGrid().price(7), math.log(7**2 * math.pi**2 / 6))


def test_prices_of_the_grid_are_probabilities():
    # sum_j exp(-price(j)) is at most one: the union bound spends no more than delta.
    grid = PriorGrid()
    assert 0.9999 < sum(math.exp(-grid.price(j)) for j in range(1, 20_000)) <= 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PriorGrid().index(0.05), "off the grid"),
        (lambda: PriorGrid().index(0.2), r"j = -69"),
        (lambda: PriorGrid().index(-1.0), "must be positive"),
        (lambda: PriorGrid().variance(0), "integer >= 1"),
        (lambda: PriorGrid().variance(1.5), "integer >= 1"),
        (lambda: PriorGrid(c=0.0), "c must be positive"),
        (lambda: PriorGrid(b=0), "b must be at least 1"),
        (lambda: bound_rate(1.0, 7, [1], 0.1), "n must be at least 8, got 7"),
        (lambda: bound_rate(1.0, 100, [1], 1.0), "delta must lie"),
        (lambda: bound_rate(-1.0, 100, [1], 0.1), "kl_divergence must be non-negative"),
        (lambda: bound_rate(math.nan, 100, [1], 0.1), "kl_divergence must be non-negative"),
        (lambda: bound_rate(1.0, 100, [1], 0.1, "seeger"), "form must be one of"),
        (lambda: draws_rate(0, 0.1), "count must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_grid_finds_its_own_variances_and_their_neighbours():
    grid = PriorGrid()
    for j in (1, 17, 2500):
        assert grid.index(grid.variance(j)) == j
    assert grid.neighbours(math.sqrt(grid.variance(17) * grid.variance(18))) == (17, 18)
    assert grid.neighbours(5.0) == (1,)
    assert grid.nearest(grid.variance(17) * math.exp(0.4 / grid.b)) == 17
    assert grid.nearest(5.0) == 1


@pytest.mark.parametrize(
    ("draws", "expected"), [(1000, 0.0379), (10_000, 0.0249), (50_000, 0.0221), (150_000, 0.0212)]
)
def test_the_price_of_the_draws(draws, expected):
    assert abs(float(kl_inverse(0.02, draws_rate(draws, 0.01))) - expected) < 1e-4
