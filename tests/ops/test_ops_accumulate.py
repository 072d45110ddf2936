"""input_covariance_, conv_input_covariance_, output_hessian_ and mirror_ against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import accumulator_layouts, alphas, dtypes, input_dtypes, input_layouts, seeds
from tensors import (
    ACCUMULATOR_LAYOUTS,
    INPUT_LAYOUTS,
    Accumulator,
    arrange,
    assert_near,
    random,
    relative_error,
    softmax,
)
from torch import Tensor

from hesskern import ops
from hesskern.ops import reference

sizes = st.integers(0, 9)
orders = st.one_of(st.integers(0, 9), st.sampled_from((63, 130, 197)))


def accumulator_dtype(dtype: torch.dtype, double: bool) -> torch.dtype:
    return torch.float64 if double or dtype == torch.float64 else torch.float32


class TestInputCovariance:
    @given(n=sizes, d=orders, ones=st.booleans(), dtype=input_dtypes, double=st.booleans(),
           layout=input_layouts, into=accumulator_layouts, alpha=alphas, seed=seeds)  # fmt: skip
    def test_reference(
        self, n: int, d: int, ones: bool, dtype: torch.dtype, double: bool, layout: str,
        into: str, alpha: float, seed: int,
    ) -> None:  # fmt: skip
        x = arrange(random((n, d), dtype, seed), layout)
        order = d + ones
        acc = Accumulator((order, order), accumulator_dtype(dtype, double), into)
        assert ops.input_covariance_(acc.tensor, x, alpha, ones) is acc.tensor
        acc.check(reference.input_covariance(x.double(), alpha, ones))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    """A geometry whose kernel fits into the padded input, and the input's shape."""
    axes = draw(st.sampled_from((1, 2)))
    pair = lambda low, high: [draw(st.integers(low, high)) for _ in range(axes)]  # noqa: E731
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    geometry = {
        "kernel_size": pair(1, 3),
        "stride": pair(1, 3),
        "padding": pair(0, 2),
        "dilation": pair(1, 2),
        "groups": groups,
    }
    shape = (draw(st.integers(0, 3)), groups * draw(st.integers(1, 3)), *pair(1, 8))
    for size, k, p, dil in zip(
        shape[2:], geometry["kernel_size"], geometry["padding"], geometry["dilation"], strict=True
    ):
        assume(size + 2 * p >= dil * (k - 1) + 1)
    return {"shape": shape, **geometry}


class TestConvInputCovariance:
    @given(case=convolutions(), dtype=input_dtypes, double=st.booleans(), layout=input_layouts,
           into=accumulator_layouts, alpha=alphas, seed=seeds)  # fmt: skip
    def test_reference(
        self, case: dict, dtype: torch.dtype, double: bool, layout: str, into: str, alpha: float,
        seed: int,
    ) -> None:  # fmt: skip
        geometry = dict(case)
        x = arrange(random(geometry.pop("shape"), dtype, seed), layout)
        kernel, groups = geometry["kernel_size"], geometry["groups"]
        d = x.shape[1] // groups * torch.Size(kernel).numel()
        shape = (d, d) if groups == 1 and seed % 2 else (groups, d, d)
        acc = Accumulator(shape, accumulator_dtype(dtype, double), into)
        ops.conv_input_covariance_(acc.tensor, x, alpha=alpha, **geometry)
        acc.check(reference.conv_input_covariance(x.double(), alpha=alpha, **geometry))


class TestOutputHessian:
    @given(n=sizes, c=st.integers(0, 6), m=orders, t=st.sampled_from((None, 0, 1, 2, 5)),
           weighted=st.booleans(), dtype=input_dtypes, double=st.booleans(), layout=input_layouts,
           into=accumulator_layouts, alpha=alphas, seed=seeds)  # fmt: skip
    def test_reference(
        self, n: int, c: int, m: int, t: int | None, weighted: bool, dtype: torch.dtype,
        double: bool, layout: str, into: str, alpha: float, seed: int,
    ) -> None:  # fmt: skip
        acc_dtype = accumulator_dtype(dtype, double)
        shape = (n, c, m) if t is None else (n, c, m, t)
        jacobian = arrange(random(shape, dtype, seed), layout)
        # Rounded to bfloat16 they would not sum to one, and diag(p) - p p^T had no such root.
        p = arrange(softmax((n, c), acc_dtype, seed), layout) if weighted else None
        acc = Accumulator((m, m), acc_dtype, into)
        assert ops.output_hessian_(acc.tensor, jacobian, p, alpha) is acc.tensor
        weights = None if p is None else p.double()
        acc.check(reference.output_hessian(jacobian.double(), weights, alpha))

    @pytest.mark.parametrize("t", [None, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_one_class_has_no_curvature(self, dtype: torch.dtype, t: int | None) -> None:
        jacobian = random((20, 1, 7) if t is None else (20, 1, 7, t), dtype)
        acc = ops.output_hessian_(torch.zeros(7, 7, dtype=dtype), jacobian, torch.ones(20, 1))
        assert float(acc.triu().abs().max()) <= 1e3 * torch.finfo(dtype).eps

    def test_certain_prediction_has_no_curvature(self) -> None:
        p = torch.nn.functional.one_hot(torch.arange(12) % 4, 4).float()
        acc = ops.output_hessian_(torch.zeros(5, 5), random((12, 4, 5), torch.float32), p)
        assert float(acc.triu().abs().max()) <= 1e-4

    def test_two_classes_closed_form(self) -> None:
        # M = p (1 - p) (g_0 - g_1)(g_0 - g_1)^T
        jacobian, p = random((30, 2, 4)), softmax((30, 2))
        difference = jacobian[:, 0] - jacobian[:, 1]
        expected = torch.einsum("n,ni,nj->ij", p[:, 0] * p[:, 1], difference, difference)
        acc = ops.output_hessian_(torch.zeros(4, 4, dtype=torch.float64), jacobian, p)
        assert_near(ops.mirror_(acc), expected)

    def test_offset_shared_by_all_classes_does_not_cancel_away_the_result(self) -> None:
        # M is blind to it; p sums to one exactly, so float32 loses only what centering rounds.
        p = torch.tensor([0.5, 0.25, 0.25]).expand(50, 3)
        jacobian = random((50, 3, 6), torch.float32) + 100
        acc = ops.output_hessian_(torch.zeros(6, 6), jacobian, p)
        expected = reference.output_hessian(jacobian.double(), p.double())
        assert_near(ops.mirror_(acc), expected, tolerance=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_probabilities_of_any_float_dtype(self, dtype: torch.dtype) -> None:
        # Quarters are exact in all of them.
        p = torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]], dtype=dtype)
        jacobian = random((2, 3, 4), torch.float32)
        acc = ops.output_hessian_(torch.zeros(4, 4), jacobian, p)
        assert_near(ops.mirror_(acc), reference.output_hessian(jacobian.double(), p.double()))

    @pytest.mark.parametrize("weighted", [False, True])
    def test_roots_need_no_probabilities_and_match_them(self, weighted: bool) -> None:
        # With Q^T Q = diag(p) - p p^T, Q G are roots of the same matrix.
        jacobian, p = random((8, 3, 5)), softmax((8, 3))
        root = torch.diag_embed(p.sqrt()) - p.sqrt().unsqueeze(2) * p.unsqueeze(1)
        roots = torch.einsum("ncb,nbm->ncm", root, jacobian)
        acc = torch.zeros(5, 5, dtype=torch.float64)
        if weighted:
            ops.output_hessian_(acc, jacobian, p)
        else:
            ops.output_hessian_(acc, roots)
        assert_near(ops.mirror_(acc), reference.output_hessian(jacobian, p))


class TestMirror:
    @given(groups=st.sampled_from((None, 0, 1, 3)), d=orders, dtype=dtypes,
           layout=accumulator_layouts, seed=seeds)  # fmt: skip
    def test_lower_triangle_becomes_the_upper_one(
        self, groups: int | None, d: int, dtype: torch.dtype, layout: str, seed: int
    ) -> None:
        shape = (d, d) if groups is None else (groups, d, d)
        acc = Accumulator(shape, dtype, layout, seed)
        expected = acc.tensor.triu() + acc.tensor.triu(1).transpose(-1, -2)
        assert ops.mirror_(acc.tensor) is acc.tensor
        assert torch.equal(acc.tensor, expected)
        acc.check(torch.zeros(shape))

    def test_twice_is_once(self) -> None:
        acc = ops.mirror_(random((70, 70)))
        assert torch.equal(ops.mirror_(acc.clone()), acc)

    def test_nan_and_infinity_are_copied(self) -> None:
        acc = torch.eye(3)
        acc[0, 1], acc[0, 2] = float("nan"), float("inf")
        ops.mirror_(acc)
        assert acc[1, 0].isnan()
        assert acc[2, 0].isinf()
        assert acc[2, 1] == 0


# name, order of acc, input shape, call
LARGE: dict[str, tuple[int, tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "input_covariance": (7, (70_000, 7), ops.input_covariance_),
    "input_covariance_ones": (8, (70_000, 7), lambda a, x: ops.input_covariance_(a, x, ones=True)),
    "input_covariance_wide": (201, (3000, 201), ops.input_covariance_),
    "conv_input_covariance": (
        8,
        (70, 2, 32, 32),
        lambda a, x: ops.conv_input_covariance_(a, x, [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    "output_hessian_roots": (7, (20_000, 3, 7), ops.output_hessian_),
    "output_hessian_weighted": (
        7,
        (20_000, 4, 7),
        lambda a, j: ops.output_hessian_(a, j, j.new_full(j.shape[:2], 0.25)),
    ),
    "output_hessian_positions": (
        5,
        (3000, 4, 5, 9),
        lambda a, j: ops.output_hessian_(a, j, j.new_full(j.shape[:2], 0.25)),
    ),
}


class TestPrecision:
    """Long sums of non-negative terms: narrow accumulation stalls, and errors have one sign."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("name", LARGE)
    def test_long_sums(self, name: str, dtype: torch.dtype) -> None:
        order, shape, call = LARGE[name]
        x = random(shape, torch.float32, seed=3).abs_().to(dtype)
        acc_dtype = accumulator_dtype(dtype, double=False)
        acc = ops.mirror_(call(torch.zeros(order, order, dtype=acc_dtype), x))
        exact = ops.mirror_(call(torch.zeros(order, order, dtype=torch.float64), x.double()))
        assert_near(acc, exact)
        assert relative_error(acc.diagonal(), exact.diagonal()) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_many_small_batches(self, dtype: torch.dtype) -> None:
        x = random((4000, 6), torch.float32).abs_().to(dtype)
        acc = torch.zeros(6, 6)
        for batch in x.split(8):
            ops.input_covariance_(acc, batch, 1 / 4000)
        assert_near(ops.mirror_(acc), reference.input_covariance(x.double(), 1 / 4000))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_layers_of_usual_size(self, dtype: torch.dtype) -> None:
        x, jacobian, p = random((300, 513), dtype), random((40, 10, 260), dtype), softmax((40, 10))
        acc = ops.mirror_(ops.input_covariance_(torch.zeros(513, 513, dtype=dtype), x))
        assert_near(acc, reference.input_covariance(x.double()))
        acc = ops.mirror_(ops.output_hessian_(torch.zeros(260, 260, dtype=dtype), jacobian, p))
        assert_near(acc, reference.output_hessian(jacobian.double(), p))


# One call per accumulating operator, with what it adds: fixed shapes that cover both triangles.
def _conv(acc: Tensor, x: Tensor, alpha: float) -> Tensor:
    return ops.conv_input_covariance_(acc, x, [2, 3], [1, 2], [1, 0], [1, 1], 1, alpha)


CALLS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "input_covariance_": ((11, 6), 6, ops.input_covariance_),
    "conv_input_covariance_": ((3, 2, 5, 6), 12, _conv),
    "output_hessian_": ((9, 3, 5), 5, lambda a, j, alpha: ops.output_hessian_(a, j, alpha=alpha)),
    "output_hessian_weighted_": (
        (9, 3, 5, 2),
        5,
        lambda a, j, alpha: ops.output_hessian_(a, j, j.new_full(j.shape[:2], 1 / 3), alpha),
    ),
}


@pytest.mark.parametrize("name", CALLS)
class TestAccumulation:
    def test_batches_add_up(self, name: str) -> None:
        shape, order, call = CALLS[name]
        x = random(shape)
        whole = call(torch.zeros(order, order, dtype=torch.float64), x, 0.5)
        parts = torch.zeros(order, order, dtype=torch.float64)
        for batch in x.split([1, 0, shape[0] - 1]):
            call(parts, batch, 0.5)
        assert_near(parts.triu(), whole.triu())

    def test_opposite_alpha_takes_it_away(self, name: str) -> None:
        shape, order, call = CALLS[name]
        x, before = random(shape), random((order, order), seed=5)
        acc = before.clone()
        call(acc, x, 0.7)
        assert relative_error(acc.triu(), before.triu()) > 0.1
        call(acc, x, -0.7)
        assert_near(acc.triu(), before.triu(), scale=10.0)

    def test_zero_alpha_changes_nothing(self, name: str) -> None:
        shape, order, call = CALLS[name]
        before = random((order, order), seed=5)
        acc = before.clone()
        call(acc, random(shape), 0.0)
        assert torch.equal(acc.triu(), before.triu())

    def test_input_is_not_changed(self, name: str) -> None:
        shape, order, call = CALLS[name]
        for layout in INPUT_LAYOUTS:
            x = arrange(random(shape), layout)
            before = x.clone()
            call(torch.zeros(order, order, dtype=torch.float64), x, 1.0)
            assert torch.equal(x, before)

    @pytest.mark.parametrize("into", ACCUMULATOR_LAYOUTS)
    def test_every_input_layout_gives_one_result(self, name: str, into: str) -> None:
        shape, order, call = CALLS[name]
        x = random(shape)
        expected = call(torch.zeros(order, order, dtype=torch.float64), x, 1.0).triu()
        for layout in INPUT_LAYOUTS[:-1]:
            acc = Accumulator((order, order), torch.float64, into)
            call(acc.tensor, arrange(x, layout), 1.0)
            acc.check(expected + expected.triu(1).T)

    def test_nan_reaches_what_it_belongs_to_and_no_more(self, name: str) -> None:
        if name.startswith("conv"):
            x = random((1, 2, 5, 6))
            x[0, 1, 2, 2] = float("nan")
            first = 6  # the second channel's rows
        else:
            x = random(CALLS[name][0])
            x.movedim(1 if x.dim() == 2 else 2, 0)[-1, 0] = float("nan")
            first = CALLS[name][1] - 1
        _, order, call = CALLS[name]
        acc = ops.mirror_(call(torch.zeros(order, order, dtype=torch.float64), x, 1.0))
        assert acc[:first, :first].isfinite().all()
        assert acc[first:].isnan().any()


@given(n=st.integers(1, 5), d=st.integers(1, 6), offset=st.integers(0, 7))
@settings(max_examples=20)
def test_storage_offsets(n: int, d: int, offset: int) -> None:
    """Views that start anywhere in a storage, at addresses of any alignment."""
    storage = random((offset + n * d,), torch.float32)
    x = storage[offset:].view(n, d)
    memory = torch.zeros(offset + d * d)
    ops.input_covariance_(memory[offset:].view(d, d), x)
    assert_near(ops.mirror_(memory[offset:].view(d, d)), reference.input_covariance(x.double()))
    assert not memory[:offset].any()
