"""Gaussian posteriors in a Kronecker basis: KL, and draws per example against whole networks."""

import math

import pytest
import torch
from torch import nn

from hesskern.pacbayes import LayerPosterior, gaussian_kl
from hesskern.pacbayes.evaluate import _keyed, counted, draw_error, wrong
from hesskern.pacbayes.posterior import ExampleDraw, GroupDraw
from hesskern.pacbayes.protocol import Protocol
from hesskern.pacbayes.samples import Samples
from hesskern.pacbayes.slots import check_fixed, slots_of, state_of
from hesskern.pacbayes.surrogates import error_probability, log_loss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(randn(size, size, seed=seed)).Q


def posterior(m, d, seed=0, per_example=True, standard=False):
    return LayerPosterior(
        per_example,
        randn(m, d, seed=seed),
        randn(m, d, seed=seed + 1),
        randn(m, d, seed=seed + 2).square() + 0.05,
        None if standard else orthogonal(m, seed + 3),
        None if standard else orthogonal(d, seed + 4),
        30,
    )


def dense_covariance(layer):
    m, d = layer.mean.shape
    U = torch.eye(m, dtype=torch.float64) if layer.U is None else layer.U
    V = torch.eye(d, dtype=torch.float64) if layer.V is None else layer.V
    basis = torch.kron(U, V)
    return basis @ torch.diag(layer.variance.flatten()) @ basis.T


@pytest.mark.parametrize("standard", [False, True])
def test_kl_equals_the_dense_gaussians(standard):
    layer, prior = posterior(3, 4, standard=standard), 0.07
    q = torch.distributions.MultivariateNormal(layer.mean.flatten(), dense_covariance(layer))
    p = torch.distributions.MultivariateNormal(
        layer.prior_mean.flatten(), prior * torch.eye(12, dtype=torch.float64)
    )
    expected = float(torch.distributions.kl_divergence(q, p))
    assert math.isclose(layer.kl(prior), expected, rel_tol=1e-12)
    # ... and the published form of the sum.
    s, moved = layer.variance, (layer.mean - layer.prior_mean).square().sum()
    published = 0.5 * (s.sum() / prior + moved / prior - 12 + 12 * math.log(prior) - s.log().sum())
    assert math.isclose(layer.kl(prior), float(published), rel_tol=1e-12)


def test_kl_is_zero_at_the_prior_and_has_gradients():
    mean = randn(2, 3)
    variance = torch.full((2, 3), 0.2, dtype=torch.float64)
    assert float(gaussian_kl(mean, mean, variance, 0.2)) == 0
    inputs = [mean.requires_grad_(True), variance.requires_grad_(True)]
    assert torch.autograd.gradcheck(
        lambda w, s: gaussian_kl(w, randn(2, 3, seed=5), s, 0.3), inputs
    )


def test_kl_refuses_variances_that_are_not_positive():
    layer = posterior(2, 3)
    layer.variance[0, 1] = 0.0
    with pytest.raises(ValueError, match="variance must be positive"):
        layer.kl(0.1)


def slot_for(m, d, bias=True):
    model = nn.Sequential(nn.Linear(d - bias, m, bias=bool(bias))).double()
    return model, slots_of(model, randn(2, d - bias))["0"]


def tied(layer, rows, columns):
    """The same with one variance behind the leading rows and columns, as truncated bases leave."""
    layer.variance[rows:] = layer.variance[rows].clone()
    layer.variance[:, columns:] = layer.variance[:, columns : columns + 1].clone()
    return layer


@pytest.mark.parametrize("kind", ["kronecker", "standard", "tied", "isotropic"])
def test_draws_per_example_have_the_distribution_of_whole_networks(kind):
    m, d, count = 3, 5, 40_000
    layer = posterior(m, d, standard=kind == "standard")
    if kind in ("tied", "isotropic"):
        tied(layer, *((1, 2) if kind == "tied" else (0, 0)))
    _, slot = slot_for(m, d)
    x = randn(1, d - 1, seed=9)
    per_example = ExampleDraw(slot, layer, generator(1), torch.float64)(x.expand(count, -1))
    whole = GroupDraw(slot, layer, generator(2), torch.float64)
    networks = []
    for _ in range(4000):
        whole.renew()
        networks.append(whole(x))
    networks = torch.cat(networks)
    extended = torch.cat([x, torch.ones(1, 1)], 1)[0]
    spread = torch.kron(torch.eye(m, dtype=torch.float64), extended[None])
    covariance = spread @ dense_covariance(layer) @ spread.T
    for draws, tolerance in ((per_example, 0.03), (networks, 0.08)):
        scale = covariance.diagonal().sqrt()
        error = (draws.mean(0) - layer.mean @ extended) / scale
        assert float(error.abs().max()) < tolerance
        error = (torch.cov(draws.T) - covariance) / torch.outer(scale, scale)
        assert float(error.abs().max()) < tolerance


def test_examples_of_a_batch_see_independent_networks():
    layer = posterior(2, 3)
    _, slot = slot_for(2, 3)
    x = randn(1, 2, seed=4).expand(2, -1)
    draw = ExampleDraw(slot, layer, generator(3), torch.float64)
    pairs = torch.stack([draw(x)[:, 0] for _ in range(5000)])
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.05


def test_a_group_shares_one_weight_until_it_is_renewed():
    layer = posterior(2, 3)
    _, slot = slot_for(2, 3)
    draw = GroupDraw(slot, layer, generator(3), torch.float64)
    x = randn(1, 2)
    first = draw(x)
    assert torch.equal(first, draw(x))
    draw.renew()
    assert not torch.equal(first, draw(x))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def drawn(model, inputs, **changes):
    slots = slots_of(model, inputs[:2])
    layers = {
        name: LayerPosterior(
            slot.per_example,
            slot.matrix(),
            slot.matrix(),
            torch.full(slot.spec.shape, 0.5, dtype=torch.float64),
            None,
            None,
            1,
        )
        for name, slot in slots.items()
    }
    targets = torch.randint(0, 3, (len(inputs),), generator=generator(5))
    samples = Samples(inputs, targets)
    return draw_error(model, slots, layers, samples, Protocol(**changes), seed=0)


def test_both_samplings_estimate_the_same_error():
    inputs = randn(40, 2, 3)
    per_example = drawn(mlp(), inputs, passes=500)
    whole = drawn(mlp(), inputs, passes=500, sampling="networks")
    assert (per_example.draws, whole.draws) == (20_000, 500)
    assert per_example.trials == whole.trials == 20_000
    # Whole networks share their noise within a pass: a few per mille of standard error.
    assert abs(per_example.mean - whole.mean) < 0.02
    assert per_example.upper(0.01) < whole.upper(0.01)


def test_shared_weights_make_one_variable_per_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    result = drawn(model, randn(25, 1, 3, 4), passes=4, group=10)
    # Groups of 10, 10 and 5: the last one counts as if its missing five were right.
    assert result.draws == 12
    assert result.trials == 100
    assert math.isclose(result.share, result.errors / 120)
    assert result.upper(0.01) > result.mean
    even = drawn(model, randn(30, 1, 3, 4), passes=4, group=10)
    assert (even.scale, even.share) == (1.0, even.mean)


def test_the_count_of_draws_depends_on_the_layers():
    layers = {"a": posterior(2, 3), "b": posterior(2, 3, per_example=False)}
    assert counted(Protocol(passes=3, group=4), layers, 5, 10).draws == 9
    assert counted(Protocol(passes=3), {"a": layers["a"]}, 5, 10).draws == 30


def test_outputs_that_are_not_finite_are_errors():
    outputs = torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, math.inf]])
    assert wrong(outputs, torch.tensor([1, 0, 1])).tolist() == [False, True, True]
    binary = torch.tensor([[1.0], [-1.0], [0.0], [math.nan]])
    assert wrong(binary, torch.tensor([1, 1, 0, 0])).tolist() == [False, True, False, True]


def test_a_layer_used_twice_or_over_positions_is_no_per_example_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.inner(self.inner(x).relu()))

    slots = slots_of(Twice(), torch.randn(3, 4))
    assert not slots["inner"].per_example
    assert slots["out"].per_example
    assert slots["out"].writes_output
    sequence = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 2))
    slots = slots_of(sequence, torch.randn(3, 4, 3))
    assert [slot.per_example for slot in slots.values()] == [False, True]


def test_models_that_cannot_carry_a_posterior_are_refused():
    normed = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"batch norm '1' is in train mode"):
        slots_of(normed, torch.randn(2, 3))
    slots_of(normed.eval(), torch.randn(2, 3))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(NotImplementedError, match="share a parameter"):
        slots_of(tied, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"model must return \[N, c\]"):
        slots_of(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), torch.randn(2, 3))


def test_matrices_that_no_module_calls_keep_the_weights_they_have():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.matrix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return self.last((self.first(x).relu() @ self.matrix.t()).relu())

    assert list(slots_of(Own(), torch.randn(5, 4))) == ["first", "last"]
    with pytest.raises(ValueError, match="no Linear, Conv1d or Conv2d that is called as it is"):
        slots_of(OnlyMatrix(), torch.randn(5, 4))


class OnlyMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x @ self.matrix.t()


def test_what_moved_outside_the_posterior_is_an_error():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    prior = state_of(model)
    slots = slots_of(model, torch.randn(2, 3))
    with torch.no_grad():
        model[0].weight += 1
    assert set(check_fixed(model, prior, slots)) == {n for n in prior if n.startswith("1.")}
    for name in ("1.running_mean", "1.weight"):
        moved = {**prior, name: prior[name] + 0.5}
        with pytest.raises(ValueError, match=rf"'{name}' differs from the prior's"):
            check_fixed(model, moved, slots)
    with pytest.raises(ValueError, match="in the model alone"):
        check_fixed(model, {k: v for k, v in prior.items() if k != "1.bias"}, slots)


def test_the_probability_of_an_error_is_the_mean_of_the_error():
    mean, deviation = randn(4, 3), torch.tensor([[0.3], [1.0], [2.0], [0.8]]).double()
    targets = torch.tensor([0, 2, 1, 1])
    noise = randn(200_000, 4, 3, seed=8)
    share = ((mean + deviation * noise).argmax(2) != targets).double().mean(0)
    found = error_probability(mean, deviation, targets)
    torch.testing.assert_close(found, share, atol=4e-3, rtol=0)
    binary = error_probability(mean[:, :1], deviation, targets.clamp(max=1))
    signs = (2 * targets.clamp(max=1) - 1).double()
    share = ((mean[:, 0] + deviation[:, 0] * noise[:, :, 0]) * signs < 0).double().mean(0)
    torch.testing.assert_close(binary, share, atol=4e-3, rtol=0)


def test_the_probability_of_an_error_has_gradients_far_from_the_border():
    mean = torch.tensor([[60.0, 0.0, -60.0]], dtype=torch.float64, requires_grad=True)
    error_probability(mean, torch.ones(1, 1).double(), torch.tensor([2])).sum().backward()
    assert bool(torch.isfinite(mean.grad).all())


def test_the_log_losses_are_the_published_ones():
    outputs, targets = randn(5, 1), torch.tensor([0, 1, 1, 0, 1])
    logistic = torch.log1p(torch.exp(-(2 * targets - 1) * outputs[:, 0])) / math.log(2)
    torch.testing.assert_close(log_loss(outputs, targets), logistic)
    torch.testing.assert_close(
        log_loss(randn(5, 3), targets),
        nn.functional.cross_entropy(randn(5, 3), targets, reduction="none"),
    )


def test_only_a_layer_on_the_data_themselves_reads_the_data():
    inputs = randn(3, 2, 3).abs()
    direct = slots_of(mlp(), inputs)
    assert [slot.reads_data for slot in direct.values()] == [True, False]
    # Equal values for these samples, but another function of the data.
    behind = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(6, 3)).double()
    assert not slots_of(behind, inputs)["2"].reads_data


def test_no_two_draws_share_the_bits_of_a_seed_that_torch_heeds() -> None:
    seeds = {_keyed(seed=3, place=place) for place in range(200_000)}
    assert len(seeds) == 200_000
    assert all(0 <= seed < 2**32 for seed in seeds)
