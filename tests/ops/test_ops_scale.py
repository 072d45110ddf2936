"""Threads and sizes: determinism, torch.set_num_threads, and counts and strides beyond 2^31."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import BF16, F32, F64, assert_near, f32, random, softmax
from torch import Tensor

import hesskern
from hesskern import ops
from hesskern.ops import reference


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


THREADED: dict[str, Callable[[], list[Tensor]]] = {
    "input_covariance_": lambda: [ops.input_covariance_(f32(300, 300), f32(500, 300)).triu()],
    "input_covariance_ bfloat16": lambda: [
        ops.input_covariance_(f32(70, 70), random((9000, 70), BF16), ones=False).triu()
    ],
    "conv_input_covariance_": lambda: [
        ops.conv_input_covariance_(
            f32(2, 72, 72), f32(9, 16, 17, 15), [3, 3], [1, 2], [1, 1], [1, 1], 2
        ).triu()
    ],
    "output_hessian_": lambda: [
        ops.output_hessian_(f32(150, 150), f32(80, 10, 150), softmax((80, 10), F32)).triu()
    ],
    "output_hessian_ positions": lambda: [
        ops.output_hessian_(f32(16, 16), f32(80, 10, 16, 60), softmax((80, 10), F32)).triu()
    ],
    "mirror_": lambda: [ops.mirror_(f32(3, 333, 333))],
    "kron_matmul": lambda: [ops.kron_matmul(f32(200, 190), f32(210, 220), f32(2, 190, 220))],
    "grouped_kron_matmul": lambda: ops.grouped_kron_matmul(
        [f32(20 + 40 * i, 30) for i in range(9)],
        [f32(50, 20 + 60 * i) for i in range(9)],
        [f32(30, 20 + 60 * i) for i in range(9)],
    ),
    "grouped_kron_eigen_matmul": lambda: ops.grouped_kron_eigen_matmul(
        [f32(30, 20 + 40 * i) for i in range(9)],
        [f32(20 + 40 * i, 50) for i in range(9)],
        [f32(20 + 60 * i, 50) for i in range(9)],
        [f32(2, 30, 20 + 60 * i) for i in range(9)],
    ),
    "layer_hessian_matmul": lambda: [
        ops.layer_hessian_matmul(f32(700, 90), f32(700, 5, 60), f32(3, 60, 90), 1 / 700)
    ],
    "layer_hessian_matmul positions": lambda: [
        ops.layer_hessian_matmul(f32(60, 75, 36), f32(60, 5, 16, 36), f32(16, 75), 1 / 60)
    ],
}


@pytest.mark.parametrize("name", THREADED)
def test_threads(name: str, threads: Callable[[int], None]) -> None:
    """Bitwise the same for one number of threads; within rounding for another."""
    results = {}
    for count in (1, 2, 3):
        threads(count)
        results[count] = THREADED[name]()
        for a, b in zip(THREADED[name](), results[count], strict=True):
            assert torch.equal(a, b)
    for count in (2, 3):
        for a, b in zip(results[count], results[1], strict=True):
            assert_near(a, b, tolerance=1e-5)


def test_threads_follow_torch(threads: Callable[[int], None]) -> None:
    for count in (1, 2, 3):
        threads(count)
        assert hesskern._C.num_threads() == torch.get_num_threads() == count


# Beyond 2^31 elements. No test here allocates them: counts come from expanded or empty tensors,
# distances from views into a sparse file of which only the touched pages exist.
MANY = 2**31 + 5


class TestBeyondInt32:
    def test_checks_see_every_sample(self) -> None:
        x = torch.zeros(1, 1).expand(MANY, 3)
        jacobian, image = torch.zeros(1, 1, 1).expand(MANY, 2, 3), x.view(MANY, 1, 3)
        calls: list[tuple[str, Callable[..., Any], tuple]] = [
            ("acc", ops.input_covariance_, (f32(2, 2), x)),
            ("acc", ops.output_hessian_, (f32(2, 2), jacobian)),
            ("probabilities", ops.output_hessian_, (f32(3, 3), jacobian, f32(5, 2))),
            ("the kernel", ops.conv_input_covariance_, (f32(4, 4), image, [4], [1], [0], [1])),
            ("X", ops.kron_matmul, (f32(2, 3), f32(2, 3), image)),
            ("X", ops.kron_eigen_matmul, (f32(3, 2), f32(2, 2), f32(2, 2), image)),
            ("x", ops.layer_hessian_matmul, (x, f32(5, 2, 3), f32(3, 3))),
        ]
        for name, call, arguments in calls:
            with pytest.raises(ValueError, match=rf"_: {name} .*{MANY}|matmul: {name} .*{MANY}"):
                call(*arguments)

    def test_geometry_of_a_huge_image(self) -> None:
        # 2^40 positions, and an order of acc beyond 2^31.
        image = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**20, 2**20)
        with pytest.raises(ValueError, match="d = 4294967296 "):
            ops.conv_input_covariance_(f32(4, 4), image, [2**16, 2**16], [1, 1], [0, 0], [1, 1])

    def test_fake_results_beyond_int32(self) -> None:
        side = 2**17
        A, X = torch.empty(side, 2, device="meta"), torch.empty(3, 2, 2, device="meta")
        assert ops.kron_matmul(A, A, X).shape == (3, side, side)
        wide = torch.empty(side, side, device="meta")
        eye = torch.empty(side, 1, device="meta")
        assert ops.kron_eigen_matmul(eye, eye[:1], eye, wide).shape == (side, side)
        x, s = torch.empty(MANY, 2, device="meta"), torch.empty(MANY, 1, 3, device="meta")
        assert ops.layer_hessian_matmul(x, s, torch.empty(3, 2, device="meta")).shape == (3, 2)

    @pytest.mark.parametrize("dtype", [F64, BF16])
    def test_every_sample_counts(self, dtype: torch.dtype) -> None:
        # Samples without features leave the corner of the ones: their number.
        acc = torch.zeros(1, 1, dtype=F64)
        ops.input_covariance_(acc, torch.empty(MANY, 0, dtype=dtype), ones=True)
        assert acc.item() == MANY

    @pytest.mark.parametrize("call", [ops.input_covariance_, ops.output_hessian_])
    def test_long_sum(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        """More samples than int32 counts, in float32; one number repeated, never copied whole."""
        shape = (MANY, 1) if call is ops.input_covariance_ else (MANY, 1, 1)
        acc = call(torch.zeros(1, 1), torch.ones(()).expand(shape))
        assert_near(acc, torch.full((1, 1), float(MANY)))

    @pytest.mark.parametrize(
        ("x", "s"), [((2**28 + 1, 8), (2**28 + 1, 1, 1)), ((1, 2), (1, 2**28 + 1, 8))]
    )
    def test_long_products(self, x: tuple[int, ...], s: tuple[int, ...]) -> None:
        """More elements than int32 counts, from rows that are all the same one."""
        # float64: a float32 sum of so many equal terms drifts.
        row, root = random((1, x[1]), F64), random((1, 1, s[2]), F64, 1)
        V = random((s[2], x[1]), F64, 2)
        result = ops.layer_hessian_matmul(row.expand(x), root.expand(s), V)
        one = reference.layer_hessian_matmul(row, root, V)
        assert_near(result, (2**28 + 1) * one, tolerance=1e-7)

    def test_long_weighted_sum(self) -> None:
        count = 2**24 + 1
        jacobian, p = f32(1, 2, 64), softmax((1, 2), F32)
        acc = torch.zeros(64, 64)
        ops.output_hessian_(acc, jacobian.expand(count, 2, 64), p.expand(count, 2))
        expected = count * reference.output_hessian(jacobian.double(), p.double())
        assert_near(ops.mirror_(acc), expected, tolerance=1e-4)

    def test_strides(self, sparse: Callable[..., Tensor]) -> None:
        """Rows of inputs and of accumulators more than 2^31 elements apart."""
        x, before = f32(3, 2), f32(2, 2, seed=1)
        far, acc = sparse(x), sparse(before)
        ops.input_covariance_(acc, far, 0.5)
        ops.mirror_(acc)
        expected = before.double().triu() + before.double().triu(1).T
        assert_near(acc.contiguous(), expected + reference.input_covariance(x.double(), 0.5))

    def test_strides_conv(self, sparse: Callable[..., Tensor]) -> None:
        x = f32(2, 2, 5)
        acc = sparse(torch.zeros(2, 2, 2))
        ops.conv_input_covariance_(acc, sparse(x), [2], [1], [1], [1], 2)
        expected = reference.conv_input_covariance(x.double(), [2], [1], [1], [1], 2)
        assert_near(ops.mirror_(acc).contiguous(), expected)

    @pytest.mark.parametrize("positions", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_strides_output_hessian(
        self, weighted: bool, positions: bool, sparse: Callable[..., Tensor]
    ) -> None:
        jacobian = f32(3, 2, 4, 5) if positions else f32(3, 2, 4)
        p = softmax((3, 2), F32) if weighted else None
        acc = sparse(torch.zeros(4, 4))
        ops.output_hessian_(acc, sparse(jacobian), None if p is None else sparse(p))
        weights = None if p is None else p.double()
        expected = reference.output_hessian(jacobian.double(), weights)
        assert_near(ops.mirror_(acc).contiguous(), expected)

    def test_strides_products(self, sparse: Callable[..., Tensor]) -> None:
        A, B, X, S = f32(3, 2), f32(4, 3, seed=1), f32(2, 2, 3, seed=2), f32(3, 4, seed=3)
        far = [sparse(t) for t in (A, B, X)]
        expected = reference.kron_matmul(A.double(), B.double(), X.double())
        assert_near(ops.kron_matmul(*far), expected)
        assert_near(ops.grouped_kron_matmul(*([t] for t in far))[0], expected)
        expected = reference.kron_eigen_matmul(A.T.double(), S.double(), B.T.double(), X.double())
        arguments = far[0].T, sparse(S), far[1].T, far[2]
        assert_near(ops.kron_eigen_matmul(*arguments), expected)

    @pytest.mark.parametrize("positions", [(), (4,)])
    def test_strides_layer_hessian(
        self, positions: tuple[int, ...], sparse: Callable[..., Tensor]
    ) -> None:
        x, s, V = f32(3, 2, *positions), f32(3, 2, 5, *positions, seed=1), f32(2, 5, 2, seed=2)
        result = ops.layer_hessian_matmul(sparse(x), sparse(s), sparse(V))
        assert_near(result, reference.layer_hessian_matmul(x.double(), s.double(), V.double()))


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[..., Tensor]:
    """A function that copies a float32 tensor to one with entries of dimension 0 2^31 + 3 apart.

    The memory is a sparse file's: a few pages of it are ever touched.
    """
    distance = 2**31 + 3
    files = iter(range(100))

    def make(t: Tensor) -> Tensor:
        size = (t.shape[0] - 1) * distance + t[0].numel()
        memory = torch.from_file(
            str(tmp_path / f"sparse{next(files)}"), shared=True, size=size, dtype=F32
        )
        return memory.as_strided(t.shape, (distance, *t[0].contiguous().stride())).copy_(t)

    return make
