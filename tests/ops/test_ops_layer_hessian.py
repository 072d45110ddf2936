"""layer_hessian_matmul against float64 and against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import alphas, dtypes, input_layouts, seeds
from tensors import INPUT_LAYOUTS, arrange, assert_near, random, relative_error, softmax
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from hesskern import ops
from hesskern.ops import reference

sizes = st.one_of(st.integers(0, 7), st.sampled_from((1, 37)))


def shapes(
    n: int, c: int, m: int, d: int, t: int | None, k: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    positions = () if t is None else (t,)
    return (n, d, *positions), (n, c, m, *positions), (m, d) if k is None else (k, m, d)


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@given(n=sizes, c=st.integers(0, 5), m=sizes, d=sizes, t=st.sampled_from((None, None, 0, 1, 2, 5)),
       k=st.sampled_from((None, None, 0, 1, 3)), dtype=dtypes,
       layouts=st.tuples(*[input_layouts] * 3), alpha=alphas, seed=seeds)  # fmt: skip
def test_reference(
    n: int, c: int, m: int, d: int, t: int | None, k: int | None, dtype: torch.dtype,
    layouts: tuple[str, str, str], alpha: float, seed: int,
) -> None:  # fmt: skip
    x, s, V = (
        arrange(random(shape, dtype, seed + i), layout)
        for i, (shape, layout) in enumerate(zip(shapes(n, c, m, d, t, k), layouts, strict=True))
    )
    result = ops.layer_hessian_matmul(x, s, V, alpha)
    assert result.dtype == dtype
    # A tenth of the result's size if no terms cancelled: what rounding is measured against.
    scale = 0.1 * reference.layer_hessian_matmul(*(a.abs() for a in double(x, s, V)), abs(alpha))
    expected = reference.layer_hessian_matmul(*double(x, s, V), alpha)
    assert_near(result, expected, float(scale.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [None, 1, 6])
@pytest.mark.parametrize("k", [None, 1, 5])
class TestUsualSizes:
    def test_many_samples(self, dtype: torch.dtype, t: int | None, k: int | None) -> None:
        x, s, V = (random(shape, dtype, i) for i, shape in enumerate(shapes(333, 3, 9, 31, t, k)))
        expected = reference.layer_hessian_matmul(*double(x, s, V), 1 / 333)
        assert_near(ops.layer_hessian_matmul(x, s, V, 1 / 333), expected)

    def test_wide_layer(self, dtype: torch.dtype, t: int | None, k: int | None) -> None:
        x, s, V = (random(shape, dtype, i) for i, shape in enumerate(shapes(18, 2, 70, 140, t, k)))
        expected = reference.layer_hessian_matmul(*double(x, s, V))
        assert_near(ops.layer_hessian_matmul(x, s, V), expected)


@pytest.mark.parametrize(
    ("n", "c", "m", "d", "t"), [(500_000, 2, 2, 3, None), (1500, 2, 2, 3, 64), (40_000, 1, 1, 1, 2)]
)
def test_long_sums_of_one_sign(n: int, c: int, m: int, d: int, t: int | None) -> None:
    """Rounding errors of non-negative terms add up instead of cancelling."""
    x, s, V = (
        random(shape, torch.float32, i).abs() for i, shape in enumerate(shapes(n, c, m, d, t, None))
    )
    # Few bits in the data give the errors of long float32 sums one sign as well.
    x, s = x.bfloat16().float(), s.bfloat16().float()
    expected = torch.zeros(m, d, dtype=torch.float64)
    for xs, ss in zip(x.split(10_000), s.split(10_000), strict=True):
        expected += reference.layer_hessian_matmul(*double(xs, ss, V), 1 / n)
    assert_near(ops.layer_hessian_matmul(x, s, V, 1 / n), expected)


@pytest.mark.parametrize("t", [None, 4])
class TestMatrix:
    """What the operator applies is one symmetric positive semi-definite matrix, the right one."""

    def dense(self, t: int | None) -> tuple[Tensor, Tensor, Tensor]:
        x, s, eye = (random(shape, seed=i) for i, shape in enumerate(shapes(11, 3, 4, 5, t, 20)))
        eye = torch.eye(20, dtype=torch.float64).view(20, 4, 5)
        return x, s, ops.layer_hessian_matmul(x, s, eye, 1 / 11).view(20, 20)

    def test_symmetric_and_semidefinite(self, t: int | None) -> None:
        _, _, H = self.dense(t)
        assert_near(H, H.T)
        assert torch.linalg.eigvalsh(H)[0] >= -1e-12 * H.norm()

    def test_mean_of_kronecker_products(self, t: int | None) -> None:
        x, s, H = self.dense(t)
        if t is None:
            expected = sum(
                torch.kron(sn.T @ sn, torch.outer(xn, xn)) for xn, sn in zip(x, s, strict=True)
            )
        else:
            rows = torch.einsum("ncmt,ndt->ncmd", s, x).flatten(2).flatten(0, 1)
            expected = rows.T @ rows
        assert_near(H, expected / 11)

    def test_linear_in_v(self, t: int | None) -> None:
        x, s, H = self.dense(t)
        V, W = random((4, 5), seed=7), random((4, 5), seed=8)
        result = ops.layer_hessian_matmul(x, s, 2 * V - W, 1 / 11)
        assert_near(result.flatten(), H @ (2 * V - W).flatten())

    def test_block_is_its_vectors(self, t: int | None) -> None:
        x, s, _ = self.dense(t)
        V = random((6, 4, 5), seed=7)
        each = torch.stack([ops.layer_hessian_matmul(x, s, v) for v in V])
        assert_near(ops.layer_hessian_matmul(x, s, V), each)

    def test_samples_add_up(self, t: int | None) -> None:
        x, s, _ = self.dense(t)
        V = random((4, 5), seed=7)
        parts = sum(
            ops.layer_hessian_matmul(xs, ss, V)
            for xs, ss in zip(x.split([0, 1, 10]), s.split([0, 1, 10]), strict=True)
        )
        assert_near(ops.layer_hessian_matmul(x, s, V), parts)

    def test_every_layout_gives_one_result(self, t: int | None) -> None:
        x, s, _ = self.dense(t)
        V = random((3, 4, 5), seed=7)
        expected = ops.layer_hessian_matmul(x, s, V)
        for layout in INPUT_LAYOUTS[:-1]:
            result = ops.layer_hessian_matmul(*(arrange(a, layout) for a in (x, s, V)))
            assert_near(result, expected)

    def test_derivative_in_v(self, t: int | None) -> None:
        x, s, H = self.dense(t)
        for shape in ((4, 5), (2, 4, 5)):
            V = random(shape, seed=7).requires_grad_()
            assert gradcheck(lambda V: ops.layer_hessian_matmul(x, s, V, 0.5), [V])
            assert gradgradcheck(lambda V: ops.layer_hessian_matmul(x, s, V, 0.5), [V])
        v = random((4, 5), seed=7).requires_grad_()
        (0.5 * v * ops.layer_hessian_matmul(x, s, v, 1 / 11)).sum().backward()
        assert_near(v.grad.flatten(), H @ v.detach().flatten())


def test_trace_of_one_matrix_three_ways() -> None:
    """tr E[M (x) x x^T] from the operator, from its factors per sample, and by definition."""
    x, jacobian, p = random((9, 3)), random((9, 4, 2), seed=1), softmax((9, 4))
    root = torch.diag_embed(p.sqrt()) - p.sqrt().unsqueeze(2) * p.unsqueeze(1)
    s = torch.einsum("ncb,nbm->ncm", root, jacobian)
    eye = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    H = ops.layer_hessian_matmul(x, s, eye, 1 / 9).view(6, 6)
    total = 0.0
    for n in range(9):
        M = ops.output_hessian_(torch.zeros_like(H[:2, :2]), jacobian[n : n + 1], p[n : n + 1])
        total += float(M.trace() * x[n].square().sum()) / 9
    assert abs(float(H.trace()) - total) <= 1e-12 * total
    assert abs(float(s.square().sum((1, 2)) @ x.square().sum(1)) / 9 - total) <= 1e-12 * total


@pytest.mark.parametrize("name", ["x", "s"])
def test_no_gradient_for_data(name: str) -> None:
    arguments = {"x": random((3, 2)), "s": random((3, 1, 4)), "V": random((4, 2)).requires_grad_()}
    arguments[name].requires_grad_()
    result = ops.layer_hessian_matmul(**arguments)
    with pytest.raises(
        NotImplementedError, match=f"gradient for V alone, but {name} requires grad"
    ):
        result.sum().backward()


def test_nan_stays_in_its_vector_of_the_block() -> None:
    x, s, V = random((20, 3)), random((20, 2, 4)), random((3, 4, 3))
    V[1, 0, 0] = float("nan")
    result = ops.layer_hessian_matmul(x, s, V)
    assert result[1].isnan().all()
    assert relative_error(result[0], ops.layer_hessian_matmul(x, s, V[0])) <= 1e-12
    assert result[2].isfinite().all()


def test_infinite_input_is_not_silent() -> None:
    x, s = random((20, 3)), random((20, 2, 4))
    x[7, 1] = float("inf")
    assert not ops.layer_hessian_matmul(x, s, random((4, 3))).isfinite().all()


@pytest.mark.parametrize("k", [None, 3])
def test_nothing_is_packed_on_a_cpu(k: int | None) -> None:
    x, s, V = (random(shape) for shape in shapes(20, 2, 4, 3, 2, k))
    packed = ops.pack_layer_inputs(x, 4)
    assert packed.shape == (0,)
    assert packed.dtype == torch.int32
    V.requires_grad_()
    result = ops.layer_hessian_matmul(x, s, V, 0.5, packed)
    assert torch.equal(result, ops.layer_hessian_matmul(x, s, V, 0.5))
    assert gradcheck(lambda V: ops.layer_hessian_matmul(x, s, V, 0.5, packed), [V])
