"""The optimizations behind certificates: objectives, bases, refreshes, averages."""

import math
from dataclasses import replace

import pytest
import torch
from certificates import blobs
from certify_cases import SHARED, TERMS, built, trained

from hesskern.pacbayes import (
    METHODS,
    PriorGrid,
    PublishedSettings,
    TruncatedSettings,
    certify,
)
from hesskern.pacbayes.grid import on_grid
from hesskern.pacbayes.posterior import spread_out
from hesskern.pacbayes.problem import Problem
from hesskern.pacbayes.published_methods import Published
from hesskern.pacbayes.slots import slots_of, state_of
from hesskern.pacbayes.truncated_layer import rows_of
from hesskern.pacbayes.truncated_method import Truncated


@pytest.mark.parametrize("method", METHODS)
def test_published_methods_lower_their_objective(method):
    data = blobs()
    found = certify(
        trained(data),
        built(),
        data,
        method,
        epochs=10,
        protocol=SHARED,
        settings=PublishedSettings(batch_size=50, rate=0.03),
    )
    values = [entry["objective"] for entry in found.history]
    assert values[-1] < values[0]
    assert len(set(found.indices.values())) == 1
    bases = [layer.U is None for layer in found.layers.values()]
    assert bases == [method == "base"] * 2


def method_of(name, model, data):
    slots = slots_of(model, data.inputs[:2])
    state = state_of(built())
    settings = PublishedSettings(batch_size=50)
    generator = torch.Generator().manual_seed(0)
    problem = Problem(model, slots, state, state_of(model), data, SHARED)
    return Published(name, problem, settings, generator)


def covariance_diagonal(draft, U, V):
    """Diagonal of the draft's covariance in the basis U (x) V, by dense algebra."""
    basis = torch.kron(draft.U, draft.V)
    dense = basis @ torch.diag(draft.variance.double().flatten()) @ basis.T
    other = torch.kron(U, V)
    return (other.T @ dense @ other).diagonal().view(draft.variance.shape)


@pytest.mark.parametrize(("method", "moves"), [("appr", False), ("iter", True), ("iter_m", True)])
def test_a_refresh_carries_the_variances_over(method, moves):
    data = blobs()
    optimizer = method_of(method, trained(data), data)
    for rows in torch.arange(150).split(50):
        optimizer.step(rows, 0.0)
    before = optimizer.drafts()["fc1"]
    optimizer.begin_epoch(0.5)
    after = optimizer.drafts()["fc1"]
    assert torch.equal(before.U, after.U) is not moves
    expected = covariance_diagonal(before, after.U, after.V)
    torch.testing.assert_close(after.variance.double(), expected, rtol=1e-4, atol=1e-9)


def test_the_schedules_are_the_published_ones(monkeypatch):
    data = blobs()
    counts = {}
    for name in ("iter", "iter_d"):
        optimizer = method_of(name, trained(data), data)
        refreshed = []
        monkeypatch.setattr(
            optimizer, "_fresh_bases", lambda o=optimizer, r=refreshed: r.append(1) or o._bases
        )
        rates = []
        for epoch in range(2000):
            optimizer.begin_epoch(epoch / 2000)
            counts[name, epoch] = len(refreshed)
        for fraction in (0.0, 0.199, 0.2, 0.6, 0.99):
            optimizer.step(torch.arange(50), fraction)
            rates.append(optimizer._optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-6, 1e-7])
    assert counts["iter", 1999] == 199
    assert counts["iter", 399] == counts["iter_d", 399] == 39
    # After the first fall every 100 epochs, then every 1000.
    assert counts["iter_d", 799] - counts["iter_d", 399] in (4, 5)
    assert counts["iter_d", 1999] - counts["iter_d", 799] <= 3


def test_the_closed_form_hessian_of_the_last_layer_is_the_exact_one():
    data = blobs()
    model = trained(data)
    optimizer = method_of("iter_m", model, data)
    closed = optimizer._closed_form_hessians()
    with torch.no_grad():
        p = model(data.inputs).softmax(1)
    A = torch.diag_embed(p).mean(0) - p.T @ p / 150
    torch.testing.assert_close(closed["fc2"], A)
    W = model.fc2.weight.detach()
    torch.testing.assert_close(closed["fc1"], W.T @ A @ W / 4)


def truncated(data, **changes):
    model = built()
    slots = slots_of(model, data.inputs[:2])
    state = state_of(model)
    settings = TruncatedSettings(**{"batch_size": 50, "rank_in": 5, "rank_out": 3, **changes})
    generator = torch.Generator().manual_seed(0)
    problem = Problem(model, slots, state, state, data, TERMS)
    return Truncated(problem, settings, generator)


def test_bases_are_laid_out_for_inputs_under_noise():
    """What enters fc2 is relu(mean + U (deviation . noise)): its second moment, drawn here anew."""
    data = blobs(30)
    optimizer = truncated(data, prior_hidden=3.0)
    optimizer._factor_rows = torch.arange(30)
    found = sum(optimizer._noisy_moments().get("fc2") for _ in range(2000)) / 2000
    layer = optimizer._layers["fc1"]
    mean, deviation = layer.moments(data.inputs, optimizer._known["fc1"])
    generator = torch.Generator().manual_seed(1)
    drawn = torch.zeros(7, 7, dtype=torch.float64)
    for _ in range(2000):
        hidden = spread_out(mean, deviation, layer.U, generator).relu().double().detach()
        hidden = torch.cat([hidden, torch.ones(30, 1, dtype=torch.float64)], 1)
        drawn += hidden.T @ hidden / 2000
    torch.testing.assert_close(found, drawn, rtol=0.05, atol=0.02 * float(drawn.max()))
    still = torch.cat([mean.relu(), torch.ones(30, 1)], 1).double().detach()
    assert float((still.T @ still - drawn).norm()) > 0.2 * float(drawn.norm())
    # The layer that reads the data keeps its basis.
    assert optimizer._noisy_moments().get("fc1") is None


def test_refreshes_begin_the_average_anew():
    data = blobs(20)
    optimizer = truncated(data, averaged=0.9, refreshes=(0.5,))
    optimizer.step(torch.arange(10), 0.2)
    assert optimizer._averages == 1
    optimizer.begin_epoch(0.5)
    assert optimizer._averages == 0
    optimizer.step(torch.arange(10), 0.6)
    layer = optimizer._layers["fc2"]
    for mean, parameter in zip(optimizer._averaged["fc2"], layer.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter.detach())


def test_a_relative_draft_moves_to_the_grid_as_a_whole():
    """Distance from the prior's mean, variances and prior are scaled alike: the KL stays."""
    data = blobs(40)
    optimizer = truncated(data)
    for rows in torch.arange(40).split(10):
        optimizer.step(rows, 0.1)
    drafts, state = optimizer.drafts(), state_of(built())
    protocol = replace(TERMS, grid=PriorGrid(c=1.0, b=3))
    layers = on_grid(drafts, optimizer._problem.slots, state, 40, protocol)
    total = 0.0
    for name, layer in layers.items():
        draft, variance = drafts[name], protocol.grid.variance(layer.index)
        assert abs(math.log(variance / draft.prior_variance)) <= 1 / 6 + 1e-6
        scale = variance / draft.prior_variance
        torch.testing.assert_close(layer.variance, draft.variance.double() * scale)
        moved = layer.prior_mean + scale**0.5 * (draft.mean - layer.prior_mean)
        torch.testing.assert_close(layer.mean, moved)
        total += layer.kl(variance)
    with optimizer._at_average():
        assert total == pytest.approx(optimizer.kl(), rel=1e-5)


def test_truncated_noise_is_that_of_the_draft():
    # The fast forward of training and the full covariance of the certificate are one distribution.
    data = blobs(20)
    optimizer = truncated(data)
    for rows in torch.arange(20).split(10):
        optimizer.step(rows, 0.1)
    layer, draft = optimizer._layers["fc1"], optimizer.drafts()["fc1"]
    x = layer.slot.extended(data.inputs.flatten(1))[:1]
    known = optimizer._known["fc1"]
    rows = torch.zeros(40_000, dtype=torch.long)
    with torch.no_grad():
        mean, deviation = layer.moments(x, rows_of(known, rows))
        drawn = layer.noisy(mean, deviation).double()
    torch.testing.assert_close(mean[0], (draft.mean @ x[0]).to(mean.dtype), rtol=1e-4, atol=1e-5)
    rotated = (x[0].double() @ draft.V).square()
    expected = draft.U @ torch.diag(draft.variance @ rotated) @ draft.U.T
    scale = expected.diagonal().sqrt()
    error = (torch.cov(drawn.T) - expected) / torch.outer(scale, scale)
    assert float(error.abs().max()) < 0.03


def test_kl_of_the_truncated_form_is_that_of_the_draft():
    optimizer = truncated(blobs(20))
    for _ in range(3):
        optimizer.step(torch.arange(20), 0.1)
    total = 0.0
    for name, draft in optimizer.drafts().items():
        w0 = optimizer._layers[name].prior_mean.double()
        ratio = draft.variance / draft.prior_variance
        moved = (draft.mean.double() - w0).square().sum() / draft.prior_variance
        total += 0.5 * float((ratio - 1 - ratio.log()).sum() + moved)
    assert math.isclose(optimizer.kl(), total, rel_tol=1e-4)


def test_a_refresh_keeps_the_traces_of_the_truncated_form():
    optimizer = truncated(blobs(40))
    for _ in range(5):
        optimizer.step(torch.arange(40), 0.1)
    before = {name: float(draft.variance.sum()) for name, draft in optimizer.drafts().items()}
    optimizer.begin_epoch(0.2)
    for name, draft in optimizer.drafts().items():
        assert math.isclose(float(draft.variance.sum()), before[name], rel_tol=1e-4)


def test_the_last_part_of_the_budget_is_averaged():
    optimizer = truncated(blobs(40), averaged=0.5)
    seen = []
    for step in range(8):
        optimizer.step(torch.arange(40), step / 8)
        if step >= 4:
            seen.append([p.detach().clone() for p in optimizer._layers["fc2"].parameters()])
    u, log_ratio, log_prior = (torch.stack(column).mean(0) for column in zip(*seen, strict=True))
    draft = optimizer.drafts()["fc2"]
    layer = optimizer._layers["fc2"]
    assert draft.prior_variance == pytest.approx(float(log_prior.exp()), rel=1e-5)
    mean = layer.prior_mean + (0.5 * log_prior).exp() * u
    torch.testing.assert_close(draft.mean, mean, rtol=1e-4, atol=1e-6)
    ratio = (draft.variance / draft.prior_variance)[1, 0]
    torch.testing.assert_close(float(ratio), float(log_ratio[1, 0].exp()), rtol=1e-4, atol=0)
    # The optimization itself goes on from where it was.
    assert torch.equal(layer.u.detach(), seen[-1][0])
