"""Spectral density and trace from products, against dense spectra."""

import math

import pytest
import torch
from networks import randn, tanh_problem

import hesskern as hk


def matrix(size=40, rank=None, seed=0):
    Q = torch.linalg.qr(randn(size, size, seed=seed)).Q
    values = 2.0 ** -torch.arange(size).double()
    if rank is not None:
        values[rank:] = 0
    return Q @ torch.diag(values) @ Q.T, values


def signs(size, count, seed):
    bits = torch.randint(2, (size, count), generator=torch.Generator().manual_seed(seed))
    return (2 * bits - 1).double()


def test_quadrature_is_exact_for_polynomials_of_each_probe():
    H, _ = matrix()
    found = hk.spectral_density(H, steps=4, probes=5, seed=3)
    v = signs(40, 5, 3) / math.sqrt(40)
    power = v
    for degree in range(8):
        expected = (v * power).sum(0)
        torch.testing.assert_close(
            (found.weights * found.nodes**degree).sum(1), expected, rtol=1e-8, atol=1e-10
        )
        power = H @ power
    assert found.mean(2) == pytest.approx(float((v * (H @ (H @ v))).sum(0).mean()), rel=1e-8)


def test_counts_eigenvalues_and_ends_early_on_an_invariant_space():
    values = torch.tensor([3.0] * 4 + [1.0] * 6 + [0.0] * 20).double()
    found = hk.spectral_density(torch.diag(values), steps=30, probes=3)
    assert float(found.weights.sum(1).min()) == pytest.approx(1.0)
    # Signs have equal weight on every coordinate, so a diagonal matrix is counted exactly.
    assert found.above(2.0) == pytest.approx(4.0, abs=1e-8)
    assert found.above(0.5) == pytest.approx(10.0, abs=1e-8)
    grid = torch.linspace(-1, 4, 2001)
    density = found.on(grid, 0.05)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-3)
    near = (grid - 3).abs() < 0.3
    assert float(torch.trapezoid(density[near], grid[near])) == pytest.approx(4 / 30, abs=1e-3)


def test_density_of_a_random_matrix_agrees_with_its_spectrum():
    noise = randn(200, 400, seed=1)
    H = noise @ noise.T / 400
    found = hk.spectral_density(H, steps=40, probes=20)
    values = torch.linalg.eigvalsh(H)
    for threshold in (0.5, 1.0, 1.5, 2.0):
        assert found.above(threshold) == pytest.approx(int((values > threshold).sum()), abs=8)


def test_operators_and_wrong_arguments():
    model, data, loss = tanh_problem()
    H = hk.layer_hessians(model, data, loss, ["2"])["2"]
    found = hk.spectral_density(H, steps=H.shape[0], probes=200)
    assert found.mean(1) * H.shape[0] == pytest.approx(H.trace(), rel=0.1)
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        hk.spectral_density(H, steps=0)
    with pytest.raises(ValueError, match=r"probes must be a positive integer, got 1\.5"):
        hk.spectral_density(H, probes=1.5)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        found.on(torch.zeros(1), 0)


def test_trace_is_exact_for_low_rank_and_for_small_matrices():
    H, values = matrix(40, rank=8)
    found = hk.hutchpp_trace(H, 30)
    assert found.value == pytest.approx(float(values.sum()), rel=1e-10)
    assert found.error < 1e-12
    H, values = matrix(10)
    assert hk.hutchpp_trace(H, 30) == hk.TraceEstimate(pytest.approx(float(values.sum())), 0.0)


def test_trace_is_unbiased_and_its_error_honest():
    noise = randn(60, 60, seed=1)
    H = noise @ noise.T
    found = [hk.hutchpp_trace(H, 24, seed) for seed in range(200)]
    gaps = torch.tensor([f.value for f in found]).double() - H.trace()
    errors = torch.tensor([f.error for f in found]).double()
    assert abs(float(gaps.mean())) < 4 * float(gaps.std()) / math.sqrt(200)
    assert 0.7 < float(gaps.std() / errors.square().mean().sqrt()) < 1.4
    with pytest.raises(ValueError, match="products must be an integer of at least 6, got 5"):
        hk.hutchpp_trace(H, 5)
