"""Eigensolvers against dense eigendecompositions, ARPACK, and their own promises."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Counting, check, layer, spectra, symmetric, wanted
from torch import Tensor

from hesskern import KroneckerOperator
from hesskern.solvers.eigsh import eigsh


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(spectra(300)))
def test_agrees_with_the_dense_solution(name: str, dtype: torch.dtype, which: str) -> None:
    matrix = symmetric(spectra(300)[name], dtype=dtype)
    operator = Counting(matrix)
    result = eigsh(operator, 8, which=which, tol=1e-4, max_matvecs=20_000)
    check(matrix, result, 8, which, 1e-4)
    assert result.matvecs == operator.count


@pytest.mark.parametrize("multiplicity", [2, 5, 12])
def test_finds_every_copy_of_a_repeated_eigenvalue(multiplicity: int) -> None:
    size = 400
    tail = 0.95 ** torch.arange(size - multiplicity, dtype=torch.float64)
    matrix = symmetric(torch.cat([torch.full((multiplicity,), 3.0).double(), tail]))
    k = multiplicity + 3
    result = eigsh(Counting(matrix), k, tol=1e-6)
    check(matrix, result, k, "LA", 1e-6)
    assert int((result.values > 2).sum()) == multiplicity


def test_sees_what_the_start_vector_has_no_component_in() -> None:
    size = 300
    diagonal = torch.linspace(1, 0, size, dtype=torch.float64)
    diagonal[7] = 5.0
    start = torch.ones(size, 1, dtype=torch.float64)
    start[7] = 0.0
    result = eigsh(Counting(torch.diag(diagonal)), 3, start=start, tol=1e-6)
    assert float(result.values[0]) == pytest.approx(5.0)


def test_agrees_with_arpack() -> None:
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(600, 200, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T / 200
    for which in ("LA", "LM"):
        result = eigsh(Counting(matrix), 12, which=which, tol=1e-8)
        reference = scipy.sparse.linalg.eigsh(
            scipy.sparse.linalg.LinearOperator(
                matrix.shape, matvec=lambda v: matrix.numpy() @ v, dtype=np.float64
            ),
            k=12,
            which=which,
            v0=np.ones(600),
        )[0]
        torch.testing.assert_close(result.values, torch.from_numpy(reference[::-1].copy()))


def test_restarts_many_times_and_stays_true() -> None:
    # a one-dimensional Laplacian: the smallest eigenvalues are close to each other
    size = 250
    matrix = 2 * torch.eye(size) - torch.diag(torch.ones(size - 1), 1)
    matrix = matrix - torch.diag(torch.ones(size - 1), -1)
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        operator = Counting(matrix.to(dtype))
        result = eigsh(operator, 3, which="SA", tol=tol)
        check(operator.matrix, result, 3, "SA", tol)
        exact = 2 - 2 * torch.cos(torch.arange(1, 4).double() * math.pi / (size + 1))
        torch.testing.assert_close(result.values.double(), exact, rtol=0, atol=4 * tol)
        assert operator.count > 3 * 46  # more than three bases full


def test_small_problems_are_solved_densely() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 40))
    for operand in (matrix, Counting(matrix)):
        for k in (1, 39, 40):
            result = eigsh(operand, k)
            check(matrix, result, k, "LA", 1e-12)
            assert result.matvecs == 40
    large = symmetric(torch.linspace(0, 1, 300))
    assert eigsh(Counting(large), 150).matvecs == 300


def test_uses_to_dense_where_it_is_offered() -> None:
    class Formed(Counting):
        def to_dense(self) -> Tensor:
            return self.matrix

    operator = Formed(symmetric(torch.linspace(0, 1, 50)))
    result = eigsh(operator, 5)
    assert operator.count == 0
    assert result.matvecs == 50


def test_one_by_one() -> None:
    result = eigsh(torch.tensor([[-3.0]]), 1)
    assert result.values.tolist() == [-3.0]
    assert result.converged


def test_equal_seeds_give_equal_results() -> None:
    matrix = symmetric(0.97 ** torch.arange(400), dtype=torch.float32)
    first, second = (eigsh(Counting(matrix), 10, seed=5) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.residuals, second.residuals)
    other = eigsh(Counting(matrix), 10, seed=6)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [10, 11, 25, 61])
@pytest.mark.parametrize("start", ["none", "block", "kronecker"])
def test_stops_at_the_limit_of_products(budget: int, start: str) -> None:
    K = KroneckerOperator(*(symmetric(torch.linspace(0.1, 1, n)) for n in (16, 20)))
    H = K.to_dense() + 0.02 * symmetric(torch.linspace(-1, 1, 320), seed=1)
    begin = {"none": None, "block": torch.eye(320)[:, :7], "kronecker": K}[start]
    operator = Counting(H)
    with pytest.warns(RuntimeWarning, match=r"limit of \d+ products.*worst residual is .*tol"):
        result = eigsh(operator, 10, tol=1e-12, start=begin, max_matvecs=budget)
    assert not result.converged
    assert operator.count == result.matvecs == budget
    vectors = result.vectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(10, dtype=H.dtype))
    fresh = (H @ vectors - vectors * result.values).norm(dim=0) / result.values[0]
    torch.testing.assert_close(result.residuals, fresh, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("scale", [1e30, 1e-18, 1e-22, 1e-30])
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_scales_whose_squares_leave_float32(scale: float, which: str) -> None:
    matrix = scale * symmetric(0.8 ** torch.arange(300), dtype=torch.float32)
    result = eigsh(Counting(matrix), 6, which)
    check(matrix, result, 6, which, 1e-4)
    vectors, values = result.vectors.double(), result.values.double()
    true = (matrix.double() @ vectors - vectors * values).norm(dim=0) / values[0].abs()
    # Such residuals are what is claimed, not what is left of their squares.
    assert torch.all(result.residuals.double() >= 0.5 * true - 1e-6)


@pytest.mark.parametrize("k", [1, 20])
def test_a_tolerance_below_rounding_ends_with_a_warning(k: int) -> None:
    matrix = symmetric(0.97 ** torch.arange(500), dtype=torch.float32)
    operator = Counting(matrix)
    with pytest.warns(RuntimeWarning, match=r"rounding of torch.float32.*worst residual"):
        result = eigsh(operator, k, tol=1e-9)
    assert not result.converged
    assert operator.count < 600
    assert float(result.residuals.max()) < 2e-6
    assert float((result.values.double() - wanted(matrix, k, "LA")[0]).abs().max()) < 2e-6


def test_the_pruning_bound_is_added_and_does_not_decide() -> None:
    matrix = symmetric(0.9 ** torch.arange(200))
    plain = eigsh(Counting(matrix), 5)
    pruned = Counting(matrix)
    pruned.pruning_error = 0.25
    result = eigsh(pruned, 5)
    assert result.converged
    torch.testing.assert_close(result.residuals, plain.residuals + 0.25 / plain.values[0])


def test_progress_counts_converged_pairs() -> None:
    seen: list[tuple[str, int, int | None]] = []
    matrix = symmetric(0.9 ** torch.arange(300))
    eigsh(Counting(matrix), 6, progress=lambda *event: seen.append(event))
    assert seen[-1] == ("eigsh", 6, 6)
    assert all(name == "eigsh" and 0 <= done <= 6 and total == 6 for name, done, total in seen)
    assert len(seen) > 3


# starts


@pytest.mark.parametrize("distance", [0.003, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("k", [6, 20])
def test_a_kronecker_start_never_costs_more_than_lanczos(distance: float, k: int) -> None:
    H, K = layer(distance)
    plain = eigsh(Counting(H), k)
    operator = Counting(H)
    started = eigsh(operator, k, start=K)
    check(H, started, k, "LA", 1e-4)
    assert started.matvecs == operator.count
    assert started.matvecs <= plain.matvecs + 2


def test_a_near_kronecker_start_saves_products() -> None:
    H, K = layer(0.003)
    plain, started = eigsh(Counting(H), 30), eigsh(Counting(H), 30, start=K)
    check(H, started, 30, "LA", 1e-4)
    assert started.matvecs < 0.8 * plain.matvecs


def test_an_exact_kronecker_start_costs_a_product_per_pair() -> None:
    _, K = layer(0.0)
    result = eigsh(Counting(K.to_dense()), 12, start=K)
    check(K.to_dense(), result, 12, "LA", 1e-4)
    assert result.matvecs <= 12 + 20


def test_a_kronecker_start_finds_what_kronecker_hides() -> None:
    H, K = layer(0.003)
    direction = torch.zeros(len(H), dtype=torch.float64)
    direction[-1] = 1.0
    H = H + 2 * float(torch.linalg.eigvalsh(H)[-1]) * torch.outer(direction, direction)
    result = eigsh(Counting(H), 10, start=K)
    check(H, result, 10, "LA", 1e-4)


def test_a_kronecker_start_with_groups() -> None:
    generator = torch.Generator().manual_seed(4)
    factors = torch.randn(2, 30, 30, generator=generator, dtype=torch.float64)
    K = KroneckerOperator(symmetric(0.7 ** torch.arange(12)), factors @ factors.mT)
    result = eigsh(Counting(K.to_dense()), 15, start=K, tol=1e-8)
    check(K.to_dense(), result, 15, "LA", 1e-8)


def test_good_start_vectors_save_products() -> None:
    matrix = symmetric(0.97 ** torch.arange(500))
    exact = torch.linalg.eigh(matrix)[1].flip(1)[:, :10]
    noise = torch.randn(500, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = eigsh(Counting(matrix), 10)
    started = eigsh(Counting(matrix), 10, start=exact + 1e-6 * noise)
    check(matrix, started, 10, "LA", 1e-4)
    assert started.matvecs <= 10 + 20
    assert started.matvecs < plain.matvecs


@pytest.mark.parametrize("columns", [1, 3, 10, 40, 300])
def test_any_start_vectors_lead_to_the_result(columns: int) -> None:
    matrix = symmetric(0.95 ** torch.arange(300))
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(300, columns, generator=generator)
    check(matrix, eigsh(Counting(matrix), 10, start=start), 10, "LA", 1e-4)


def test_useless_start_vectors_do_no_harm() -> None:
    matrix = symmetric(0.95 ** torch.arange(300))
    repeated = torch.ones(300, 5, dtype=torch.float64)
    for start in (torch.zeros(300, 2), repeated, -repeated[:, :1]):
        check(matrix, eigsh(Counting(matrix), 10, start=start), 10, "LA", 1e-4)


# bad input


class Broken(Counting):
    def __init__(self, kind: str) -> None:
        super().__init__(torch.eye(200))
        self.kind = kind

    def __matmul__(self, v: Tensor) -> Tensor:
        if self.kind == "shape":
            return v[:-1]
        if self.kind == "dtype":
            return v.double()
        return v * (math.nan if self.kind == "nan" else math.inf)


EYE = torch.eye(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an integer"),
        ({"k": 7}, "k must be an integer"),
        ({"k": 2.0}, "k must be an integer"),
        ({"k": True}, "k must be an integer"),
        ({"which": "SM"}, "which must be"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"tol": -1.0}, "tol must be positive"),
        ({"tol": math.nan}, "tol must be positive"),
        ({"H": torch.ones(3, 4)}, "H must be square"),
        ({"H": torch.ones(3)}, "H must be square"),
        ({"H": torch.ones(0, 0)}, "H must be square"),
        ({"H": object()}, "H must be square"),
        ({"H": torch.eye(6, dtype=torch.int64)}, "H must be float32 or float64"),
        ({"H": torch.eye(6).half()}, "H must be float32 or float64"),
        ({"H": torch.ones(6, 6).triu()}, "H must be symmetric"),
        ({"max_matvecs": 1}, "max_matvecs must be an integer >= k"),
        ({"max_matvecs": 8.0}, "max_matvecs must be an integer >= k"),
        ({"start": torch.ones(5, 2)}, "start must be"),
        ({"start": torch.ones(6)}, "start must be"),
        ({"start": torch.ones(6, 0)}, "start must be"),
        ({"start": torch.full((6, 1), math.nan)}, "start must be finite"),
        ({"start": "K"}, "start must be None"),
        ({"start": KroneckerOperator(torch.eye(2), torch.eye(2))}, "start must be"),
        ({"start": KroneckerOperator(torch.eye(2).double(), torch.eye(3).double())}, "start must"),
        ({"start": KroneckerOperator(torch.eye(2), torch.eye(3)), "which": "SA"}, "start: "),
        ({"H": torch.full((6, 6), math.nan)}, "H"),
        ({"H": Broken("nan")}, "H: H @ v must be finite"),
        ({"H": Broken("inf")}, "H: H @ v must be finite"),
        ({"H": Broken("shape")}, "H: H @ v must give"),
        ({"H": Broken("dtype")}, "H: H @ v must give"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eigsh(**{"H": EYE, "k": 2, **arguments})


# any shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 260),
    part=st.floats(0, 1),
    which=st.sampled_from(["LA", "SA", "LM"]),
    distinct=st.integers(1, 60),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size_and_number_of_pairs(
    size: int, part: float, which: str, distinct: int, double: bool, seed: int
) -> None:
    k = 1 + int(part * (size - 1)) if size < 60 else 1 + int(part * 24)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(distinct, generator=generator, dtype=torch.float64)
    spectrum = values[torch.randint(distinct, (size,), generator=generator)]
    matrix = symmetric(spectrum, seed, torch.float64 if double else torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = eigsh(Counting(matrix), k, which=which, seed=seed, max_matvecs=20_000)
    check(matrix, result, k, which, 1e-4)


@pytest.mark.parametrize("tol", [5e-7, 1e-4])
@pytest.mark.parametrize("seed", range(6))
def test_copies_hidden_in_the_last_residual_are_found(seed: int, tol: float) -> None:
    # The residual of the run that found the other copies points along the missing one.
    size = 400
    values = torch.full((size,), 1e-3, dtype=torch.float64)
    values[:6], values[6:9] = 1 + 1e-5, 0.5 + 1e-5
    values[9:15] += 1e-5
    generator = torch.Generator().manual_seed(seed % 4)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    result = eigsh((q * values) @ q.T, 9, tol=tol, seed=seed)
    torch.testing.assert_close(result.values, values[:9], rtol=0, atol=1e-6)
