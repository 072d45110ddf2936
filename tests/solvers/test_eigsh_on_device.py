"""Eigensolvers on a device keep the same promises.

The CPU plays the device (played_device.py).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from device_operators import LA, LM, SA, Operator, decaying, fetched
from networks import classes, randn, seeded
from played_device import Counts, OnDevice, played
from spectra import Counting, check, layer, spectra, symmetric
from torch import Tensor, nn

import hesskern as hk
from hesskern.solvers.eigsh import eigsh


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("which", [LA, SA, LM])
@pytest.mark.parametrize(("dtype", "block"), [(torch.float64, 1), (torch.float32, 3)])
@pytest.mark.parametrize(
    "name",
    [
        "uniform", "indefinite", "negative definite", "repeated", "clustered", "rank 3",
        "rank 1, negative", "identity", "two values", "zero",
    ],
)  # fmt: skip
def test_agrees_with_the_dense_solution(
    name: str, dtype: torch.dtype, which: str, block: int
) -> None:
    operator = Operator(symmetric(spectra(150)[name], dtype=dtype))
    result = eigsh(operator, 8, which=which, block=block)
    check(operator.matrix.inner, fetched(result), 8, which, 1e-4)
    assert result.matvecs == operator.count


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_any_scale(scale: float) -> None:
    operator = Operator(scale * decaying(torch.float32))
    check(operator.matrix.inner, fetched(eigsh(operator, 8)), 8, LA, 1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("size", "k"), [(129, 1), (129, 40), (130, 2), (130, 20)])
def test_hardly_larger_than_what_is_solved_densely(size: int, k: int) -> None:
    operator = Operator(symmetric(torch.linspace(-1, 2, size)))
    check(operator.matrix.inner, fetched(eigsh(operator, k)), k, LA, 1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block", [1, 4])
def test_every_copy_of_a_repeated_eigenvalue(block: int) -> None:
    tail = 0.95 ** torch.arange(295, dtype=torch.float64)
    operator = Operator(symmetric(torch.cat([torch.full((5,), 3.0).double(), tail])))
    result = fetched(eigsh(operator, 8, tol=1e-6, block=block))
    check(operator.matrix.inner, result, 8, LA, 1e-6)
    assert int((result.values > 2).sum()) == 5


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block", [1, 3])
def test_restarts_many_times_and_stays_true(block: int) -> None:
    size = 160
    matrix = 2 * torch.eye(size) - torch.diag(torch.ones(size - 1), 1)
    matrix = matrix - torch.diag(torch.ones(size - 1), -1)
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        operator = Operator(matrix.to(dtype))
        result = fetched(eigsh(operator, 3, which=SA, tol=tol, block=block))
        check(operator.matrix.inner, result, 3, SA, tol)
        assert operator.count > 2 * 63


@pytest.mark.usefixtures("device")
def test_a_tolerance_below_rounding_ends_with_a_warning() -> None:
    operator = Operator(symmetric(0.97 ** torch.arange(300), dtype=torch.float32))
    with pytest.warns(RuntimeWarning, match=r"rounding of torch.float32.*worst residual"):
        result = fetched(eigsh(operator, 10, tol=1e-9))
    assert not result.converged
    assert float(result.residuals.max()) < 2e-6


def on_device(K: hk.KroneckerOperator) -> hk.KroneckerOperator:
    return hk.KroneckerOperator.of_symmetric(OnDevice(K.A), OnDevice(K.B))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("budget", [10, 25, 61])
@pytest.mark.parametrize(
    ("start", "block"), [("none", 1), ("none", 4), ("block", 1), ("kronecker", 4)]
)
def test_stops_at_the_limit_of_products(budget: int, start: str, block: int) -> None:
    K = hk.KroneckerOperator(*(symmetric(torch.linspace(0.1, 1, n)) for n in (16, 20)))
    H = K.to_dense() + 0.02 * symmetric(torch.linspace(-1, 1, 320), seed=1)
    begin: Any = {"none": None, "block": OnDevice(torch.eye(320)[:, :7])}.get(start, on_device(K))
    operator = Operator(H)
    with pytest.warns(RuntimeWarning, match=r"limit of \d+ products"):
        result = eigsh(operator, 10, tol=1e-12, start=begin, max_matvecs=budget, block=block)
    assert operator.count == result.matvecs == budget
    result = fetched(result)
    torch.testing.assert_close(result.vectors.T @ result.vectors, torch.eye(10, dtype=H.dtype))
    fresh = (H @ result.vectors - result.vectors * result.values).norm(dim=0) / result.values[0]
    torch.testing.assert_close(result.residuals, fresh, rtol=1e-6, atol=1e-13)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("limit", range(3, 20, 4))
def test_fewer_products_than_dimensions(limit: int) -> None:
    operator = Operator(symmetric(torch.linspace(1, 2, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fetched(eigsh(operator, 3, max_matvecs=limit, block=4))
    assert operator.count <= limit
    fresh = operator.matrix.inner @ result.vectors - result.vectors * result.values
    torch.testing.assert_close(
        result.residuals, fresh.norm(dim=0) / result.values[0], rtol=1e-2, atol=1e-12
    )


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("distance", [0.0, 0.003])
def test_a_kronecker_start(distance: float) -> None:
    H, K = layer(distance)
    operator = Operator(H)
    result = fetched(eigsh(operator, 12, start=on_device(K)))
    check(H, result, 12, LA, 1e-4)
    assert result.matvecs == operator.count
    assert result.matvecs <= eigsh(Counting(H), 12, start=K).matvecs + 12


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("columns", [1, 10, 200])
def test_any_start_vectors(columns: int) -> None:
    operator = Operator(symmetric(0.95 ** torch.arange(200)))
    start = torch.randn(200, columns, generator=torch.Generator().manual_seed(2))
    check(operator.matrix.inner, fetched(eigsh(operator, 10, start=OnDevice(start))), 10, LA, 1e-4)


@pytest.mark.usefixtures("device")
def test_useless_start_vectors_do_no_harm() -> None:
    matrix = symmetric(0.95 ** torch.arange(200))
    repeated = torch.ones(200, 5, dtype=torch.float64)
    with_nothing = torch.cat([repeated, torch.zeros(200, 1).double()], 1)
    for start in (torch.zeros(200, 2), repeated, -repeated[:, :1], with_nothing):
        result = fetched(eigsh(Operator(matrix), 10, start=OnDevice(start)))
        check(matrix, result, 10, LA, 1e-4)


@pytest.mark.usefixtures("device")
def test_equal_seeds_give_equal_results() -> None:
    first, second, other = (
        fetched(eigsh(Operator(decaying(torch.float32)), 10, seed=seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.residuals, second.residuals)
    assert not torch.equal(first.vectors, other.vectors)


# what goes wrong


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("by", [math.nan, -math.inf])
@pytest.mark.parametrize(("broken_from", "block"), [(0, 1), (13, 4), (40, 1)])
def test_a_product_that_is_not_finite(by: float, broken_from: int, block: int) -> None:
    operator = Operator(decaying(), broken_from, by)
    with pytest.raises(ValueError, match="H: H @ v must be finite, got NaN or Inf"):
        eigsh(operator, 20, tol=1e-10, block=block)
    # Found at the next look.
    assert operator.count <= max(20, broken_from) + 12


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("scale", [1e30, 1e-18, 1e-22, 1e-30])
def test_scales_whose_squares_leave_float32(scale: float) -> None:
    operator = Operator(scale * decaying(torch.float32))
    check(operator.matrix.inner, fetched(eigsh(operator, 6)), 6, LA, 1e-4)


@pytest.mark.usefixtures("device")
def test_products_at_the_end_of_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"H: (products with H overflow|H @ v must be finite)"):
        eigsh(Operator(torch.full((400, 400), 2e38)), 3)


@pytest.mark.usefixtures("device")
def test_not_finite_where_it_is_solved_densely() -> None:
    for at in (0, 5):
        with pytest.raises(ValueError, match="H: H @ v must be finite"):
            eigsh(Operator(symmetric(torch.linspace(0, 1, 40)), at), 3)


@pytest.mark.parametrize("block", [0, -1, 17, 2.0, True, "4"])
def test_blocks_that_are_none(block: Any) -> None:
    with pytest.raises(ValueError, match="block must be an integer with 1 <= block <= 16"):
        eigsh(torch.eye(6), 2, block=block)


# blocks on the CPU


def test_one_vector_at_a_time_on_the_cpu() -> None:
    seen: list[int] = []

    class Noting(Counting):
        def __matmul__(self, v: Tensor) -> Tensor:
            seen.append(v.shape[1] if v.dim() > 1 else 1)
            return super().__matmul__(v)

    check(decaying(), eigsh(Noting(decaying()), 20), 20, LA, 1e-4)
    assert set(seen) == {1}
    seen.clear()
    check(decaying(), eigsh(Noting(decaying()), 20, block=4), 20, LA, 1e-4)
    assert seen[0] == 4
    assert len(seen) < 30


def test_a_layer_hessian(device: Counts) -> None:
    model = seeded(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))).float()
    data = [(randn(60, 12).float(), classes(60, c=4))]
    H = hk.layer_hessians(model, data, nn.CrossEntropyLoss())["0"]
    dense = H.to_dense()

    class There:
        """The Hessian's products, by its own kernels, on the device."""

        shape, dtype, device = H.shape, H.dtype, played()

        def __matmul__(self, v: Tensor) -> Tensor:
            rows = v.T if v.dim() > 1 else v[None]
            s, x = H._chunks[0].s, H._chunks[0].x  # type: ignore[index]
            blocks = rows.contiguous().unflatten(1, H.layer_shape)
            out = hk.ops.layer_hessian_matmul(
                OnDevice(x), OnDevice(s), blocks, 1.0 / H.num_samples
            ).flatten(1)
            return out.T if v.dim() > 1 else out[0]

    result = fetched(eigsh(There(), 20))
    check(dense, result, 20, LA, 1e-4)
