"""K-FAC's factored damping against its definition on dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from dense import relative_error
from hypothesis import given
from hypothesis import strategies as st
from kronecker_cases import positive
from networks import randn
from torch import Tensor

import hesskern as hk


def definition(A: Tensor, B: Tensor, damping: float) -> Tensor:
    """[m d, m d] block by block, by numpy-like inverses of the dense factors."""
    blocks = B if B.dim() == 3 else B[None]
    step, d = len(A) // len(blocks), B.shape[-1]
    parts = []
    for i, b in enumerate(blocks):
        a = A[i * step : (i + 1) * step, i * step : (i + 1) * step]
        pi = math.sqrt((float(a.trace()) / step) / (float(b.trace()) / d))
        left = a + pi * math.sqrt(damping) * torch.eye(step).double()
        right = b + math.sqrt(damping) / pi * torch.eye(d).double()
        parts.append(torch.kron(torch.linalg.inv(left), torch.linalg.inv(right)))
    return torch.block_diag(*parts)


@given(
    m=st.integers(1, 4),
    d=st.integers(1, 5),
    groups=st.integers(0, 3),
    damping=st.sampled_from((1e-3, 0.1, 3.0)),
    double=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_equals_its_definition(
    m: int, d: int, groups: int, damping: float, double: bool, transposed: bool, seed: int
) -> None:
    dtype, bound = (torch.float64, 1e-11) if double else (torch.float32, 1e-5)
    A = positive(m * max(groups, 1), seed).to(dtype)
    B = torch.stack([positive(d, seed + i) for i in range(groups)]) if groups else positive(d, 9)
    B = B.to(dtype)
    inverse = hk.KroneckerOperator(A, B, transposed=transposed).factored_inverse(damping)
    assert isinstance(inverse, hk.KroneckerOperator)
    assert (inverse.dtype, inverse.transposed, inverse.groups) == (dtype, transposed, groups or 1)
    expected = definition(A.double(), B.double(), damping)
    plain = hk.KroneckerOperator(inverse.A, inverse.B)
    assert relative_error(plain.to_dense(), expected) <= bound
    vector = randn(*inverse.layer_shape, seed=3).to(dtype)
    kept = vector.T if transposed else vector
    found = (inverse @ kept.flatten()).unflatten(0, inverse.weight_shape)
    found = found.T if transposed else found
    product = (expected @ vector.double().flatten()).unflatten(0, inverse.layer_shape)
    assert relative_error(found, product) <= bound


def test_mean_is_a_tenth_of_the_mean_eigenvalue() -> None:
    K = hk.KroneckerOperator(positive(4), positive(5, 1))
    number = 0.1 * float(torch.linalg.eigvalsh(K.to_dense()).mean())
    expected = definition(K.A, K.B, number)
    assert relative_error(K.factored_inverse("mean").to_dense(), expected) <= 1e-12


def test_without_damping_it_is_the_inverse() -> None:
    K = hk.KroneckerOperator(positive(4), positive(5, 1))
    expected = torch.linalg.inv(K.to_dense())
    assert relative_error(K.factored_inverse(0).to_dense(), expected) <= 1e-9


def test_a_dead_layer_has_the_damping_alone() -> None:
    zero = torch.zeros(3, 3)
    inverse = hk.KroneckerOperator(zero, zero).factored_inverse(0.25)
    assert relative_error(inverse.to_dense(), 4 * torch.eye(9)) <= 1e-6
    half = hk.KroneckerOperator(zero, 2 * torch.eye(3)).factored_inverse(0.25)
    assert relative_error(half.to_dense(), torch.eye(9) / (0.5 * 2.5)) <= 1e-6


def test_eigenvalues_below_zero_by_rounding_count_as_zero() -> None:
    A = torch.diag(torch.tensor([1.0, 0.5, -1e-7]))
    inverse = hk.KroneckerOperator(A, torch.eye(2)).factored_inverse(1e-16)
    pi = math.sqrt(float(A.double().trace()) / 3)
    expected = 1 / (pi * 1e-8 * (1 + 1e-8 / pi))
    assert float(inverse.to_dense().max()) == pytest.approx(expected, rel=1e-5)


BAD_DAMPING = [
    (-0.1, ValueError, r"damping must be finite and >= 0, got -0\.1 for layer 'fc'"),
    (math.nan, ValueError, "damping must be finite and >= 0, got nan"),
    (math.inf, ValueError, "damping must be finite and >= 0, got inf"),
    ("trace", ValueError, "damping must be a number or 'mean', got 'trace'"),
    (None, TypeError, "damping must be a number or 'mean', got NoneType"),
    (True, TypeError, "damping must be a number or 'mean', got bool"),
]


@pytest.mark.parametrize(("damping", "error", "message"), BAD_DAMPING)
def test_bad_damping(damping: object, error: type[Exception], message: str) -> None:
    K = hk.KroneckerOperator(torch.eye(2), torch.eye(3), name="fc")
    with pytest.raises(error, match=message):
        K.factored_inverse(damping)


def test_what_has_no_inverse_is_refused_by_name() -> None:
    low = positive(4, rank=2)
    cases = [
        (low, positive(3), 0.0, r"damping > 0: A of layer 'fc' is singular, of rank 2 of 4"),
        (positive(3), low, 0.0, r"damping > 0: B of layer 'fc' is singular, of rank 2 of 4"),
        (torch.diag(torch.tensor([2.0, -1.0])).double(), positive(3), 0.01, "eigenvalue -1, and"),
        (torch.eye(2), torch.full((2, 2), math.nan), 0.1, "B of layer 'fc' holds NaN or Inf"),
        (torch.zeros(2, 2), torch.eye(2), 1e-90, "too small for layer 'fc': .* torch.float32"),
    ]
    for A, B, damping, message in cases:
        with pytest.raises(ValueError, match=message):
            hk.KroneckerOperator(A, B, name="fc").factored_inverse(damping)
    with pytest.raises(ValueError, match=r"the trace of layer 'fc' is 0: give a number"):
        hk.KroneckerOperator(torch.zeros(2, 2), torch.eye(2), name="fc").factored_inverse("mean")
