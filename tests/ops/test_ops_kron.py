"""kron_matmul, kron_eigen_matmul, their halves and grouped forms: values and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, input_layouts, seeds
from tensors import TOLERANCE, arrange, assert_near, random, relative_error, to_double
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from hesskern import ops
from hesskern.ops import reference

sizes = st.one_of(st.integers(0, 7), st.sampled_from((1, 33, 67)))
blocks = st.sampled_from((None, None, 0, 1, 3))


def shape_of_x(k: int | None, m: int, d: int) -> tuple[int, ...]:
    return (m, d) if k is None else (k, m, d)


def cancellation(*tensors: Tensor, call: Callable[..., Tensor]) -> float:
    """A tenth of the result's size if no terms cancelled: what rounding is measured against."""
    return 0.1 * float(call(*(t.double().abs() for t in tensors)).norm())


class TestKronMatmul:
    @given(m=sizes, m_out=sizes, d=sizes, d_out=sizes, k=blocks, dtype=dtypes,
           layouts=st.tuples(*[input_layouts] * 3), seed=seeds)  # fmt: skip
    def test_reference(
        self, m: int, m_out: int, d: int, d_out: int, k: int | None, dtype: torch.dtype,
        layouts: tuple[str, str, str], seed: int,
    ) -> None:  # fmt: skip
        shapes = ((m_out, m), (d_out, d), shape_of_x(k, m, d))
        A, B, X = (
            arrange(random(shape, dtype, seed + i), layout)
            for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
        )
        result = ops.kron_matmul(A, B, X)
        assert result.dtype == dtype
        expected = reference.kron_matmul(A.double(), B.double(), X.double())
        assert_near(result, expected, cancellation(A, B, X, call=reference.kron_matmul))

    def test_is_the_kronecker_product(self) -> None:
        A, B, X = random((4, 3)), random((5, 2), seed=1), random((3, 2), seed=2)
        assert_near(ops.kron_matmul(A, B, X).flatten(), torch.kron(A, B) @ X.flatten())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("k", [None, 1, 9])
    @pytest.mark.parametrize(("m_out", "m", "d_out", "d"), [(200, 190, 130, 150), (3, 400, 500, 2)])
    def test_usual_sizes(
        self, m_out: int, m: int, d_out: int, d: int, k: int | None, dtype: torch.dtype
    ) -> None:
        A, B = random((m_out, m), dtype), random((d_out, d), dtype, 1)
        X = random(shape_of_x(k, m, d), dtype, 2)
        expected = reference.kron_matmul(A.double(), B.double(), X.double())
        assert_near(ops.kron_matmul(A, B, X), expected)

    def test_block_is_its_vectors(self) -> None:
        A, B, X = random((4, 3)), random((5, 6), seed=1), random((7, 3, 6), seed=2)
        each = torch.stack([ops.kron_matmul(A, B, x) for x in X])
        assert_near(ops.kron_matmul(A, B, X), each)

    def test_result_owns_its_memory(self) -> None:
        A, B, X = torch.eye(3), torch.eye(4), random((3, 4), torch.float32)
        result = ops.kron_matmul(A, B, X)
        result.zero_()
        assert X.any()
        assert torch.equal(A, torch.eye(3))


class TestKronEigenMatmul:
    @given(m=sizes, r=sizes, d=sizes, q=sizes, k=blocks, dtype=dtypes,
           layouts=st.tuples(*[input_layouts] * 4), seed=seeds)  # fmt: skip
    def test_reference(
        self, m: int, r: int, d: int, q: int, k: int | None, dtype: torch.dtype,
        layouts: tuple[str, str, str, str], seed: int,
    ) -> None:  # fmt: skip
        shapes = ((m, r), (r, q), (d, q), shape_of_x(k, m, d))
        arguments = [
            arrange(random(shape, dtype, seed + i), layout)
            for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
        ]
        result = ops.kron_eigen_matmul(*arguments)
        assert result.dtype == dtype
        expected = reference.kron_eigen_matmul(*(t.double() for t in arguments))
        scale = cancellation(*arguments, call=reference.kron_eigen_matmul)
        assert_near(result, expected, scale)

    @pytest.mark.parametrize("power", [1.0, -1.0, -0.5])
    def test_powers_of_a_kronecker_product(self, power: float) -> None:
        factors = [random((8, n)) for n in (4, 6)]
        A, B = (f.T @ f + torch.eye(f.shape[1], dtype=f.dtype) for f in factors)
        (a, U), (b, V) = torch.linalg.eigh(A), torch.linalg.eigh(B)
        X = random((2, 4, 6))
        values, vectors = torch.linalg.eigh(torch.kron(A, B))
        dense = vectors * values.pow(power) @ vectors.T
        result = ops.kron_eigen_matmul(U, torch.outer(a, b).pow(power), V, X)
        assert_near(result.flatten(1), X.flatten(1) @ dense)

    @pytest.mark.parametrize("k", [None, 4])
    def test_halves(self, k: int | None) -> None:
        U, V = random((6, 4)), random((7, 5), seed=1)
        X, Y = random(shape_of_x(k, 6, 7), seed=2), random(shape_of_x(k, 4, 5), seed=3)
        S = random((4, 5), seed=4)
        assert_near(ops.to_eigenbasis(U, V, X), U.T @ X @ V)
        assert_near(ops.from_eigenbasis(U, V, Y), U @ Y @ V.T)
        halves = ops.from_eigenbasis(U, V, S * ops.to_eigenbasis(U, V, X))
        assert_near(ops.kron_eigen_matmul(U, S, V, X), halves)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_usual_sizes(self, dtype: torch.dtype) -> None:
        U, _ = torch.linalg.qr(random((150, 150)))
        V, _ = torch.linalg.qr(random((170, 120)))
        arguments = [t.to(dtype) for t in (U, random((150, 120)), V, random((3, 150, 170)))]
        expected = reference.kron_eigen_matmul(*(t.double() for t in arguments))
        assert_near(ops.kron_eigen_matmul(*arguments), expected)


# Per layer (k, m, m', d, d'): small and large layers, blocks beside single vectors.
LAYERS = [
    (None, 3, 2, 4, 5),
    (2, 3, 3, 1, 6),
    (1, 0, 3, 4, 2),
    (None, 200, 190, 210, 220),
    (0, 2, 2, 2, 2),
]


def grouped_kron_arguments(layers: list, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    A = [random((m_out, m), dtype, i) for i, (_, m, m_out, _, _) in enumerate(layers)]
    B = [random((d_out, d), dtype, 10 + i) for i, (*_, d, d_out) in enumerate(layers)]
    X = [random(shape_of_x(k, m, d), dtype, 20 + i) for i, (k, m, _, d, _) in enumerate(layers)]
    return [A, B, X]


def grouped_eigen_arguments(layers: list, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    U = [random((m, r), dtype, i) for i, (_, m, r, _, _) in enumerate(layers)]
    S = [random((r, q), dtype, 10 + i) for i, (_, _, r, _, q) in enumerate(layers)]
    V = [random((d, q), dtype, 20 + i) for i, (*_, d, q) in enumerate(layers)]
    X = [random(shape_of_x(k, m, d), dtype, 30 + i) for i, (k, m, _, d, _) in enumerate(layers)]
    return [U, S, V, X]


GROUPED = {
    "kron": (ops.grouped_kron_matmul, ops.kron_matmul, grouped_kron_arguments),
    "eigen": (ops.grouped_kron_eigen_matmul, ops.kron_eigen_matmul, grouped_eigen_arguments),
}


@pytest.mark.parametrize("form", GROUPED)
class TestGrouped:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_each_layer(self, form: str, dtype: torch.dtype) -> None:
        grouped, single, make = GROUPED[form]
        arguments = make(LAYERS, dtype)
        results = grouped(*arguments)
        assert isinstance(results, list)
        assert len(results) == len(LAYERS)
        for result, layer in zip(results, zip(*arguments, strict=True), strict=True):
            assert_near(result, single(*to_double(list(layer))))

    def test_no_layers(self, form: str) -> None:
        grouped, _, make = GROUPED[form]
        assert grouped(*make([])) == []

    def test_many_small_layers(self, form: str) -> None:
        grouped, single, make = GROUPED[form]
        arguments = make([(1 + i % 3, 1 + i % 5, 2, 1 + i % 7, 3) for i in range(57)])
        for result, layer in zip(grouped(*arguments), zip(*arguments, strict=True), strict=True):
            assert_near(result, single(*layer), scale=1.0)

    def test_one_tensor_in_every_layer(self, form: str) -> None:
        grouped, single, make = GROUPED[form]
        arguments = [argument * 3 for argument in make([(2, 3, 4, 5, 6)])]
        first, second, third = grouped(*arguments)
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert_near(first, single(*(argument[0] for argument in arguments)))

    def test_sequences_of_other_types(self, form: str) -> None:
        grouped, _, make = GROUPED[form]
        arguments = make([(None, 3, 2, 4, 5), (2, 3, 3, 1, 6)])
        for a, b in zip(grouped(*map(tuple, arguments)), grouped(*arguments), strict=True):
            assert torch.equal(a, b)

    def test_inference_mode_reaches_every_thread(self, form: str) -> None:
        grouped, _, make = GROUPED[form]
        with torch.inference_mode():
            results = grouped(*make([(None, 3, 2, 4, 5)] * 8))
        assert all(result.is_inference() for result in results)


@st.composite
def layer_lists(draw: st.DrawFn) -> list[tuple]:
    size = st.integers(0, 6)
    return draw(st.lists(st.tuples(blocks, size, size, size, size), min_size=1, max_size=6))


@given(layers=layer_lists(), form=st.sampled_from(sorted(GROUPED)), dtype=dtypes)
@settings(max_examples=50)
def test_grouped_matches_reference(layers: list[tuple], form: str, dtype: torch.dtype) -> None:
    grouped, _, make = GROUPED[form]
    expected = reference.kron_matmul if form == "kron" else reference.kron_eigen_matmul
    arguments = make(layers, dtype)
    for result, layer in zip(grouped(*arguments), zip(*arguments, strict=True), strict=True):
        scale = cancellation(*layer, call=expected)
        assert_near(result, expected(*to_double(list(layer))), scale)


class TestReducedPrecision:
    """Results in bfloat16 and float16 are rounded once, at the end."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [None, 3])
    def test_rounded_once(self, dtype: torch.dtype, k: int | None) -> None:
        A, B = random((40, 90), dtype, scale=0.1), random((30, 70), dtype, 1)
        X = random(shape_of_x(k, 90, 70), dtype, 2)
        S, U, V = random((40, 30), dtype, 3), A.T, B.T
        for result, exact in (
            (ops.kron_matmul(A, B, X), reference.kron_matmul(*to_double([A, B, X]))),
            (ops.grouped_kron_matmul([A], [B], [X])[0], A.double() @ X.double() @ B.double().T),
            (
                ops.kron_eigen_matmul(U, S, V, X),
                reference.kron_eigen_matmul(*to_double([U, S, V, X])),
            ),
        ):
            assert result.dtype == dtype
            # Half a unit in the last place is the most that one rounding costs.
            assert relative_error(result, exact) <= torch.finfo(dtype).eps / 2

    def test_float16_does_not_overflow_on_the_way(self) -> None:
        A = torch.full((1, 1000), 16.0, dtype=torch.float16)
        X = torch.full((1000, 4), 16.0, dtype=torch.float16)
        B = torch.full((2, 4), 2.0**-12, dtype=torch.float16)
        assert torch.equal(ops.kron_matmul(A, B, X), torch.full_like(B[:1, :2], 250.0))
        ones = torch.ones(1, 1, dtype=torch.float16)
        small = torch.full((4, 1), 2.0**-6, dtype=torch.float16)
        result = ops.kron_eigen_matmul(A.T, 2.0**-8 * ones, small, X)
        exact = reference.kron_eigen_matmul(*to_double([A.T, 2.0**-8 * ones, small, X]))
        assert relative_error(result, exact) <= 1e-3


def leaves(tensors: list[Tensor], mask: tuple[bool, ...]) -> list[Tensor]:
    return [t.clone().requires_grad_(need) for t, need in zip(tensors, mask, strict=True)]


def masks(n: int) -> list[tuple[bool, ...]]:
    return [mask for mask in product((False, True), repeat=n) if any(mask)]


class TestDerivatives:
    @pytest.mark.parametrize("k", [None, 2])
    @pytest.mark.parametrize("mask", masks(3))
    def test_kron_matmul(self, mask: tuple[bool, ...], k: int | None) -> None:
        tensors = [random((3, 2)), random((4, 3), seed=1), random(shape_of_x(k, 2, 3), seed=2)]
        inputs = leaves(tensors, mask)
        assert gradcheck(ops.kron_matmul, inputs)
        assert gradgradcheck(ops.kron_matmul, inputs)

    @pytest.mark.parametrize("k", [None, 2])
    @pytest.mark.parametrize("mask", masks(4))
    def test_kron_eigen_matmul(self, mask: tuple[bool, ...], k: int | None) -> None:
        tensors = [random((3, 2)), random((2, 3), seed=1), random((2, 3), seed=2)]
        inputs = leaves([*tensors, random(shape_of_x(k, 3, 2), seed=3)], mask)
        assert gradcheck(ops.kron_eigen_matmul, inputs)
        assert gradgradcheck(ops.kron_eigen_matmul, inputs)

    @pytest.mark.parametrize("form", GROUPED)
    @pytest.mark.parametrize(
        "pattern", ["all", "first argument", "last argument", "one layer", "x"]
    )
    def test_grouped(self, form: str, pattern: str) -> None:
        grouped, _, make = GROUPED[form]
        lists = make([(None, 2, 3, 2, 1), (2, 1, 2, 3, 2)])
        flat = [tensor for argument in lists for tensor in argument]
        mask = {
            "all": [True] * len(flat),
            "first argument": [i < 2 for i in range(len(flat))],
            "last argument": [i >= len(flat) - 2 for i in range(len(flat))],
            "one layer": [i % 2 == 1 for i in range(len(flat))],
            "x": [i == 2 for i in range(len(flat))],
        }[pattern]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(grouped(*(list(tensors[i : i + 2]) for i in range(0, len(tensors), 2))))

        inputs = leaves(flat, tuple(mask))
        assert gradcheck(call, inputs)
        assert gradgradcheck(call, inputs)

    @pytest.mark.parametrize("form", GROUPED)
    def test_grouped_with_unused_results(self, form: str) -> None:
        grouped, single, make = GROUPED[form]
        lists = make([(None, 2, 3, 2, 1), (2, 1, 2, 3, 2), (1, 2, 2, 2, 2)])
        for argument in lists:
            for tensor in argument:
                tensor.requires_grad_()
        grouped(*lists)[1].square().sum().backward()
        layer = [argument[1].detach().clone().requires_grad_() for argument in lists]
        single(*layer).square().sum().backward()
        for argument, tensor in zip(lists, layer, strict=True):
            assert_near(argument[1].grad, tensor.grad)
            for other in (argument[0].grad, argument[2].grad):
                assert other is None or not other.any()

    @pytest.mark.parametrize("form", GROUPED)
    def test_one_tensor_in_two_layers(self, form: str) -> None:
        grouped, single, make = GROUPED[form]
        lists = make([(None, 3, 2, 4, 5)])
        tensors = [argument[0].requires_grad_() for argument in lists]
        sum(r.square().sum() for r in grouped(*([t, t] for t in tensors))).backward()
        grads = [t.grad.clone() for t in tensors]
        for t in tensors:
            t.grad = None
        (2 * single(*tensors).square().sum()).backward()
        for grad, t in zip(grads, tensors, strict=True):
            assert_near(grad, t.grad)

    def test_halves(self) -> None:
        inputs = leaves(
            [random((3, 2)), random((4, 2), seed=1), random((3, 4), seed=2)], (True,) * 3
        )
        assert gradcheck(ops.to_eigenbasis, inputs)
        assert gradcheck(ops.from_eigenbasis, [*inputs[:2], random((2, 2)).requires_grad_()])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_keep_the_dtype(self, dtype: torch.dtype) -> None:
        A, B, X = leaves([random((n, n), dtype) for n in (2, 2, 2)], (True,) * 3)
        ops.kron_matmul(A, B, X).sum().backward()
        assert {t.grad.dtype for t in (A, B, X)} == {dtype}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_expanded_gradient_and_strided_inputs(self, dtype: torch.dtype) -> None:
        tensors = [random((5, 4), dtype), random((6, 3), dtype, 1), random((2, 4, 3), dtype, 2)]
        inputs = [arrange(t, "strided").detach().requires_grad_() for t in tensors]
        ops.kron_matmul(*inputs).sum().backward()
        exact = [t.double().requires_grad_() for t in tensors]
        reference.kron_matmul(*exact).sum().backward()
        for t, e in zip(inputs, exact, strict=True):
            assert_near(t.grad, e.grad, tolerance=TOLERANCE[dtype])

    def test_empty_block_has_zero_gradient(self) -> None:
        A, B, X = leaves([random((2, 3)), random((4, 5)), random((0, 3, 5))], (True,) * 3)
        ops.kron_matmul(A, B, X).sum().backward()
        assert torch.equal(A.grad, torch.zeros(2, 3, dtype=torch.float64))
        assert torch.equal(B.grad, torch.zeros(4, 5, dtype=torch.float64))
        assert X.grad.shape == (0, 3, 5)

    def test_no_graph_without_need(self) -> None:
        A, B, X = leaves([random((2, 3)), random((4, 5)), random((3, 5))], (True,) * 3)
        with torch.no_grad():
            assert not ops.kron_matmul(A, B, X).requires_grad
        assert not ops.kron_matmul(A.detach(), B.detach(), X.detach()).requires_grad
        assert ops.kron_matmul(A.detach(), B, X.detach()).requires_grad
