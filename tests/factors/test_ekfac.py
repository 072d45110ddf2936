"""EKFAC in a stream against loops over samples and dense matrices in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import hessians
from dense import gauss_newton, relative_error, rows_hessian
from drawn_rows import single_target_rows
from masked import alone, encoder, mask_of, padded
from networks import CASES, CE, Routed, classes, randn, routed_data, sample_loss, seeded
from torch import Tensor, nn

import hesskern as hk

pytestmark = [
    # torch's remark on "same" padding of even kernels.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning"),
    # Two biases, one weight: neither bias belongs to all of its calls.
    pytest.mark.filterwarnings("ignore:left out. 'first' has a weight that is also:UserWarning"),
]

DIFFERENT = ["relu", "conv groups", "conv1d", "sequence", "attention", "twice", "tied", "dict"]


def basis(E: Any) -> Tensor:
    """[P, P] with the vectors u_i (x) v_j in its columns."""
    left, right, _ = E.eigenbases
    return torch.block_diag(*(torch.kron(u, v) for u, v in zip(left, right, strict=True))).double()


def along(E: Any, dense: Tensor) -> Tensor:
    """[m, d] curvature of a dense matrix, output first, along the operator's eigenvectors."""
    Q = basis(E)
    return (Q * (dense @ Q)).sum(0).reshape(E.layer_shape)


def assert_same_values(a: Any, b: Any, bound: float) -> None:
    assert list(a) == list(b)
    for name in a:
        assert relative_error(a[name].values, b[name].values) <= bound, name


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("name", CASES)
def test_exact_rows_against_the_dense_gauss_newton_matrix(name: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    factors = hk.kronecker_factors(model, data, CE, bias=bias)
    E = hk.ekfac(model, data, CE, output="exact", bias=bias)
    assert list(E) == list(factors)
    assert E.num_samples == 7
    for layer, found in E.items():
        joint = E.specs[layer].joint
        assert joint == (bias == "joint" and model.get_submodule(layer).bias is not None)
        dense = gauss_newton(model, data, sample_loss, layer, joint=joint)
        assert found.shape == dense.shape
        assert found.dtype == torch.float64
        assert relative_error(found.values, along(found, dense)) <= 1e-10
        assert found.trace() == pytest.approx(float(dense.trace()), rel=1e-10)
        Q = basis(found)
        assert relative_error(Q.T @ Q, torch.eye(len(Q)).double()) <= 1e-10
        turned = Q.T @ factors[layer].operator().to_dense() @ Q
        assert relative_error(turned.diag().diag(), turned) <= 1e-10


@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("output", ["mc", "empirical"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_rows_at_single_targets(name: str, output: str, bias: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    E = hk.ekfac(model, data, CE, output=output, bias=bias, mc_samples=3, seed=5)
    rows = single_target_rows(model, data, sample_loss, output, 3, 5)
    for layer, found in E.items():
        dense = rows_hessian(model, data, rows, layer, joint=E.specs[layer].joint)
        assert relative_error(found.values, along(found, dense)) <= 1e-10


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence"])
def test_weighted_samples(name: str, output: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    weights = [torch.tensor([0.5, 0.0, 2.0, 1.0]), torch.tensor([3.0, 1.0, 0.25])]
    weights = [w.double() for w in weights]
    E = hk.ekfac(model, data, CE, output=output, bias="joint", sample_weight=torch.cat(weights))
    assert E.num_samples == 7.75
    for layer, found in E.items():
        given: dict[str, Any] = {"joint": E.specs[layer].joint, "weights": weights}
        if output == "exact":
            dense = gauss_newton(model, data, sample_loss, layer, **given)
        else:
            rows = single_target_rows(model, data, sample_loss, output)
            dense = rows_hessian(model, data, rows, layer, **given)
        assert relative_error(found.values, along(found, dense)) <= 1e-10


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence", "attention", "twice"])
def test_the_same_as_from_stored_samples(name: str, output: str) -> None:
    case = CASES[name]
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, data = case.model(dtype), case.data(dtype)
        given: dict[str, Any] = {"output": output, "bias": "joint", "mc_samples": 2, "seed": 4}
        E = hk.ekfac(model, data, CE, precision="float64", **given)
        H = hessians(model, data, CE, **given)
        factors = hk.kronecker_factors(model, data, CE, **given)
        for layer, found in E.items():
            assert found.dtype == dtype
            expected = hk.eigenvalue_corrected(H[layer], found)
            assert relative_error(found.values, expected.values) <= bound
            K = factors[layer].operator()
            assert relative_error(found.values, H[layer].diagonal_in(K)) <= bound
            assert found.trace() == pytest.approx(H[layer].trace(), rel=bound)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["relu", "conv groups", "sequence", "attention"])
def test_float32_against_float64(name: str, precision: Any) -> None:
    case = CASES[name]
    model, data = case.model(torch.float32), case.data(torch.float32)
    E = hk.ekfac(model, data, CE, output="exact", precision=precision)
    assert E.settings["eigenvectors"] == precision
    wide = [(x.double(), y) for x, y in data]
    model.double()
    # There is no other precision for float64 models.
    assert hk.ekfac(model, wide, CE, precision=precision).settings["eigenvectors"] == "float64"
    for layer, found in E.items():
        dense = gauss_newton(model, wide, sample_loss, layer)
        assert relative_error(found.values, along(found, dense)) <= 1e-5
        assert found.trace() == pytest.approx(float(dense.trace()), rel=1e-5)


def test_float32_eigenvectors_of_large_factors_are_as_orthogonal_as_stated() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    data = [(randn(64, 300, dtype=torch.float32), classes(64, c=10))]
    for found in hk.ekfac(model, data, CE).values():
        for vectors in (found.eigenbases[0][0], found.eigenbases[1][0]):
            wide = vectors.double()
            eye = torch.eye(len(wide)).double()
            assert float(torch.linalg.matrix_norm(wide.T @ wide - eye, 2)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    case = CASES["residual"]
    model, data = case.model(dtype), [(x.to(dtype), y) for x, y in case.data()]
    E = hk.ekfac(model, data, CE, output="exact")
    wide = [(x.double(), y) for x, y in data]
    model.double()
    for layer, found in E.items():
        assert found.dtype == torch.float32
        dense = gauss_newton(model, wide, sample_loss, layer)
        assert relative_error(found.values, along(found, dense)) <= 0.05


@pytest.mark.parametrize("output", ["exact", "empirical"])
@pytest.mark.parametrize("bias", ["none", "joint"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_positions_count_nowhere(side: str, bias: str, output: str) -> None:
    model, batch = encoder(), padded(side)
    given: dict[str, Any] = {"output": output, "bias": bias}
    E = hk.ekfac(model, [batch], CE, position_mask=mask_of, **given)
    factors = hk.kronecker_factors(model, [batch], CE, position_mask=mask_of, **given)
    assert_same_values(E, hk.ekfac(model, alone(batch), CE, factors=factors, **given), 1e-10)


@pytest.mark.parametrize("bias", ["none", "joint"])
def test_gradients_at_masked_positions_are_not_looked_at(bias: Any) -> None:
    model = seeded(nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 3, 1)))
    x, y = randn(3, 3, 6), classes(3, 6, c=3)
    keep = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    # The model's outputs at masked positions are part of the loss.
    loss = nn.CrossEntropyLoss(reduction="sum")
    given: dict[str, Any] = {"output": "exact", "bias": bias}
    factors = hk.kronecker_factors(model, [(x, y)], loss, position_mask=lambda _: keep, **given)
    E = hk.ekfac(model, [(x, y)], loss, position_mask=lambda _: keep, **given)
    apart = [
        (x[n : n + 1, :, row], y[n : n + 1, row]) for n, row in enumerate(keep.bool().unbind())
    ]
    assert_same_values(E, hk.ekfac(model, apart, loss, factors=factors, **given), 1e-10)
    whole = hk.ekfac(model, [(x, y)], loss, factors=factors, **given)
    assert all(relative_error(whole[n].values, E[n].values) > 0.1 for n in E)


@pytest.mark.parametrize("output", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("budget", [0, 2**10, None])
@pytest.mark.parametrize("name", ["sequence", "conv groups", "attention", "twice"])
def test_budgets_and_ways_backwards(
    name: str, budget: int | None, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    given: dict[str, Any] = {"output": output, "bias": "joint", "mc_samples": 3}
    expected = hk.ekfac(model, data, CE, **given)
    assert_same_values(hk.ekfac(model, data, CE, memory_budget=budget, **given), expected, 1e-12)
    monkeypatch.setattr("hesskern.passes.roots.BatchRoots.blocks", lambda *_: None)
    monkeypatch.setattr("hesskern.factors.corrections._TOGETHER_BYTES", 2**9)
    assert_same_values(hk.ekfac(model, data, CE, memory_budget=budget, **given), expected, 1e-12)


def test_layers_that_some_batches_pass_by() -> None:
    model, data = seeded(Routed(beside=True)), routed_data()
    with pytest.warns(UserWarning, match="left out: 'unused' was never reached"):
        E = hk.ekfac(model, data, CE, output="exact")
    assert list(E) == ["stem", "positive", "negative", "dead"]
    assert not E["dead"].values.any()
    for layer, found in E.items():
        parts = [gauss_newton(model, [batch], sample_loss, layer) for batch in data]
        dense = sum(parts) / len(parts)
        assert relative_error(found.values, along(found, dense)) <= 1e-10
    with pytest.raises(KeyError, match="no EKFAC of layer 'unused': it was never reached"):
        E["unused"]


def test_draws_are_those_of_the_factors_and_runs_repeat() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    E = hk.ekfac(model, data, CE, seed=7)
    again = hk.ekfac(model, data, CE, seed=7)
    # Of seed 8 the four samples that reach the first layer draw the same four classes.
    other = hk.ekfac(model, data, CE, seed=10)
    factors = hk.kronecker_factors(model, data, CE, output="mc", seed=7)
    for name, found in E.items():
        assert torch.equal(found.values, again[name].values)
        assert not torch.allclose(found.values, other[name].values)
        # One position per sample and one draw: the trace is that of the factors' rows.
        A, B = factors[name].output_hessian, factors[name].input_covariance
        u, v = found.eigenbases[0][0], found.eigenbases[1][0]
        assert relative_error((u.T @ A @ u).diag().diag(), u.T @ A @ u) <= 1e-10
        assert relative_error((v.T @ B @ v).diag().diag(), v.T @ B @ v) <= 1e-10


def test_given_factors() -> None:
    case = CASES["conv groups"]
    model, data = case.model(), case.data()
    factors = hk.kronecker_factors(model, data, CE, output="exact", bias="joint")
    E = hk.ekfac(model, iter(data), CE, output="empirical", factors=factors)
    assert E.settings["output"] == "empirical"
    assert E.settings["bias"] == "joint"
    assert E.settings["factors"] == factors.settings
    H = hk.layer_hessians(model, data, CE, output="empirical", bias="joint")
    for name, found in E.items():
        K = factors[name].operator()
        assert relative_error(found.values, H[name].diagonal_in(K)) <= 1e-10
    some = hk.ekfac(model, data, CE, ["2"], factors=factors, output="empirical")
    assert list(some) == ["2"]
    assert torch.equal(some["2"].values, E["2"].values)
    assert repr(some) == "EKFAC of 7 samples:\n  2: conv (6, 5)"
    # Theirs are left alone.
    assert list(factors) == ["0", "2", "4"]


def test_layers_that_given_factors_lack() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    factors = hk.kronecker_factors(model, data, CE, layers=["0"])
    E = hk.ekfac(model, data, CE, factors=factors)
    assert list(E) == ["0"]
    assert {name: E.skipped[name] for name in ("2", "4")} == dict.fromkeys(
        ("2", "4"), "is not among the factors"
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_result_serves_outside_the_callers_mode(mode: Any) -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    with mode():
        E = hk.ekfac(model, data, CE)
    expected = hk.ekfac(model, data, CE)
    vector = randn(E["0"].shape[0]).requires_grad_()
    assert torch.equal((E["0"] @ vector.detach()), expected["0"] @ vector.detach())
    for layer in E.values():
        assert not layer.values.is_inference()
        assert not any(u.is_inference() for u in layer.eigenbases[0])


def test_autocast() -> None:
    case = CASES["sequence"]
    model, data = case.model(torch.float32), case.data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        E = hk.ekfac(model, data, CE, output="exact")
    assert "bfloat16 autocast" in E.settings["precision"]
    wide = [(x.double(), y) for x, y in data]
    model.double()
    for layer, found in E.items():
        assert found.dtype == torch.float32
        dense = gauss_newton(model, wide, sample_loss, layer)
        assert relative_error(found.values, along(found, dense)) <= 0.05


def test_a_stream_that_ends() -> None:
    case = CASES["relu"]
    model, data = case.model(), case.data()

    def stream() -> Iterator[Any]:
        yield from data

    with pytest.raises(ValueError, match="data can be iterated only once, and EKFAC goes through"):
        hk.ekfac(model, stream(), CE)
