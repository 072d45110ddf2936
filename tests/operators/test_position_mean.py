"""E[M_n (x) X_n X_n^T] against its definition, and against the forms on either side of it."""

import pytest
import torch
from networks import seeded, small_network
from torch import nn

import hesskern as hk

LOSS = nn.CrossEntropyLoss()


def case(kind):
    model, [(x, y)] = small_network(kind)
    return model, x, y


KINDS = ["linear", "positions", "columns", "rows"]


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_samples_of_their_kronecker_products(kind, bias):
    """A sample alone has the factors M_n and X_n X_n^T."""
    model, x, y = case(kind)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = hk.position_mean_hessian(model, data, LOSS, "0", bias=bias)
    expected = sum(
        hk.kronecker_factors(model, [(x[n : n + 1], y[n : n + 1])], LOSS, ["0"], bias=bias)["0"]
        .operator()
        .to_dense()
        for n in range(len(x))
    ) / len(x)
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-12)
    assert found.trace() == pytest.approx(float(expected.trace()), rel=1e-9)
    assert found.num_samples == len(x)


def test_without_positions_it_is_the_exact_hessian():
    model, x, y = case("linear")
    H = hk.layer_hessians(model, [(x, y)], LOSS)["0"]
    found = hk.position_mean_hessian(model, [(x, y)], LOSS, "0")
    torch.testing.assert_close(found.to_dense(), H.to_dense(), rtol=1e-9, atol=1e-12)


def test_with_positions_it_is_neither_the_hessian_nor_the_kronecker_form():
    model, x, y = case("rows")
    H = hk.layer_hessians(model, [(x, y)], LOSS)["0"]
    K = hk.kronecker_factors(model, [(x, y)], LOSS)["0"].operator()
    middle = hk.position_mean_hessian(model, [(x, y)], LOSS, "0")
    for other in (H, K):
        assert hk.decoupling_error(other, middle).frobenius > 0.01


def test_weights_count_samples():
    model, x, y = case("columns")
    weight = torch.tensor([2.0, 0, 1, 0, 1, 1, 0]).double()
    rows = [0, 0, 2, 4, 5]
    found = hk.position_mean_hessian(model, [(x, y, weight)], LOSS, "0")
    expected = hk.position_mean_hessian(model, [(x[rows], y[rows])], LOSS, "0")
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-12)


def test_single_precision_and_eigenpairs():
    model, x, y = case("rows")
    exact = hk.position_mean_hessian(model, [(x, y)], LOSS, "0")
    found = hk.position_mean_hessian(model.float(), [(x.float(), y)], LOSS, "0")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.to_dense().double(), exact.to_dense(), rtol=1e-4, atol=1e-6)
    values = torch.linalg.eigvalsh(exact.to_dense()).flip(0)[:3]
    torch.testing.assert_close(hk.eigsh(exact, 3).values, values, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_above_the_memory_budget_are_computed_again(kind):
    model, x, y = case(kind)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    kept = hk.position_mean_hessian(model, data, LOSS, "0")
    again = hk.position_mean_hessian(model, data, LOSS, "0", memory_budget=10)
    assert (kept.cached, again.cached) == (True, False)
    assert again.num_samples == kept.num_samples == len(x)
    torch.testing.assert_close(again.to_dense(), kept.to_dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.diagonal(), kept.diagonal(), rtol=1e-9, atol=1e-12)
    assert again.trace() == pytest.approx(kept.trace(), rel=1e-9)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="the model changed since the operator of layer '0'"):
        again.trace()


def test_bad_input():
    model, x, y = case("columns")
    with pytest.raises(ValueError, match=r"memory_budget of 10 bytes .* iterated only once"):
        hk.position_mean_hessian(model, iter([(x, y)]), LOSS, "0", memory_budget=10)
    with pytest.raises(ValueError, match="no samples"):
        hk.position_mean_hessian(model, [], LOSS, "0")
    with pytest.raises(ValueError, match="nowhere"):
        hk.position_mean_hessian(model, [(x, y)], LOSS, "nowhere")
    grouped = seeded(nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)))
    with pytest.raises(NotImplementedError, match="2 groups"):
        hk.position_mean_hessian(grouped, [(x, y)], LOSS, "0")
