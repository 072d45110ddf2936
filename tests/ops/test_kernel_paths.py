"""Shapes that reach every branch of the CPU kernels, under every instruction set.

The operators' tests vary shapes at random and stay small; here each shape stands for one way
through a kernel: its name says which.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensors import Accumulator, arrange, assert_near, random, softmax
from torch import Tensor

from hesskern import build_info, ops
from hesskern.ops import reference

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Work is shared out as on any machine, also where there is one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def vectors(k: int | None, m: int, d: int, dtype: torch.dtype) -> Tensor:
    return random((m, d) if k is None else (k, m, d), dtype, 3)


def check_layer_hessian(
    x: Tensor,
    s: Tensor,
    V: Tensor,
    product: Callable[[Tensor, Tensor, Tensor, float], Tensor] = ops.layer_hessian_matmul,
) -> None:
    expected = reference.layer_hessian_matmul(x.double(), s.double(), V.double(), 0.5)
    # What rounding is measured against where terms cancel: a tenth of the size without.
    size = reference.layer_hessian_matmul(x.double().abs(), s.double().abs(), V.double().abs(), 0.5)
    assert_near(product(x, s, V, 0.5), expected, 0.1 * float(size.norm()))


# N, c, m, d, k
LINEAR = {
    "rows in place, row of one vector": (9, 2, 1, 16, None),
    "rows in place, last vector moved back": (9, 2, 1, 37, 3),
    "rows in place, half and quarter vectors": (6, 3, 1, 11, 2),
    "rows in place, rows below every vector": (7, 3, 2, 3, None),
    "rows in place, one element": (5, 1, 1, 1, None),
    "rows in place, sums in levels": (1100, 1, 1, 4, None),
    "rows in place, row above the tile": (2, 1, 1, 70_000, None),
    "panels, one vector of columns": (50, 10, 10, 33, None),
    "panels, two vectors of columns": (50, 4, 30, 48, None),
    "panels, several tiles and threads": (200, 9, 65, 96, None),
    "panels, classes in blocks of 8, 4, 2 and 1": (40, 15, 40, 20, None),
    "panels, sums in levels": (9000, 1, 12, 3, None),
    "panels, inner dimension in passes": (20, 2, 17, 2100, None),
    "panels, vectors in blocks": (30, 2, 600, 5, 5),
    "panels, more outputs than one block": (16, 2, 2100, 3, 2),
    "panels, large tile in groups of panels": (300, 1, 20, 1100, 8),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c", "m", "d", "k"), LINEAR.values(), ids=LINEAR.keys())
def test_layer_hessian_linear(
    n: int, c: int, m: int, d: int, k: int | None, dtype: torch.dtype
) -> None:
    x, s = random((n, d), dtype, 1), random((n, c, m), dtype, 2)
    check_layer_hessian(x, s, vectors(k, m, d, dtype))


@pytest.mark.parametrize("layout", ["column_major", "strided", "expanded"])
@pytest.mark.parametrize("m", [1, 40])
def test_layer_hessian_strides(layout: str, m: int) -> None:
    x = arrange(random((70, 45), torch.float32, 1), layout)
    s = arrange(random((70, 3, m), torch.float32, 2), layout)
    check_layer_hessian(x, s, vectors(None, m, 45, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [None, 1, 4, 7, 20])
@pytest.mark.parametrize(("n", "c", "p"), [(40, 3, 150), (9, 2, 5), (600, 2, 17), (3, 1, 5000)])
def test_layer_hessian_whole_rows(
    n: int, c: int, p: int, k: int | None, dtype: torch.dtype
) -> None:
    """d = 1: s holds rows of the Jacobian, x their scale."""
    check_layer_hessian(
        random((n, 1), dtype, 1), random((n, c, p), dtype, 2), vectors(k, p, 1, dtype)
    )


# N, c, m, d, k
FREQUENT = {
    "one sample, one element": (1, 1, 1, 1, None),
    "samples before the end of a word": (63, 2, 20, 40, None),
    "samples after a word, tiles of 256": (321, 2, 9, 30, None),
    "row of whole words": (70, 9, 33, 128, None),
    "row of a word and a part": (66, 3, 18, 65, None),
    "one vector of columns": (70, 2, 16, 90, None),
    "several bands of columns": (65, 3, 235, 20, None),
    "vectors together": (40, 3, 24, 70, 5),
    "vectors in blocks": (20, 2, 900, 40, 9),
    "sums in levels": (4200, 2, 5, 6, None),
}


def by_frequent(x: Tensor, s: Tensor, V: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.ops.hesskern_internal.layer_hessian_matmul_by(x, s, V, alpha, "frequent")


def with_frequent(shape: tuple[int, int], dtype: torch.dtype, value: float, share: float) -> Tensor:
    """Random rows of which ``share`` of the elements is ``value``."""
    x = random(shape, dtype, 1)
    return x.masked_fill_(torch.special.ndtr(random(shape, torch.float64, 4)) < share, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("value", "share"), [(0.0, 0.8), (-1.5, 0.5), (0.25, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize(("n", "c", "m", "d", "k"), FREQUENT.values(), ids=FREQUENT.keys())
def test_layer_hessian_frequent_value(
    n: int, c: int, m: int, d: int, k: int | None, value: float, share: float, dtype: torch.dtype
) -> None:
    x, s = with_frequent((n, d), dtype, value, share), random((n, c, m), dtype, 2)
    # One row without the value, and one that is nothing else.
    x[n // 3] = random((d,), dtype, 5)
    x[n // 2] = value
    check_layer_hessian(x, s, vectors(k, m, d, dtype), by_frequent)


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_hessian_frequent_value_hides_nothing(value: float, bad: float) -> None:
    """An input that is never anything but the value meets NaN in V, and x that is not finite."""
    n, d, m = 80, 100, 60
    x, s = with_frequent((n, d), torch.float32, value, 0.9), random((n, 2, m), torch.float32, 2)
    x[:, 7] = value
    V = vectors(None, m, d, torch.float32)
    V[3, 7] = bad
    assert not bool(torch.isfinite(by_frequent(x, s, V)).any())
    x[5, 9], V = bad, vectors(None, m, d, torch.float32)
    assert not bool(torch.isfinite(by_frequent(x, s, V)[:, 9]).any())


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_layer_hessian_looks_for_a_frequent_value(value: float) -> None:
    """Taken where most of x repeats it and there is enough to multiply, and deterministic."""
    s, V = random((600, 2, 130), torch.float32, 2), vectors(None, 130, 128, torch.float32)
    for share, taken in ((0.9, True), (0.1, False)):
        x = with_frequent((600, 128), torch.float32, value, share)
        assert torch.equal(ops.layer_hessian_matmul(x, s, V), by_frequent(x, s, V)) is taken
    # With 0 few samples give the same sums in either way.
    few = with_frequent((40, 128), torch.float32, value or 1.0, 0.6)
    assert not torch.equal(ops.layer_hessian_matmul(few, s[:40], V), by_frequent(few, s[:40], V))


def test_layer_hessian_by_an_impossible_way() -> None:
    V = vectors(None, 4, 5, torch.float32)
    x, s = random((3, 5, 2), torch.float32, 1), random((3, 2, 4, 2), torch.float32, 2)
    with pytest.raises(ValueError, match="path must be panels"):
        by_frequent(x, s, V)


# N, c, m, d, t, k
POSITIONS = {
    "panels, few positions": (20, 9, 33, 40, 3, None),
    "panels, positions above a tile": (2, 2, 5, 6, 300, None),
    "rows computed, many positions": (12, 3, 16, 25, 49, 9),
    "rows computed, more rows than a block": (5, 2, 40, 33, 120, 6),
    "one output": (10, 3, 1, 5, 9, None),
    "one position": (10, 3, 4, 5, 1, None),
    "one input": (10, 3, 4, 1, 6, None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s_layout", ["contiguous", "swapped", "strided"])
@pytest.mark.parametrize("x_layout", ["contiguous", "swapped", "strided"])
@pytest.mark.parametrize(("n", "c", "m", "d", "t", "k"), POSITIONS.values(), ids=POSITIONS.keys())
def test_layer_hessian_positions(
    n: int, c: int, m: int, d: int, t: int, k: int | None,
    x_layout: str, s_layout: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    x = arrange(random((n, d, t), dtype, 1), x_layout)
    s = arrange(random((n, c, m, t), dtype, 2), s_layout)
    check_layer_hessian(x, s, vectors(k, m, d, dtype))


# Around the lanes of every instruction set's vectors, one to four of them.
LANES = (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LANES)
def test_layer_hessian_around_lanes(size: int, dtype: torch.dtype) -> None:
    for m, d, k in ((size, 5, None), (3, size, None), (1, size, 2), (size, size, 2)):
        x, s = random((11, d), dtype, 1), random((11, 3, m), dtype, 2)
        check_layer_hessian(x, s, vectors(k, m, d, dtype))
    for m, d, t in ((size, 6, 4), (4, size, 6), (6, 4, size)):
        x, s = random((5, d, t), dtype, 1), random((5, 3, m, t), dtype, 2)
        for k in (None, 9):
            check_layer_hessian(x, s, vectors(k, m, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LANES)
def test_accumulation_around_lanes(size: int, dtype: torch.dtype) -> None:
    for n, c, m, t in ((9, 4, size, None), (size, 3, 6, None), (5, 3, 6, size), (5, size, 6, None)):
        jacobian = random((n, c, m) if t is None else (n, c, m, t), dtype, 1)
        p = softmax((n, c), dtype, 2)
        acc = Accumulator((m, m), dtype)
        ops.output_hessian_(acc.tensor, jacobian, p, 0.25)
        acc.check(reference.output_hessian(jacobian.double(), p.double(), 0.25))
    for n, d in ((9, size), (size, 6)):
        x = random((n, d), dtype, 1)
        acc = Accumulator((d, d), dtype)
        ops.input_covariance_(acc.tensor, x, 0.25)
        acc.check(reference.input_covariance(x.double(), 0.25))


# d = 1 has a way of its own.
@pytest.mark.parametrize("shape", [(300, 4, 5, 700), (300, 1, 5, 700), (40, 6, 5, 700, 9)])
def test_layer_hessian_copies_roots_in_parts(shape: tuple[int, ...]) -> None:
    """s without contiguous runs, above what is copied at a time."""
    n, d, c, m, *t = shape
    x = random((n, d, *t), torch.float32, 1)
    s = arrange(random((n, c, m, *t), torch.float32, 2), "column_major")
    check_layer_hessian(x, s, vectors(2, m, d, torch.float32))


# N, c, m, t
OUTPUTS = {
    "private sums, panel not full": (30, 10, 7, None),
    "private sums, panels and an edge": (60, 10, 70, None),
    "private sums, in levels": (2000, 10, 5, None),
    "shared triangle, few rows": (5, 3, 40, None),
    "shared triangle, order above the private": (90, 4, 300, None),
    "two classes": (50, 2, 20, None),
    "one class": (50, 1, 20, None),
    "more roots than a panel's rows": (6, 200, 33, None),
    "positions, private sums": (40, 4, 18, 9),
    "positions, run above a panel's rows": (12, 3, 33, 200),
    "positions, shared triangle": (6, 3, 290, 7),
    "one position": (40, 4, 18, 1),
    "one output": (40, 4, 1, 9),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "swapped", "strided"])
@pytest.mark.parametrize("roots_given", [False, True])
@pytest.mark.parametrize(("n", "c", "m", "t"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_output_hessian(
    n: int, c: int, m: int, t: int | None, roots_given: bool, layout: str, dtype: torch.dtype
) -> None:
    jacobian = arrange(random((n, c, m) if t is None else (n, c, m, t), dtype, 1), layout)
    p = None if roots_given else softmax((n, c), dtype, 2)
    acc = Accumulator((m, m), dtype)
    ops.output_hessian_(acc.tensor, jacobian, p, 0.25)
    acc.check(reference.output_hessian(jacobian.double(), None if p is None else p.double(), 0.25))


def test_output_hessian_of_certain_predictions() -> None:
    """Probabilities of exactly 0 and 1: suffix sums vanish, the result has no NaN."""
    jacobian = random((12, 4, 9), torch.float32, 1)
    p = torch.eye(4).repeat(3, 1)
    p[0] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    acc = Accumulator((9, 9), torch.float32)
    ops.output_hessian_(acc.tensor, jacobian, p)
    acc.check(reference.output_hessian(jacobian.double(), p.double()))


def test_output_hessian_does_not_cancel() -> None:
    """Gradients with a large common part: it belongs to no root."""
    jacobian = random((50, 6, 12), torch.float32, 1) + 100
    p = softmax((50, 6), torch.float32, 2)
    p64 = p.double() / p.double().sum(1, keepdim=True)
    acc = torch.zeros(12, 12)
    ops.output_hessian_(acc, jacobian, p)
    ops.mirror_(acc)
    assert_near(acc, reference.output_hessian(jacobian.double() - 100, p64))


# m', m, d, d', k
KRON = {
    "right product first": (40, 33, 20, 15, None),
    "left product first": (5, 64, 40, 70, None),
    "left product first, a block": (5, 64, 40, 70, 3),
    "right product first, a block": (64, 20, 64, 20, 5),
    "inner dimension in passes": (20, 600, 530, 30, None),
    "threads share panels": (70, 300, 256, 512, None),
    "threads share rows": (300, 300, 200, 65, None),
    "one row": (1, 40, 50, 60, None),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "swapped", "strided"])
@pytest.mark.parametrize(("rows", "m", "d", "columns", "k"), KRON.values(), ids=KRON.keys())
def test_kron(
    rows: int, m: int, d: int, columns: int, k: int | None, layout: str, dtype: torch.dtype
) -> None:
    A, B = (arrange(random(shape, dtype, 1), layout) for shape in ((rows, m), (columns, d)))
    X, S = arrange(vectors(k, m, d, dtype), layout), arrange(random((rows, columns), dtype), layout)
    A64, B64, X64, S64 = (t.double() for t in (A, B, X, S))
    assert_near(ops.kron_matmul(A, B, X), reference.kron_matmul(A64, B64, X64))
    assert_near(
        ops.kron_eigen_matmul(A.mT, S, B.mT, X),
        reference.kron_eigen_matmul(A64.mT, S64, B64.mT, X64),
    )


def test_groups_mix_large_small_and_empty_layers() -> None:
    shapes = [(16, 32), (200, 300), (0, 4), (3, 1), (16, 32), (64, 150)]
    A = [random((m, m), torch.float32, i) for i, (m, _) in enumerate(shapes)]
    B = [random((d, d), torch.float32, i) for i, (_, d) in enumerate(shapes)]
    X = [random(shape, torch.float32, i) for i, shape in enumerate(shapes)]
    S = [random(shape, torch.float32, i + 9) for i, shape in enumerate(shapes)]
    for i, out in enumerate(ops.grouped_kron_matmul(A, B, X)):
        assert_near(out, reference.kron_matmul(A[i].double(), B[i].double(), X[i].double()))
    for i, out in enumerate(ops.grouped_kron_eigen_matmul(A, S, B, X)):
        operands = (t.double() for t in (A[i], S[i], B[i], X[i]))
        assert_near(out, reference.kron_eigen_matmul(*operands))


LEVELS = ("baseline", "AVX2", "AVX-512", "AMX")


@pytest.mark.skipif("HESSKERN_SIMD" in os.environ, reason="this is the run under a lesser set")
@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(str(build_info()["simd"]))])
def test_lesser_instruction_sets(level: str) -> None:
    """This file again with the kernels of machines without this one's widest vectors."""
    environment = {**os.environ, "HESSKERN_SIMD": level.lower().replace("-", "")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
