"""Operators on a GPU at sizes that reach the kernels for large problems, against float64 there.

All tests need a GPU and a build with CUDA: ``pytest -m cuda``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import needs_cuda
from tensors import BF16, F16, F32, F64
from torch import Tensor, nn

import hesskern as hk
from hesskern import ops
from hesskern.ops import reference

pytestmark = needs_cuda

# float32 is multiplied as two float16: as good as float32 itself. Long sums of numbers of one
# sign err all to the same side.
TOLERANCE, ONE_SIGN = 1e-6, 2e-6


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def added(
    op: Callable[..., Tensor], order: tuple[int, ...], *inputs: Tensor, **more: object
) -> Tensor:
    """What the operator adds to ones, on the upper triangle; the lower one stays as it was."""
    acc = torch.ones(order, device="cuda")
    assert op(acc, *inputs) is acc
    assert bool((acc.tril(-1) == torch.ones_like(acc).tril(-1)).all())
    return (acc - 1).triu()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= tolerance, error


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("columns", [33, 64, 130, 200, 256, 264, 300, 784, 1030])
def test_covariance(columns: int, dtype: torch.dtype) -> None:
    x = normal(20_001, columns, dtype=dtype)
    expected = reference.input_covariance(*wide(x)).triu()
    found = added(ops.input_covariance_, (columns, columns), x)
    # The accumulator's ones are rounded away.
    assert_close(found, expected)
    again = added(ops.input_covariance_, (columns, columns), x)
    assert torch.equal(found, again)


@pytest.mark.parametrize("columns", [60, 200, 500])
@pytest.mark.parametrize("layout", ["ones", "transposed", "every second", "unaligned"])
def test_covariance_of_other_rows(columns: int, layout: str) -> None:
    whole = normal(2 * 9_000, columns + 3)
    x = {
        "ones": whole[:9_000, :columns],
        "transposed": normal(columns, 9_000).T,
        "every second": whole[::2, :columns],
        "unaligned": whole[:9_000, 3:],
    }[layout]
    ones = layout == "ones"
    order = columns + ones
    expected = reference.input_covariance(x.double(), 0.5, ones).triu()
    acc = torch.zeros(order, order, device="cuda")
    ops.input_covariance_(acc, x, 0.5, ones)
    assert_close(acc.triu(), expected)


@pytest.mark.parametrize("columns", [24, 200, 300])
def test_long_sums_of_one_sign(columns: int) -> None:
    x = (normal(1_000_000, columns) + 0.5).relu_()
    acc = torch.zeros(columns, columns, device="cuda")
    ops.input_covariance_(acc, x)
    expected = torch.zeros(columns, columns, device="cuda", dtype=F64)
    for part in x.split(100_000):
        expected += part.double().T @ part.double()
    assert_close(acc.triu(), expected.triu(), ONE_SIGN)


def test_columns_of_many_sizes() -> None:
    x = normal(20_000, 300) * torch.logspace(-9, 9, 300, device="cuda")
    # Rows that a look at some of them misses.
    x[7] *= 1e4
    acc = torch.zeros(300, 300, device="cuda")
    ops.input_covariance_(acc, x)
    size = x.double().norm(dim=0)
    error = (acc.triu().double() - (x.double().T @ x.double()).triu()) / (size[:, None] * size)
    assert float(error.abs().max()) < 5e-6


@pytest.mark.parametrize("columns", [6, 64, 200, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_on_the_diagonal(columns: int, bad: float) -> None:
    x = normal(20_000, columns)
    x[13_001, columns // 2] = bad
    acc = torch.zeros(columns, columns, device="cuda")
    ops.input_covariance_(acc, x)
    assert not bool(acc.diagonal()[columns // 2].isfinite())


@pytest.mark.parametrize(
    ("shape", "kernel", "padding", "groups"),
    [
        ((32, 64, 16, 16), 3, 1, 1),
        ((16, 40, 20, 17), 3, 0, 1),
        ((16, 128, 14, 14), 3, 1, 2),
        ((600, 64, 16, 16), 3, 1, 1),
        ((16, 3, 64, 64), 7, 3, 1),
        ((9, 3, 50, 47), 5, 2, 1),
        ((64, 1, 28, 28), 5, 2, 1),
        ((200, 2, 30, 21), 3, 2, 1),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(
    shape: tuple[int, ...],
    kernel: int,
    padding: int,
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    x = normal(*shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    window = ([kernel] * 2, [1, 1], [padding] * 2, [1, 1], groups)
    order = shape[1] // groups * kernel**2
    acc = torch.zeros((groups, order, order) if groups > 1 else (order, order), device="cuda")
    ops.conv_input_covariance_(acc, x, *window)
    expected = sum(reference.conv_input_covariance(part.double(), *window) for part in x.split(16))
    assert_close(acc.triu(), expected.triu())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        (9_000, 10, 64),
        (9_001, 10, 61),
        (4_000, 3, 128),
        (3_000, 10, 200),
        (801, 17, 250),
        (2_000, 10, 300),
        (100, 100, 512),
        (300, 10, 64, 9),
    ],
)
def test_output_hessians(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = normal(*shape, dtype=dtype)
    p = torch.softmax(normal(*shape[:2]), 1)
    expected = reference.output_hessian(*wide(g, p)).triu()
    assert_close(added(ops.output_hessian_, (shape[2],) * 2, g, p), expected)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        (512, 1, 6, 784),
        (512, 2, 16, 100),
        (64, 1, 64, 1024),
        (65, 1, 40, 33),
        (64, 1, 128, 256),
        (32, 3, 200, 64),
        (32, 1, 300, 100),
        (9_000, 2, 200),
    ],
)
def test_root_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = normal(*shape, dtype=dtype)
    expected = reference.output_hessian(*wide(g)).triu()
    assert_close(added(ops.output_hessian_, (shape[2],) * 2, g), expected)


def layer_hessian(x: Tensor, s: Tensor, V: Tensor) -> Tensor:
    """The product for x [N, d], s [N, c, m] and V [m, d] or [k, m, d], a step at a time."""
    y = torch.einsum("nd,...md->...nm", x, V)
    a = torch.einsum("ncm,...nm->...nc", s, y)
    return torch.einsum("...nm,nd->...md", torch.einsum("...nc,ncm->...nm", a, s), x)


@pytest.mark.parametrize("vectors", [1, 4, 7])
@pytest.mark.parametrize(
    ("samples", "classes", "outputs", "inputs"),
    [(20_000, 9, 200, 784), (9_000, 9, 84, 120), (3_000, 99, 512, 100), (6_000, 9, 10, 200)],
)
def test_layer_hessian(samples: int, classes: int, outputs: int, inputs: int, vectors: int) -> None:
    x, s = normal(samples, inputs), normal(samples, classes, outputs)
    V = normal(vectors, outputs, inputs) if vectors > 1 else normal(outputs, inputs)
    # Inputs of many sizes, as pixels or features are.
    x *= torch.logspace(-3, 3, inputs, device="cuda")
    expected = layer_hessian(*wide(x, s, V)) / samples
    assert_close(ops.layer_hessian_matmul(x, s, V, 1 / samples), expected)


# Compute capability 9.0 alone multiplies by parts.
needs_parts = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs compute capability 9.0",
)


@needs_parts
@pytest.mark.parametrize(
    ("shape", "classes", "outputs", "vectors"),
    [
        ((20_000, 784), 9, 200, 1),
        ((40_001, 121), 9, 84, 4),
        ((4_000, 100), 99, 512, 7),
        # Several chunks.
        ((150_001, 70), 3, 130, 1),
        ((1_200, 150, 49), 5, 96, 2),
        ((3_000, 64, 50), 3, 128, 1),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "swapped", "every second"])
def test_inputs_packed_before(
    shape: tuple[int, ...], classes: int, outputs: int, vectors: int, layout: str
) -> None:
    n, d, *positions = shape
    x, s = normal(*shape), normal(n, classes, outputs, *positions)
    if layout == "swapped":
        x = x.mT.contiguous().mT
    elif layout == "every second":
        x = torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2]
    V = normal(vectors, outputs, d)
    packed = ops.pack_layer_inputs(x, vectors * outputs)
    assert packed.numel() >= x.numel()
    assert torch.equal(packed, ops.pack_layer_inputs(x, vectors * outputs))
    expected = ops.layer_hessian_matmul(x, s, V, 1 / n)
    # x itself is not read once more.
    other = torch.empty_like(x).fill_(float("nan"))
    for _ in range(2):
        assert torch.equal(ops.layer_hessian_matmul(other, s, V, 1 / n, packed), expected)
    # A product that does not use it may be passed it as well.
    narrow = ops.layer_hessian_matmul(x, s[:, :, :8], V[:, :8], 1 / n)
    assert torch.equal(ops.layer_hessian_matmul(x, s[:, :, :8], V[:, :8], 1 / n, packed), narrow)


@needs_parts
def test_packed_inputs_of_another_tensor() -> None:
    x, s, V = normal(20_000, 784), normal(20_000, 9, 200), normal(200, 784)
    packed = ops.pack_layer_inputs(x, 200)
    for wrong in (packed[:-4], packed[::2], packed.view(-1, 4), packed.long(), packed.cpu()):
        with pytest.raises(ValueError, match="packed"):
            ops.layer_hessian_matmul(x, s, V, 1.0, wrong)
    moved = torch.cat([packed.new_zeros(1), packed])[1:]
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        ops.layer_hessian_matmul(x, s, V, 1.0, moved)
    with pytest.raises(ValueError, match=r"packed must be what .* for x \[19999, 784\]"):
        ops.layer_hessian_matmul(x[1:], s[1:], V, 1.0, packed)


@needs_parts
def test_what_is_not_packed() -> None:
    assert ops.pack_layer_inputs(normal(20_000, 784), 8).shape == (0,)
    assert ops.pack_layer_inputs(normal(20_000, 784).double(), 200).shape == (0,)
    assert ops.pack_layer_inputs(normal(100, 784), 200).shape == (0,)
    assert ops.pack_layer_inputs(normal(0, 784), 200).shape == (0,)


@needs_parts
def test_a_layers_hessian_keeps_its_inputs_packed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)).cuda()
    data = [(normal(1_000, 784) + i, torch.arange(1_000, device="cuda") % 10) for i in range(12)]
    H = hk.layer_hessians(model, data, nn.CrossEntropyLoss(), ["0"])["0"]
    v = normal(200 * 784)
    expected = H @ v
    before = torch.cuda.memory_allocated()
    assert torch.equal(H @ v, expected)
    kept = torch.cuda.memory_allocated() - before
    assert kept >= 4 * 12_000 * 784
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        other = H @ v
    stream.synchronize()
    assert torch.equal(other, expected)


@pytest.mark.parametrize("shape", [(512, 1024), (300, 700), (2048, 512)])
def test_kronecker_products(shape: tuple[int, int]) -> None:
    m, d = shape
    A, B, X = normal(m, m), normal(d, d), normal(m, d)
    assert_close(ops.kron_matmul(A, B, X), reference.kron_matmul(*wide(A, B, X)))
    S = normal(m, d)
    found = ops.kron_eigen_matmul(A, S, B, X)
    assert_close(found, reference.kron_eigen_matmul(*wide(A, S, B, X)), 2 * TOLERANCE)


# Layers of one call: some fill the device alone, some together, some are left to small tiles.
MIXED = [
    (512, 2048),
    (256, 1024),
    (64, 576),
    (1000, 300),
    (33, 257),
    (10, 512),
    (0, 4),
    (2048, 512),
]


def layers(shapes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Factors A [m, m] and B [d, d], every second one in columns, and X [m, d] or [3, m, d]."""
    A = [normal(m, m).T if i % 2 else normal(m, m) for i, (m, _) in enumerate(shapes)]
    B = [normal(d, d).T if i % 3 else normal(d, d) for i, (_, d) in enumerate(shapes)]
    X = [normal(3, *shape) if i % 4 == 1 else normal(*shape) for i, shape in enumerate(shapes)]
    return A, B, X


@pytest.mark.parametrize("shapes", [MIXED, [(128, 1152)] * 70], ids=["mixed", "many"])
def test_kronecker_products_of_many_layers(shapes: list[tuple[int, int]]) -> None:
    A, B, X = layers(shapes)
    S = [normal(*shape) for shape in shapes]
    products = ops.grouped_kron_matmul(A, B, X)
    rotated = ops.grouped_kron_eigen_matmul(A, S, B, X)
    for i, shape in enumerate(shapes):
        assert products[i].shape == rotated[i].shape == X[i].shape
        if 0 in shape:
            continue
        assert_close(products[i], reference.kron_matmul(*wide(A[i], B[i], X[i])))
        expected = reference.kron_eigen_matmul(*wide(A[i], S[i], B[i], X[i]))
        assert_close(rotated[i], expected, 2 * TOLERANCE)
    again = ops.grouped_kron_matmul(A, B, X) + ops.grouped_kron_eigen_matmul(A, S, B, X)
    assert all(map(torch.equal, again, products + rotated))


def test_kronecker_products_of_factors_of_many_sizes() -> None:
    shapes = [(512, 1024), (300, 700)]
    A, B, X = layers(shapes)
    down = [torch.logspace(-9, 9, m, device="cuda")[:, None] for m, _ in shapes]
    across = [torch.logspace(6, -6, d, device="cuda") for _, d in shapes]
    scaled_A = [a * size for a, size in zip(A, down, strict=True)]
    scaled_B = [b * size[:, None] for b, size in zip(B, across, strict=True)]
    found = ops.grouped_kron_matmul(scaled_A, scaled_B, X)
    for i in range(len(shapes)):
        expected = reference.kron_matmul(*wide(scaled_A[i], scaled_B[i], X[i]))
        sizes = down[i].double() * across[i].double()
        assert_close(found[i].double() / sizes, expected / sizes)


def test_what_is_not_finite_stays_in_its_layer_and_row() -> None:
    A, B, X = layers([(512, 1024), (300, 1000), (256, 64)])
    A[0][3, 5] = float("nan")
    A[2][7, 9] = float("inf")
    found = ops.grouped_kron_matmul(A, B, X)
    assert bool(found[1].isfinite().all())
    for out, row in ((found[0], 3), (found[2], 7)):
        finite = out.isfinite()
        assert not bool(finite[row].any())
        assert bool(finite[torch.arange(len(out)) != row].all())
