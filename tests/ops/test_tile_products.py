"""Sums of products at shapes and numbers that processors with a tile unit multiply on it.

There a float32 is split into three bfloat16 and six of nine products are taken; elsewhere these are
tests of the plain kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tensors import random
from torch import Tensor

from hesskern import ops
from hesskern.ops import reference

# Of an entry, relative to the root of the product of its sums of squares.
ROUNDING = 1e-6


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def gram(x: Tensor, alpha: float = 1.0) -> Tensor:
    acc = torch.zeros(x.shape[1], x.shape[1])
    ops.input_covariance_(acc, x, alpha)
    return acc


def check_gram(acc: Tensor, x: Tensor, alpha: float = 1.0) -> None:
    """The upper triangle of ``acc``, entry by entry."""
    wide = x.double()
    expected = alpha * (wide.T @ wide)
    norms = expected.diag().abs().sqrt()
    bound = ROUNDING * torch.outer(norms, norms)
    assert ((acc.double() - expected).abs() <= bound).triu().sum() == acc.numel() - (
        acc.numel() - acc.shape[0]
    ) // 2


SHAPES = {
    "least of either": (128, 96),
    "no panel is full": (1000, 97),
    "sums of each thread": (515, 130),
    "sums of each thread, in levels": (8300, 128),
    "the last step has one row": (129, 256),
    "one block": (300, 500),
    "blocks, the last one of one column": (260, 513),
    "blocks and an edge": (700, 1090),
    "rows in levels": (8200, 300),
}


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize(("rows", "d"), SHAPES.values(), ids=SHAPES.keys())
def test_input_covariance(rows: int, d: int, layout: str) -> None:
    if layout == "columns":
        x = random((d, rows), torch.float32).T
    elif layout == "strided":
        x = random((rows, d + 3), torch.float32)[:, 2 : d + 2]
    else:
        x = random((rows, d), torch.float32)
    check_gram(gram(x, 0.25), x, 0.25)


@pytest.mark.parametrize(("n", "c", "m"), [(40, 10, 120), (200, 3, 300), (64, 2, 1030)])
def test_output_hessian_of_roots_and_of_probabilities(n: int, c: int, m: int) -> None:
    jacobian = random((n, c, m), torch.float32)
    acc = torch.zeros(m, m)
    ops.output_hessian_(acc, jacobian)
    check_gram(acc, jacobian.flatten(0, 1))
    p = torch.softmax(random((n, c), torch.float32), 1)
    acc.zero_()
    ops.output_hessian_(acc, jacobian, p)
    wide = reference.output_hessian(jacobian.double(), p.double())
    assert float((acc.double() - wide).triu().norm()) <= ROUNDING * float(wide.norm())


@pytest.mark.parametrize("m", [100, 256, 300])
def test_output_hessian_of_positions(m: int) -> None:
    jacobian = random((9, 2, m, 25), torch.float32)
    acc = torch.zeros(m, m)
    ops.output_hessian_(acc, jacobian)
    check_gram(acc, jacobian.permute(0, 1, 3, 2).reshape(-1, m))


@pytest.mark.parametrize("channels", [16, 70])
def test_patches_of_a_convolution(channels: int) -> None:
    x = random((12, channels, 9, 9), torch.float32)
    d = channels * 9
    acc = torch.zeros(d, d)
    torch.ops.hesskern_internal.conv_input_covariance_by_(
        acc, x, [3, 3], [1, 1], [1, 1], [1, 1], 1, 1.0, "patches"
    )
    check_gram(acc, torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, d))


@pytest.mark.parametrize(
    "value",
    [
        1 + 2**-9,  # parts 1, 2^-9 and 0
        1 + 2**-9 + 2**-18,  # the third part is the last bits
        1 + 2**-8,  # a tie in rounding to bfloat16
        2 - 2**-23,  # all bits set
        -(1 + 2**-23),
    ],
)
def test_every_bit_counts(value: float) -> None:
    """Terms of one sign and size: what one of the products lacks does not average out."""
    x = torch.full((128, 96), value)
    square = float(x[0, 0].double() ** 2) * 128
    torch.testing.assert_close(
        gram(x).triu().double(), torch.full((96, 96), square).double().triu(), rtol=3e-6, atol=0
    )


def test_integers_are_exact() -> None:
    x = torch.randint(-300, 300, (180, 110), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(gram(x).triu().double(), (x.double().T @ x.double()).triu())


@pytest.mark.parametrize("scale", [1e-18, 1e-14, 1e-12, 1e-6, 1e6, 1e15])
def test_scales(scale: float) -> None:
    x = random((150, 100), torch.float32) * scale
    check_gram(gram(x), x)


def test_columns_of_other_scales() -> None:
    x = random((150, 130), torch.float32)
    x[:, 5] *= 1e-20
    x[:, 40] *= 1e10
    x[:, 41] = 0
    x[:, 129] *= 1e-30
    acc = gram(x).double()
    expected = x.double().T @ x.double()
    sizes = expected.diag().sqrt()
    # Squares of the tiny columns are below float32.
    seen = torch.outer(sizes, sizes) > 1e-35
    error = ((acc - expected).abs() / torch.outer(sizes, sizes).clamp(min=1e-300)).triu()
    assert float(error[seen.triu()].max()) <= ROUNDING
    assert not acc[41].any()


def test_the_largest_numbers() -> None:
    x = random((140, 100), torch.float32) * 1e-30
    x[:, 3] = torch.finfo(torch.float32).max
    expected = x.double().T @ x.double()
    acc = gram(x).double()
    assert torch.isinf(acc[3, 3])
    others = torch.arange(100) != 3
    row = torch.cat([acc[:3, 3], acc[3, 4:]])
    assert float((row - expected[3, others]).norm()) <= ROUNDING * float(expected[3, others].norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("d", [100, 300])
def test_bad_numbers_stay_in_their_row_and_column(bad: float, d: int) -> None:
    x = random((400, d), torch.float32)
    x[177, 37] = bad
    acc = gram(x)
    touched = torch.zeros(d, d, dtype=torch.bool)
    touched[37], touched[:, 37] = True, True
    assert torch.equal(
        ~torch.isfinite(acc).triu() & torch.ones(d, d).triu().bool(),
        touched.triu() & ~torch.isfinite(acc),
    )
    assert not torch.isfinite(acc[37, 37:]).any()
    assert not torch.isfinite(acc[:38, 37]).any()
    assert torch.isfinite(acc.triu()[~touched]).all()


CORRECTIONS = {
    "least": (3, 1, 16, 64, 64),
    "edges": (5, 2, 33, 70, 101),
    "one slab": (4, 1, 128, 130, 96),
    "blocks of fewer panels": (3, 1, 200, 300, 270),
    "most positions": (2, 1, 512, 80, 128),
    "more positions than are taken": (2, 1, 600, 80, 128),
    "several blocks": (2, 2, 40, 520, 600),
}


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("n", "r", "t", "m", "d"), CORRECTIONS.values(), ids=CORRECTIONS.keys())
def test_eigen_correction(n: int, r: int, t: int, m: int, d: int, ones: bool) -> None:
    g, x = random((n, r, m, t), torch.float32, 1), random((n, d, t), torch.float32, 2)
    U, _ = torch.linalg.qr(random((m, m), torch.float32, 3))
    V, _ = torch.linalg.qr(random((d + ones, d + ones), torch.float32, 4))
    acc = torch.zeros(m, d + ones)
    ops.eigen_correction_(acc, g, x, U, V, 0.5, ones)
    expected = reference.eigen_correction(g.double(), x.double(), U.double(), V.double(), 0.5, ones)
    assert float((acc.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("scale", [1e-14, 1e12])
def test_eigen_correction_of_other_scales(scale: float) -> None:
    g, x = random((4, 1, 80, 40), torch.float32, 1) * scale, random((4, 90, 40), torch.float32, 2)
    U, V = torch.eye(80), torch.eye(90)
    acc = torch.zeros(80, 90)
    ops.eigen_correction_(acc, g, x, U, V)
    expected = torch.einsum("nrmt,ndt->nrmd", g.double(), x.double()).square().sum((0, 1))
    assert float((acc.double() - expected).norm()) <= ROUNDING * float(expected.norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigen_correction_hides_no_bad_number(bad: float) -> None:
    g, x = random((4, 1, 80, 40), torch.float32, 1), random((4, 90, 40), torch.float32, 2)
    g[2, 0, 7, 3] = bad
    acc = torch.zeros(80, 90)
    ops.eigen_correction_(acc, g, x, torch.eye(80), torch.eye(90))
    assert not torch.isfinite(acc).all()


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(64, 512, 64), (515, 130, 257), (90, 300, 1200), (1100, 70, 96)])
def test_matmul(shape: tuple[int, int, int], transposed: tuple[bool, bool]) -> None:
    rows, inner, columns = shape
    a, b = random((rows, inner), torch.float32, 1), random((inner, columns), torch.float32, 2)
    left = a.T.contiguous().T if transposed[0] else a
    right = b.T.contiguous().T if transposed[1] else b
    expected = a.double() @ b.double()
    bound = ROUNDING * torch.outer(a.double().norm(dim=1), b.double().norm(dim=0))
    found = torch.ops.hesskern_internal.matmul(left, right)
    assert bool(((found.double() - expected).abs() <= bound).all())


def test_matmul_of_bad_numbers() -> None:
    a, b = random((128, 128), torch.float32, 1), random((128, 128), torch.float32, 2)
    a[5, 6] = float("nan")
    found = torch.ops.hesskern_internal.matmul(a, b)
    assert torch.equal(torch.isnan(found).any(1), torch.arange(128) == 5)


@pytest.mark.parametrize("d", [100, 300])
def test_bfloat16_rows(d: int) -> None:
    """Whose numbers need no second part; and a slab of rows that do among those that do not."""
    x = random((700, d), torch.float32).bfloat16()
    acc = torch.zeros(d, d)
    ops.input_covariance_(acc, x)
    check_gram(acc, x.float())
    mixed = x.float()
    mixed[300, 40] += 2**-14
    check_gram(gram(mixed), mixed)
    one = torch.where(torch.arange(700)[:, None] < 256, 1 + 2**-9, 1.0).expand(700, d)
    check_gram(gram(one), one)
