"""Kronecker operators against dense matrices; Hessians by double backward against torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from dense import relative_error
from hypothesis import given
from hypothesis import strategies as st
from networks import CASES, CE, Between, classes, randn, seeded
from torch import Tensor, nn
from torch.func import functional_call

import hesskern as hk


def positive(size: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """[size, size] positive semi-definite of the given rank."""
    root = randn(size, size if rank is None else rank, seed=seed)
    return root @ root.T


def dense_of(A: Tensor, B: Tensor) -> Tensor:
    """Block by block, entry by entry: K[(i, k), (j, l)] = A[i, j] B[k, l] within a group."""
    blocks = B if B.dim() == 3 else B[None]
    groups, d = blocks.shape[0], blocks.shape[1]
    m = A.shape[0]
    K = A.new_zeros(m, d, m, d)
    for i in range(m):
        for j in range(m):
            if i // (m // groups) == j // (m // groups):
                K[i, :, j, :] = A[i, j] * blocks[i // (m // groups)]
    return K.reshape(m * d, m * d)


@given(
    m=st.integers(1, 5),
    d=st.integers(1, 6),
    groups=st.integers(0, 3),
    k=st.integers(0, 4),
    double=st.booleans(),
    seed=st.integers(0, 5),
)
def test_kronecker_operator_against_the_dense_matrix(
    m: int, d: int, groups: int, k: int, double: bool, seed: int
) -> None:
    dtype, bound = (torch.float64, 1e-13) if double else (torch.float32, 2e-5)
    m = m * max(groups, 1)
    A = positive(m, seed).to(dtype)
    B = torch.stack([positive(d, seed + i) for i in range(groups)]) if groups else positive(d, 9)
    B = B.to(dtype)
    K, expected = hk.KroneckerOperator(A, B), dense_of(A, B).double()
    assert K.shape == (m * d, m * d)
    assert K.layer_shape == (m, d)
    assert relative_error(K.to_dense(), expected) <= bound
    vector, block = randn(m * d, seed=1), randn(m * d, k, seed=2)
    assert relative_error(K @ vector.to(dtype), expected @ vector) <= bound
    product = K @ block.to(dtype)
    assert product.shape == (m * d, k)
    assert product.dtype == dtype
    assert relative_error(product, expected @ block) <= bound
    assert K.trace() == pytest.approx(float(expected.trace()), rel=bound)
    assert relative_error(K.diagonal(), expected.diagonal()) <= bound
    strided = randn(m * d, 6, seed=3).to(dtype)[:, 1::2]
    assert relative_error(K @ strided, expected @ strided.double()) <= bound


def test_to_scipy() -> None:
    K = hk.KroneckerOperator(positive(3), positive(4, 1).float().double())
    operator = K.to_scipy()
    values = scipy.sparse.linalg.eigsh(operator, 3, return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(K.to_dense())[-3:].numpy()
    assert np.allclose(np.sort(values), expected, rtol=1e-10)
    assert operator.shape == (12, 12)
    assert (operator.T @ np.ones(12)).shape == (12,)


FACTORS: dict[str, tuple[Tensor, Tensor]] = {
    "generic": (positive(4), positive(5, 1)),
    "one by one": (positive(1), positive(1, 1)),
    "one output": (positive(1), positive(6, 1)),
    "rank deficient": (positive(4, rank=2), positive(5, 1, rank=3)),
    "repeated": (torch.eye(3).double(), 2 * torch.eye(4).double()),
    "zero": (torch.zeros(2, 2).double(), positive(3)),
    "indefinite": (positive(3) - 2 * torch.eye(3).double(), positive(4, 1)),
    "groups": (positive(6), torch.stack([positive(3, i) for i in range(3)])),
    "groups of one": (positive(4), torch.stack([positive(2, i, rank=1) for i in range(4)])),
}


@pytest.mark.parametrize("name", FACTORS)
def test_eigenpairs_from_the_factors(name: str) -> None:
    A, B = FACTORS[name]
    K, dense = hk.KroneckerOperator(A, B), dense_of(A, B)
    every = torch.linalg.eigvalsh(dense).flip(0)
    scale = float(every.abs().max()) or 1.0
    for k in (1, len(dense) // 2 + 1, len(dense)):
        found = K.eigsh(k)
        assert isinstance(found, hk.EigenResult)
        assert found.converged
        assert found.matvecs == 0
        assert found.vectors.shape == (len(dense), k)
        assert bool((found.values.diff() <= 0).all())
        assert float((found.values - every[:k]).abs().max()) <= 1e-12 * scale
        gram = found.vectors.T @ found.vectors
        assert relative_error(gram, torch.eye(k).double()) <= 1e-12
        rest = dense @ found.vectors - found.vectors * found.values
        assert float(rest.norm(dim=0).max()) <= 1e-12 * scale
        # The residuals that it reports are the true ones.
        assert float((found.residuals - rest.norm(dim=0) / scale).abs().max()) <= 1e-12


def test_eigenpairs_in_float32_are_orthonormal_to_float32() -> None:
    K = hk.KroneckerOperator(positive(8).float(), positive(9, 1).float())
    found = K.eigsh(20)
    assert found.values.dtype == found.vectors.dtype == torch.float32
    gram = found.vectors.T @ found.vectors
    assert float((gram - torch.eye(20)).abs().max()) <= 1e-5
    assert float(found.residuals.max()) <= 1e-5


@pytest.mark.parametrize("name", FACTORS)
def test_shifted_solves_away_from_the_poles(name: str) -> None:
    A, B = FACTORS[name]
    K, dense = hk.KroneckerOperator(A, B), dense_of(A, B)
    values = torch.linalg.eigvalsh(dense)
    top = float(values[-1])
    shifts = torch.tensor([-1.0, 2 * abs(top) + 1.0, 3 * abs(top) + 5.0]).double()
    assert float((values[:, None] - shifts).abs().min()) > 0.1 or name == "indefinite"
    if name == "indefinite":
        shifts[0] = float(values[0]) - 1.0
    right = randn(len(dense), 3, seed=4)
    found = K.solve_shifted(right, shifts)
    assert found.shape == right.shape
    eye = torch.eye(len(dense)).double()
    for j, shift in enumerate(shifts):
        expected = torch.linalg.solve(dense - shift * eye, right[:, j])
        assert relative_error(found[:, j], expected) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FACTORS)
def test_shifted_solves_at_the_poles_are_guarded(name: str, dtype: torch.dtype) -> None:
    # At an eigenvalue the difference counts as floor * |shift|; near zero, K's rounding takes over.
    A, B = (factor.to(dtype) for factor in FACTORS[name])
    K = hk.KroneckerOperator(A, B)
    values, vectors = torch.linalg.eigh(dense_of(A, B).double())
    right = vectors[:, -1:].to(dtype)
    for shift in (float(values[-1]), float(values[0]), 0.0):
        found = K.solve_shifted(right, torch.tensor([shift], dtype=dtype))
        assert torch.isfinite(found).all()
    top = float(values[-1])
    if top > 0:
        found = K.solve_shifted(right, torch.tensor([top], dtype=dtype))
        assert float(found.norm()) == pytest.approx(1 / (1e-3 * top), rel=1e-2)


@pytest.mark.parametrize(
    ("A", "B", "error", "message"),
    [
        (torch.eye(2)[:1], torch.eye(3), ValueError, r"A must be \[m, m\], got \[1, 2\]"),
        (torch.ones(2), torch.eye(3), ValueError, r"A must be \[m, m\], got \[2\]"),
        (torch.eye(2), torch.ones(3, 2), ValueError, r"B must be \[d, d\] or .*, got \[3, 2\]"),
        (torch.eye(2), torch.ones(3), ValueError, r"B must be \[d, d\] or .*, got \[3\]"),
        (torch.eye(2), torch.eye(3).double(), ValueError, "agree in dtype and device.*float64"),
        (torch.eye(2), torch.eye(3, device="meta"), ValueError, "agree in dtype and device.*meta"),
        (torch.eye(4), torch.eye(3).expand(3, 3, 3), ValueError, "3 groups, .* divide m = 4"),
        ([[1.0]], torch.eye(3), TypeError, "A must be a tensor, got list"),
        (torch.eye(2), None, TypeError, "B must be a tensor, got NoneType"),
    ],
)
def test_bad_factors(A: Any, B: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.KroneckerOperator(A, B)


@pytest.mark.parametrize("k", [0, -1, 13])
def test_bad_number_of_eigenpairs(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 12\], got {k}"):
        hk.KroneckerOperator(positive(3), positive(4)).eigsh(k)


def every_operator() -> list[hk.CurvatureOperator]:
    case = CASES["relu"]
    model, data = case.model(), case.data()
    return [
        hk.KroneckerOperator(positive(6), positive(4)),
        hk.layer_hessians(model, data, CE, layers="0")["0"],
        hk.AutogradHessian(model, data, CE, params="0.weight"),
    ]


@pytest.mark.parametrize(
    ("vectors", "error", "message"),
    [
        (torch.ones(23).double(), ValueError, r"vectors must be \[24\] or \[24, k\], got \[23\]"),
        (torch.ones(1, 24).double(), ValueError, r"\[24\] or \[24, k\], got \[1, 24\]"),
        (torch.ones(24, 1, 1).double(), ValueError, r"\[24\] or \[24, k\], got \[24, 1, 1\]"),
        (torch.ones(()).double(), ValueError, r"\[24\] or \[24, k\], got \[\]"),
        (torch.ones(24), TypeError, "vectors must be torch.float64, got torch.float32"),
        (
            torch.ones(24, dtype=torch.long),
            TypeError,
            "vectors must be torch.float64, got torch.int64",
        ),
        (torch.ones(24, device="meta").double(), ValueError, "vectors must be on cpu, got meta"),
        (np.ones(24), TypeError, "vectors must be a tensor, got ndarray"),
        ([1.0] * 24, TypeError, "vectors must be a tensor, got list"),
    ],
)
def test_bad_vectors(vectors: Any, error: type[Exception], message: str) -> None:
    for operator in every_operator():
        with pytest.raises(error, match=message):
            _ = operator @ vectors


def test_products_carry_no_graph_and_operators_say_what_they_are() -> None:
    for operator in every_operator():
        vector = torch.ones(24).double().requires_grad_()
        assert not (operator @ vector).requires_grad
        assert type(operator).__name__ in repr(operator)
        assert "24 x 24" in repr(operator)


# Double backward


def torch_hessian(
    model: nn.Module, data: Any, names: list[str], loss: Any = F.cross_entropy
) -> Tensor:
    """Hessian of the mean of batch means in all named parameters together, by torch.func."""
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].numel() for name in names]
    flat = torch.cat([parameters[name].detach().flatten() for name in names])

    def mean_loss(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        overrides = {
            name: part.reshape(parameters[name].shape)
            for name, part in zip(names, parts, strict=True)
        }
        total = vector.new_zeros(())
        for x, y in data:
            outputs = functional_call(model.eval(), overrides, (x,))
            total = total + len(x) * loss(outputs, y)
        return total / sum(len(x) for x, _ in data)

    return torch.func.hessian(mean_loss)(flat).detach()


@pytest.mark.parametrize(
    "names",
    [
        ["0.weight"],
        ["2.weight", "0.weight"],
        ["0.bias", "4.weight", "2.weight"],
        ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"],
    ],
)
@pytest.mark.parametrize("name", ["tanh", "relu", "softplus"])
def test_autograd_hessian_of_several_parameters(name: str, names: list[str]) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    expected = torch_hessian(model, data, names)
    R = hk.AutogradHessian(model, data, CE, params=names)
    assert R.params == names
    assert R.shape == expected.shape
    assert relative_error(R.to_dense(), expected) <= 1e-10
    vector, block = randn(len(expected)), randn(len(expected), 2, seed=1)
    assert relative_error(R @ vector, expected @ vector) <= 1e-10
    assert relative_error(R @ block, expected @ block) <= 1e-10
    assert (R @ torch.zeros(len(expected), 0).double()).shape == (len(expected), 0)
    assert R.trace() == pytest.approx(float(expected.trace()), rel=1e-10)
    assert relative_error(R.diagonal(), expected.diagonal()) <= 1e-10


def test_autograd_hessian_of_all_parameters_frozen_ones_too() -> None:
    case = CASES["tanh"]
    model, data = case.model(), case.data()
    names = [name for name, _ in model.named_parameters()]
    expected = torch_hessian(model, data, names)
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    R = hk.AutogradHessian(model, data, CE)
    assert R.params == names
    assert relative_error(R.to_dense(), expected) <= 1e-10
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["layer norm", "batch norm", "attention", "twice", "conv groups"])
def test_autograd_hessian_of_other_networks(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), case.data()
    names = [n for n, _ in model.named_parameters()][:2]
    expected = torch_hessian(model, data, names)
    R = hk.AutogradHessian(model, data, CE, params=names)
    assert relative_error(R.to_dense(), expected) <= 1e-10


def test_autograd_hessian_counts_a_tied_weight_with_all_its_uses() -> None:
    case = CASES["tied"]
    model, data = case.model(), case.data()
    R = hk.AutogradHessian(model, data, CE, params=["first.weight"])
    expected = torch_hessian(model, data, ["first.weight"])
    assert relative_error(R.to_dense(), expected) <= 1e-10


def test_autograd_hessian_through_fused_attention() -> None:
    def attend(h: Tensor) -> Tensor:
        h = h.reshape(-1, 3, 2)
        return F.scaled_dot_product_attention(h, h, h).flatten(1)

    model = seeded(Between(attend))
    data = [(randn(4, 4), classes(4, c=3))]
    R = hk.AutogradHessian(model, data, CE, params=["a.weight"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch_hessian(model, data, ["a.weight"])
    assert relative_error(R.to_dense(), expected) <= 1e-10


def test_autograd_hessian_with_weights() -> None:
    case = CASES["tanh"]
    model, data = case.model(), case.data()
    weights = [randn(4, seed=1).abs(), randn(3, seed=2).abs()]
    weights[0][2] = 0
    total = float(torch.cat(weights).sum())
    expected = sum(
        float(w[n]) / total * torch_hessian(model, [(x[n : n + 1], y[n : n + 1])], ["0.weight"])
        for (x, y), w in zip(data, weights, strict=True)
        for n in range(len(x))
    )
    in_data = [(x, y, w) for (x, y), w in zip(data, weights, strict=True)]
    for R in (
        hk.AutogradHessian(model, in_data, CE, params="0.weight"),
        hk.AutogradHessian(model, data, CE, params="0.weight", sample_weight=torch.cat(weights)),
    ):
        assert relative_error(R.to_dense(), expected) <= 1e-10
    for bad, message in (
        (torch.ones(6), "6 entries but the data has 7 samples"),
        (torch.ones(8), "8 entries but the data has 7 samples"),
        (-torch.ones(7), "sample_weight must be finite and non-negative, got -1"),
        (torch.full((7,), torch.nan), "sample_weight must be finite and non-negative, got nan"),
    ):
        R = hk.AutogradHessian(model, data, CE, params="0.weight", sample_weight=bad)
        with pytest.raises(ValueError, match=message):
            _ = R @ torch.ones(24).double()
    wrong = [(x, y, torch.ones(2)) for x, y in data]
    R = hk.AutogradHessian(model, wrong, CE, params="0.weight")
    with pytest.raises(
        ValueError, match=r"sample_weight must be \[N\] = \[4\] per batch, got \[2\]"
    ):
        _ = R @ torch.ones(24).double()


def test_autograd_hessian_where_there_is_no_curvature() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = seeded(Partly())
    data = [(randn(4, 4), randn(4, 3, seed=1))]
    R = hk.AutogradHessian(model, data, nn.MSELoss(), params=["unused.weight"])
    assert torch.equal(R @ torch.ones(8).double(), torch.zeros(8).double())
    both = hk.AutogradHessian(model, data, nn.MSELoss(), params=["unused.bias", "used.bias"])
    expected = torch.zeros(5, 5).double()
    expected[2:, 2:] = 2 / 3 * torch.eye(3).double()
    assert relative_error(both.to_dense(), expected) <= 1e-12


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_autograd_hessian_in_the_callers_gradient_mode(context: Any) -> None:
    case = CASES["tanh"]
    model, data = case.model(), case.data()
    R = hk.AutogradHessian(model, data, CE, params="2.weight")
    expected = R.to_dense()
    with context():
        vector = randn(len(expected))
        assert relative_error(R @ vector, expected @ vector) <= 1e-12
        assert torch.equal(R.to_dense(), expected)


def test_autograd_hessian_float32_and_empty_batches() -> None:
    case = CASES["tanh"]
    model, data = case.model(torch.float32), case.data(torch.float32)
    x, y = data[0]
    R = hk.AutogradHessian(model, [(x[:0], y[:0]), *data], CE, params="0.weight")
    assert R.dtype == torch.float32
    wide = [(x.double(), y) for x, y in data]
    expected = torch_hessian(case.model(torch.float32).double(), wide, ["0.weight"])
    assert relative_error(R.to_dense(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"params": ["0.wieght"]},
            ValueError,
            "params: the model has no parameter '0.wieght'; it has 0.weight",
        ),
        ({"params": ["0.weight", "9.bias"]}, ValueError, "no parameter '9.bias'"),
        ({"params": []}, ValueError, "params must name at least one parameter"),
        ({"data": iter([])}, ValueError, "data must be re-iterable"),
        ({"data": 3}, TypeError, "data must be an iterable of .*, got int"),
        ({"data": torch.ones(3)}, TypeError, "data must be an iterable of .*, got Tensor"),
        ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module, got function"),
        ({"progress": "yes"}, TypeError, "progress must be a bool or a callable, got str"),
    ],
)
def test_autograd_hessian_bad_arguments(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = CASES["tanh"]
    arguments: dict[str, Any] = {"model": case.model(), "data": case.data(), "loss": CE, **change}
    with pytest.raises(error, match=message):
        hk.AutogradHessian(**arguments)


def test_autograd_hessian_of_no_data() -> None:
    R = hk.AutogradHessian(CASES["tanh"].model(), [], CE, params="0.weight")
    with pytest.raises(ValueError, match="data yielded no samples"):
        _ = R @ torch.ones(24).double()


def test_progress_of_products() -> None:
    case = CASES["tanh"]
    seen: list[tuple[str, int, int | None]] = []
    R = hk.AutogradHessian(
        case.model(), case.data(), CE, params="0.weight", progress=lambda *e: seen.append(e)
    )
    _ = R @ torch.ones(24).double()
    assert [(done, total) for _, done, total in seen] == [(1, 2), (2, 2)]
