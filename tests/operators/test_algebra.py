"""solve, power, logdet and sample of single layers against dense float64 matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dense import relative_error
from hypothesis import given
from hypothesis import strategies as st
from kronecker_cases import LAYERS, corrected, dense_kronecker, kronecker, positive, power, shifted
from networks import generator, randn

import hesskern as hk

DTYPES = [torch.float32, torch.float64]
BOUND = {torch.float32: 1e-5, torch.float64: 1e-11}
layers = pytest.mark.parametrize("name", LAYERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@dtypes
@layers
@pytest.mark.parametrize("damping", [0.02, 1.0, 30, np.float32(0.5)])
def test_solve(name: str, dtype: torch.dtype, damping: float) -> None:
    made = LAYERS[name](dtype)
    inverse = torch.linalg.inv(shifted(made.dense, float(damping)))
    size = len(made.dense)
    for right in (randn(size), randn(size, 3, seed=1), randn(size, 0), randn(size, 8)[:, ::2]):
        right = right.to(dtype)
        found = made.operator.solve(right, damping)
        assert (found.shape, found.dtype) == (right.shape, dtype)
        assert relative_error(found, inverse @ right.double()) <= BOUND[dtype]


@dtypes
@layers
@pytest.mark.parametrize("p", [-1, -0.5, 0.5, 2, 1 / 3, 0, -2.0])
def test_power(name: str, dtype: torch.dtype, p: float) -> None:
    made = LAYERS[name](dtype)
    found = made.operator.power(p, 0.1)
    expected = power(shifted(made.dense, 0.1), p)
    assert relative_error(found.to_dense(), expected) <= BOUND[dtype]
    vector = randn(len(expected), seed=2)
    assert relative_error(found @ vector.to(dtype), expected @ vector) <= BOUND[dtype]
    assert found.trace() == pytest.approx(float(expected.trace()), rel=BOUND[dtype])
    assert relative_error(found.diagonal(), expected.diagonal()) <= BOUND[dtype]
    # It has powers itself.
    assert relative_error((found.power(-1)).to_dense(), power(expected, -1)) <= BOUND[dtype]


@dtypes
@layers
def test_logdet(name: str, dtype: torch.dtype) -> None:
    made = LAYERS[name](dtype)
    for damping in (0.05, 2.0):
        expected = float(torch.linalg.slogdet(shifted(made.dense, damping)).logabsdet)
        assert made.operator.logdet(damping) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@layers
def test_mean_is_a_tenth_of_the_mean_eigenvalue(name: str) -> None:
    made = LAYERS[name](torch.float64)
    number = 0.1 * float(torch.linalg.eigvalsh(made.dense).mean())
    vector = randn(len(made.dense))
    expected = torch.linalg.solve(shifted(made.dense, number), vector)
    assert relative_error(made.operator.solve(vector, "mean"), expected) <= 1e-11
    logdet = float(torch.linalg.slogdet(shifted(made.dense, number)).logabsdet)
    assert made.operator.logdet("mean") == pytest.approx(logdet, rel=1e-10, abs=1e-10)


@dtypes
@layers
def test_sample_has_the_covariance_of_the_inverse(name: str, dtype: torch.dtype) -> None:
    """X = F z for the generator's own z: F F^T is the inverse, whatever the root F."""
    made = LAYERS[name](dtype)
    size = len(made.dense)
    drawn = made.operator.sample(2 * size, 0.1, generator(3)).double()
    assert drawn.shape == (size, 2 * size)
    _, _, values = made.operator.eigenbases
    source = generator(3)
    parts = [torch.randn(2 * size, *s.shape, dtype=dtype, generator=source) for s in values]
    z = torch.cat([part.flatten(1) for part in parts], 1).double()
    root = torch.linalg.lstsq(z, drawn.T).solution.T
    assert relative_error(root @ z.T, drawn) <= BOUND[dtype]
    expected = torch.linalg.inv(shifted(made.dense, 0.1))
    assert relative_error(root @ root.T, expected) <= 10 * BOUND[dtype]


def test_sample_statistics() -> None:
    made = LAYERS["groups"](torch.float64)
    expected = torch.linalg.inv(shifted(made.dense, 0.5))
    n = 40_000
    drawn = made.operator.sample(n, 0.5, generator(0))
    deviation = expected.diagonal().sqrt()
    assert float((drawn.mean(1) / deviation).abs().max()) < 5 / math.sqrt(n)
    covariance = drawn @ drawn.T / n
    # Entries of a sample covariance deviate by sqrt((C_ii C_jj + C_ij^2) / n).
    spread = (torch.outer(deviation, deviation).square() + expected.square()).sqrt()
    assert float(((covariance - expected) / spread).abs().max()) < 5 / math.sqrt(n)


def test_sample_is_its_generators() -> None:
    K = LAYERS["plain"](torch.float32).operator
    first, again = (K.sample(4, 0.1, generator(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, K.sample(4, 0.1, generator(8)))
    source = generator(7)
    K.sample(4, 0.1, source)
    assert not torch.equal(first, K.sample(4, 0.1, source))
    torch.manual_seed(5)
    default = K.sample(2, 0.1)
    torch.manual_seed(5)
    assert torch.equal(default, K.sample(2, 0.1))
    assert K.sample(0, 0.1).shape == (20, 0)


@given(
    m=st.integers(1, 4),
    d=st.integers(1, 5),
    groups=st.integers(0, 3),
    transposed=st.booleans(),
    double=st.booleans(),
    damping=st.floats(0.05, 10),
    p=st.floats(-2, 2),
    k=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_any_shape(
    m: int, d: int, groups: int, transposed: bool, double: bool, damping: float, p: float, k: int,
    seed: int,
) -> None:  # fmt: skip
    dtype = torch.float64 if double else torch.float32
    B = torch.stack([positive(d, seed + i) for i in range(groups)]) if groups else positive(d, seed)
    made = kronecker(positive(m * max(groups, 1), seed + 20), B, dtype, transposed)
    K, dense = made.operator, shifted(made.dense, damping)
    right = randn(len(dense), k, seed=seed).to(dtype)
    found = K.solve(right, damping)
    assert relative_error(found, torch.linalg.solve(dense, right.double())) <= BOUND[dtype]
    raised = K.power(p, damping) @ right
    assert relative_error(raised, power(dense, p) @ right.double()) <= BOUND[dtype]
    logdet = float(torch.linalg.slogdet(dense).logabsdet)
    assert K.logdet(damping) == pytest.approx(logdet, rel=1e-5, abs=1e-5)


# Eigenvalues at and below zero


@dtypes
def test_without_damping(dtype: torch.dtype) -> None:
    for name in ("plain", "ekfac"):
        made = LAYERS[name](torch.float64)
        vector = randn(len(made.dense))
        expected = torch.linalg.solve(made.dense, vector)
        assert relative_error(made.operator.solve(vector, 0), expected) <= 1e-9
        logdet = float(torch.linalg.slogdet(made.dense).logabsdet)
        assert made.operator.logdet(0) == pytest.approx(logdet, rel=1e-9)
    # As long as each factor is invertible, K is, also where its eigenvalues span more than eps.
    A, B = (torch.diag(torch.tensor([1.0, 1e-5])).to(dtype) for _ in range(2))
    found = hk.KroneckerOperator(A, B).solve(torch.ones(4, dtype=dtype), 0.0)
    assert relative_error(found, torch.tensor([1.0, 1e5, 1e5, 1e10]).double()) <= 1e-6


@dtypes
def test_eigenvalues_below_zero_by_rounding_count_as_zero(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    A = torch.diag(torch.tensor([1.0, 0.5, -2 * eps], dtype=dtype))
    K = hk.KroneckerOperator(A, torch.eye(2, dtype=dtype))
    # Ascending, as A's own.
    E = hk.CorrectedOperator(K, A.diagonal().flip(0)[:, None].expand(3, 2))
    vector = torch.zeros(6, dtype=dtype)
    vector[4] = 1.0
    for operator in (K, E):
        # Not 1 / (damping - 2 eps).
        damping = 2.5 * eps
        assert float(operator.solve(vector, damping)[4]) == pytest.approx(1 / damping, rel=1e-5)
        assert float((operator.power(0.5) @ vector).abs().max()) == 0.0
        expected = 2 * sum(math.log(x + 0.1) for x in (1.0, 0.5, 0.0))
        assert operator.logdet(0.1) == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match="the operator is singular, of rank 4 of 6"):
            operator.solve(vector, 0)
        # What is known of small positive ones is kept.
    small = hk.CorrectedOperator(K, torch.tensor([[1.0, 1e-12]] * 3, dtype=dtype))
    assert float(small.power(0.5).eigenbases[2][0][0, 1]) == pytest.approx(1e-6, rel=1e-5)


def test_negative_eigenvalues_where_they_are_defined() -> None:
    made = kronecker(positive(3) - 0.9 * torch.eye(3).double(), positive(4, 1), torch.float64)
    values = torch.linalg.eigvalsh(made.dense)
    assert float(values[0]) < -0.1
    vector = randn(12)
    for damping in (0.0, 0.05):
        expected = torch.linalg.solve(shifted(made.dense, damping), vector)
        assert relative_error(made.operator.solve(vector, damping), expected) <= 1e-9
    square = made.operator.power(2).to_dense()
    assert relative_error(square, made.dense @ made.dense) <= 1e-12
    least, gap = float(values[0]), 1e-3
    beyond = -least + gap
    expected = torch.linalg.slogdet(shifted(made.dense, beyond)).logabsdet
    assert made.operator.logdet(beyond) == pytest.approx(float(expected), rel=1e-6)
    for call in (
        lambda: made.operator.logdet(-least - gap),
        lambda: made.operator.power(0.5, -least - gap),
        lambda: made.operator.power(-0.5),
        lambda: made.operator.sample(1, 0.0),
    ):
        with pytest.raises(ValueError, match=rf"is {least:.3g} .* give one above {-least:.3g}"):
            call()
    with pytest.raises(ValueError, match="has an eigenvalue within rounding of -"):
        made.operator.solve(vector, -least)


SINGULAR = [
    ("solve", lambda K: K.solve(torch.ones(20).double(), 0.0)),
    ("logdet", lambda K: K.logdet(0)),
    (r"power\(-1\)", lambda K: K.power(-1)),
    (r"power\(-0.5\)", lambda K: K.power(-0.5)),
    ("sample", lambda K: K.sample(1, 0.0)),
]


@pytest.mark.parametrize(("what", "call"), SINGULAR, ids=[what for what, _ in SINGULAR])
def test_singular_without_damping_is_refused(what: str, call: Any) -> None:
    made = kronecker(positive(4, rank=2), positive(5, 1, rank=3), torch.float64, name="fc1")
    zeros = randn(4, 5, seed=3).square()
    zeros[0, :2] = 0.0
    E = corrected(made.operator, zeros).operator  # type: ignore[arg-type]
    for operator, rank in ((made.operator, 6), (E, 18)):
        message = rf"{what} needs damping > 0: layer 'fc1' is singular, of rank {rank} of 20"
        with pytest.raises(ValueError, match=message):
            call(operator)
    assert bool(made.operator.power(0.5).to_dense().isfinite().all())


# Bad input


CALLS = {
    "solve": lambda K, damping: K.solve(torch.ones(6), damping),
    "power": lambda K, damping: K.power(0.5, damping),
    "logdet": lambda K, damping: K.logdet(damping),
    "sample": lambda K, damping: K.sample(1, damping),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("damping", "error", "message"),
    [
        (-0.5, ValueError, r"damping must be finite and >= 0, got -0\.5 for layer 'fc'"),
        (math.nan, ValueError, "damping must be finite and >= 0, got nan for layer 'fc'"),
        (math.inf, ValueError, "damping must be finite and >= 0, got inf"),
        ("median", ValueError, "damping must be a number or 'mean', got 'median'"),
        (None, TypeError, "damping must be a number or 'mean', got NoneType"),
        (torch.tensor(0.1), TypeError, "damping must be a number or 'mean', got Tensor"),
        (True, TypeError, "damping must be a number or 'mean', got bool"),
    ],
)
def test_bad_damping(call: str, damping: Any, error: type[Exception], message: str) -> None:
    K = hk.KroneckerOperator(torch.eye(2), torch.eye(3), name="fc")
    with pytest.raises(error, match=message):
        CALLS[call](K, damping)


@pytest.mark.parametrize("call", CALLS)
def test_mean_of_nothing_is_refused(call: str) -> None:
    K = hk.KroneckerOperator(torch.zeros(2, 2), torch.eye(3), name="dead")
    with pytest.raises(ValueError, match="the trace of layer 'dead' is 0: give a number"):
        CALLS[call](K, "mean")


def test_what_passes_the_range_of_the_dtype_is_refused() -> None:
    K = hk.KroneckerOperator(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(3), name="fc")
    with pytest.raises(ValueError, match="damping of 1e-39 is too small for layer 'fc': solve"):
        K.solve(torch.ones(6), 1e-39)
    with pytest.raises(ValueError, match=r"power\(-3\) of layer 'fc' passes the range of torch.fl"):
        K.power(-3, 1e-20)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (math.nan, ValueError, "p must be finite, got nan"),
        (math.inf, ValueError, "p must be finite, got inf"),
        ("half", TypeError, "p must be a number, got str"),
        (True, TypeError, "p must be a number, got bool"),
    ],
)
def test_bad_exponents(p: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.KroneckerOperator(torch.eye(2), torch.eye(3)).power(p)


@pytest.mark.parametrize(
    ("n", "source", "error", "message"),
    [
        (-1, None, ValueError, "n must be >= 0, got -1"),
        (2.0, None, TypeError, "n must be an int, got float"),
        (1, 7, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_draws(n: Any, source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.KroneckerOperator(torch.eye(2), torch.eye(3)).sample(n, 0.1, source)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_vectors(bad: float) -> None:
    K = hk.KroneckerOperator(torch.eye(2), torch.eye(3), name="fc")
    block = torch.ones(6, 2)
    block[3, 1] = bad
    with pytest.raises(ValueError, match="finite, but those of layer 'fc' hold NaN or Inf"):
        K.solve(block, 0.1)
    with pytest.raises(TypeError, match=r"vectors must be torch.float32, got torch.float64"):
        K.solve(block.double(), 0.1)
    with pytest.raises(ValueError, match=r"vectors must be \[6\] or \[6, k\], got \[5\]"):
        K.solve(torch.ones(5), 0.1)
    with pytest.raises(ValueError, match="vectors must be on cpu, got meta"):
        K.solve(torch.ones(6, device="meta"), 0.1)


def test_factors_and_eigenvalues_that_are_not_finite_are_refused_by_name() -> None:
    broken = torch.eye(3)
    broken[1, 1] = math.nan
    with pytest.raises(ValueError, match="B of layer 'fc' holds NaN or Inf"):
        hk.KroneckerOperator(torch.eye(2), broken, name="fc").solve(torch.ones(6), 0.1)
    K = hk.KroneckerOperator(torch.eye(3), torch.eye(3), name="fc")
    with pytest.raises(ValueError, match="eigenvalues of layer 'fc' hold NaN or Inf"):
        hk.CorrectedOperator(K, broken).logdet(0.1)


def test_no_graph_and_no_trace_of_the_caller() -> None:
    A = positive(3).requires_grad_()
    K = hk.KroneckerOperator(A, positive(4, 1))
    found = K.solve(torch.ones(12).double().requires_grad_(), 0.1)
    assert not found.requires_grad
    with torch.inference_mode():
        inside = K.solve(torch.ones(12).double(), 0.1)
        drawn = K.sample(2, 0.1, generator(0))
    assert torch.equal(inside, found)
    assert not drawn.requires_grad
    assert not drawn.is_inference()
    dense = shifted(dense_kronecker(K.A.detach(), K.B), 0.1)
    assert relative_error(found, torch.linalg.solve(dense, torch.ones(12).double())) <= 1e-11
