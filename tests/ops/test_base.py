"""Sums that are added to another matrix than they are written to, or to none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import accumulator_layouts, dtypes, input_layouts, seeds
from tensors import arrange, random, softmax
from torch import Tensor

from hesskern import ops

NAN = float("nan")

# Around the orders and numbers of rows at which another kernel takes over.
orders = st.sampled_from((1, 5, 31, 64, 96, 100, 130, 256, 257, 300))
rows = st.sampled_from((0, 1, 31, 33, 130, 300, 700))


def check(
    add: Callable[..., Any], order: int, dtype: torch.dtype, layouts: tuple[str, str], seed: int
) -> None:
    base = arrange(random((order, order), dtype, seed).triu(), layouts[0])
    expected = base.clone()
    add(expected)
    acc = arrange(torch.full_like(base, NAN), layouts[1])
    kept = base.clone()
    assert add(acc, base=base) is acc
    # One that is not laid out by rows is added to as a whole, which may round in another order.
    same = torch.equal if "column_major" not in layouts else torch.allclose
    assert same(acc.triu(), expected.triu())
    assert torch.equal(base, kept)
    # A factor of what is added to; with none, its values do not count.
    halved = (base / 2).contiguous()
    add(halved)
    acc = arrange(torch.full_like(base, NAN), layouts[1])
    add(acc, base=base, beta=0.5)
    assert torch.allclose(acc.triu(), halved.triu(), equal_nan=True)
    blank = torch.zeros_like(base).contiguous()
    add(blank)
    acc = arrange(torch.full_like(base, NAN), layouts[1])
    add(acc, beta=0.0)
    assert same(acc.triu(), blank.triu())
    add(acc, base=base, beta=0.0)
    assert same(acc.triu(), blank.triu())


@given(n=rows, d=orders, ones=st.booleans(), dtype=dtypes, layout=input_layouts,
       base=accumulator_layouts, into=accumulator_layouts, seed=seeds)  # fmt: skip
def test_input_covariance(
    n: int, d: int, ones: bool, dtype: torch.dtype, layout: str, base: str, into: str, seed: int
) -> None:
    x = arrange(random((n, d), dtype, seed), layout)

    def add(acc: Tensor, **more: Any) -> Tensor:
        return ops.input_covariance_(acc, x, -0.5, ones, **more)

    check(add, d + ones, dtype, (base, into), seed)


@given(n=st.sampled_from((0, 1, 40, 90)), c=st.sampled_from((1, 3)), m=orders,
       t=st.sampled_from((None, 1, 5)), weighted=st.booleans(), dtype=dtypes, layout=input_layouts,
       base=accumulator_layouts, into=accumulator_layouts, seed=seeds)  # fmt: skip
def test_output_hessian(
    n: int, c: int, m: int, t: int | None, weighted: bool, dtype: torch.dtype, layout: str,
    base: str, into: str, seed: int,
) -> None:  # fmt: skip
    jacobian = arrange(random((n, c, m) if t is None else (n, c, m, t), dtype, seed), layout)
    probabilities = softmax((n, c), dtype, seed) if weighted else None

    def add(acc: Tensor, **more: Any) -> Tensor:
        return ops.output_hessian_(acc, jacobian, probabilities, 2.0, **more)

    check(add, m, dtype, (base, into), seed)


@pytest.mark.parametrize("d", [40, 130, 300, 700])
def test_several_chunks_of_rows(d: int) -> None:
    """What is added to the base in one chunk is what the next one adds to."""
    x = random((9000, d), torch.float32)
    for given_rows in (x, x.bfloat16(), x[:, torch.arange(d - 1, -1, -1)].t().contiguous().t()):
        check(
            lambda acc, r=given_rows, **more: ops.input_covariance_(acc, r, **more),
            d,
            torch.float32,
            ("contiguous", "contiguous"),
            1,
        )


@pytest.mark.parametrize("op", [ops.input_covariance_, ops.output_hessian_])
def test_a_base_that_does_not_fit_is_refused(op: Callable[..., Tensor]) -> None:
    x = random((5, 4) if op is ops.input_covariance_ else (5, 1, 4), torch.float32)
    acc = torch.zeros(4, 4)
    name = op.__name__
    with pytest.raises(ValueError, match=rf"{name}: base must be as acc, \[4, 4\] Float on cpu"):
        op(acc, x, base=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=f"{name}: base must be as acc"):
        op(acc, x, base=torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"{name}: acc is on cpu but base is on meta"):
        op(acc, x, base=torch.zeros(4, 4, device="meta"))
    with pytest.raises(ValueError, match=f"{name}: acc must not share memory with base"):
        op(acc, x, base=acc)
    frame = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=f"{name}: acc must not share memory with base"):
        op(frame[1:], x, base=frame[:4])
    wide = torch.zeros(8, 8)
    with pytest.raises(ValueError, match=f"{name}: acc must not share memory with base"):
        op(wide[:4, :4], x, base=wide[1:5, 1:5])
    assert torch.equal(wide, torch.zeros(8, 8))
    assert torch.equal(acc, torch.zeros(4, 4))
    # Rows apart in one storage are no overlap.
    op(wide[:4, :4], x, base=wide[4:, :4])
    assert torch.equal(wide[:4, :4].triu(), op(acc, x).triu())
