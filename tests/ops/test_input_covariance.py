"""input_covariance_ at every size class of its kernels, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hesskern import ops

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def check(x: Tensor, alpha: float = 1.0, ones: bool = False) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = x.shape[1] + ones
    acc = ops.input_covariance_(torch.zeros(d, d, dtype=dtype), x, alpha, ones).triu()
    wide = x.double()
    if ones:
        wide = torch.cat([wide, wide.new_ones(len(x), 1)], 1)
    expected = (alpha * wide.T @ wide).triu()
    error = (acc.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Around the vector, panel and order at which another kernel takes over.
orders = st.one_of(
    st.integers(1, 40), st.sampled_from((47, 63, 64, 65, 95, 129, 255, 256, 257, 260, 300))
)
rows = st.one_of(st.integers(1, 40), st.sampled_from((127, 128, 129, 255, 257, 700)))


@given(n=rows, d=orders, double=st.booleans(), ones=st.booleans(),
       layout=st.sampled_from(("rows", "columns", "window", "strided")),
       alpha=st.sampled_from((1.0, -0.5)), seed=st.integers(0, 999))  # fmt: skip
def test_any_shape(
    n: int, d: int, double: bool, ones: bool, layout: str, alpha: float, seed: int
) -> None:
    dtype = torch.float64 if double else torch.float32
    frame = normal(2 * n + 2, 2 * d + 2, dtype=dtype, seed=seed)
    x = {
        "rows": frame[:n, :d].contiguous(),
        "columns": frame[:n, :d].t().contiguous().t(),
        "window": frame[1 : n + 1, 1 : d + 1],
        "strided": frame[1 : 2 * n + 1 : 2, 1 : 2 * d + 1 : 2],
    }[layout]
    check(x, alpha, ones)


@pytest.mark.parametrize("d", [1, 2, 5, 16, 31, 64, 100, 300])
def test_nothing_beyond_x_is_read(d: int) -> None:
    """Vectors that reach past a row must not reach past the tensor, nor let NaN in."""
    frame = torch.full((70 * d + 200,), float("nan"))
    x = frame[100 : 100 + 70 * d].view(70, d).copy_(normal(70, d))
    check(x)
    check(x[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(3, 5), (3000, 64), (5000, 300)])
def test_narrow_inputs(n: int, d: int, dtype: torch.dtype) -> None:
    """Products and sums of bfloat16 rows keep float32's accuracy."""
    check(normal(n, d, dtype=dtype).abs_())
    check(normal(n, d, dtype=dtype), ones=True)


@pytest.mark.parametrize("d", [1, 8, 40])
def test_million_rows(d: int) -> None:
    """Non-negative data: the sums grow, and small terms must not be lost in them."""
    x = normal(1_000_000, d, dtype=torch.float32).relu_()
    check(x)
    check(torch.full((1_000_000, d), 0.1))


def test_million_rows_of_large_order() -> None:
    """Many rows through the kernels for large d; repeated, so that memory stays small."""
    x = normal(1, 264, dtype=torch.float32).abs_().expand(300_000, 264)
    check(x)


def test_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for d in (3, 40, 300):
            x = normal(600, d)
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(ops.input_covariance_(torch.zeros(d, d).double(), x).triu())
                again = ops.input_covariance_(torch.zeros(d, d).double(), x).triu()
                assert torch.equal(results[-1], again)
            torch.testing.assert_close(results[0], results[1])
            torch.testing.assert_close(results[0], results[2])
    finally:
        torch.set_num_threads(threads)
