"""eigen_correction_ and conv_eigen_correction_ against loops over samples, autograd and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from hypothesis import given
from hypothesis import strategies as st
from strategies import accumulator_layouts, alphas, input_layouts, seeds
from tensors import BF16, F16, F32, F64, arrange, assert_near, random, relative_error
from torch import Tensor

from hesskern import ops
from hesskern.ops import reference

sizes = st.one_of(st.integers(0, 7), st.sampled_from((1, 37)))


def bases(m: int, d: int, groups: int | None = None, dtype: torch.dtype = F64) -> list[Tensor]:
    """Orthogonal U [m, m] and V [d, d], or [groups, ...]."""
    lead = () if groups is None else (groups,)
    return [
        torch.linalg.qr(random((*lead, k, k), seed=100 + i)).Q.to(dtype)
        for i, k in enumerate((m, d))
    ]


def by_loops(g: Tensor, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Sample by sample and row by row, in float64; one group, g [N, r, m, t], x [N, d, t]."""
    U, V = U.double(), V.double()
    total = torch.zeros(len(U), len(V), dtype=F64)
    for rows, inputs in zip(g.double(), x.double(), strict=True):
        for row in rows:
            total += (U.T @ (row @ inputs.T) @ V) ** 2
    return total


def correction(g: Tensor, x: Tensor, U: Tensor, V: Tensor, alpha: float = 1.0) -> Tensor:
    groups = len(U) if U.dim() == 3 else 1
    acc = torch.zeros(groups * U.shape[-1], V.shape[-1], dtype=U.dtype)
    return ops.eigen_correction_(acc, g, x, U, V, alpha)


@given(n=sizes, r=st.integers(0, 3), m=sizes, d=sizes, t=st.sampled_from((None, None, 0, 1, 2, 9)),
       groups=st.sampled_from((None, None, 1, 3)), ones=st.booleans(),
       dtypes=st.sampled_from(((F32, F32), (F64, F64), (F32, BF16), (F64, F32), (F32, F16))),
       layouts=st.tuples(*[input_layouts] * 4), into=accumulator_layouts, alpha=alphas,
       seed=seeds)  # fmt: skip
def test_reference(
    n: int, r: int, m: int, d: int, t: int | None, groups: int | None, ones: bool,
    dtypes: tuple[torch.dtype, torch.dtype], layouts: tuple[str, ...], into: str, alpha: float,
    seed: int,
) -> None:  # fmt: skip
    count, positions, dtype = groups or 1, () if t is None else (t,), dtypes[0]
    g = arrange(random((n, r, count * m, *positions), dtypes[1], seed), layouts[0])
    x = arrange(random((n, count * d, *positions), dtypes[1], seed + 1), layouts[1])
    lead = () if groups is None else (groups,)
    U, V = (
        arrange(random((*lead, k, k), dtype, seed + 2 + i), layouts[2 + i])
        for i, k in enumerate((m, d + ones))
    )
    before = random((count * m, d + ones), dtype, seed + 4)
    acc = arrange(before.clone(), into)
    assert ops.eigen_correction_(acc, g, x, U, V, alpha, ones) is acc
    update = reference.eigen_correction(g.double(), x.double(), U.double(), V.double(), alpha, ones)
    assert_near(acc, before.double() + update, scale=float(before.norm() + update.norm()))
    if acc._base is not None and into in ("window", "strided"):
        assert int(acc._base.isnan().sum()) == acc._base.numel() - acc.numel()


# Samples, root rows, outputs, inputs, positions: each order of rotations and sum, in one or several
# parts. None: a layer without positions.
ORDERS = {
    "both first": (5, 1, 40, 70, 9),
    "both first, few outputs": (7, 3, 5, 130, 12),
    "both first, few inputs": (7, 2, 130, 33, 20),
    "both first, several parts": (60, 2, 150, 100, 90),
    "outputs first": (9, 2, 6, 50, 20),
    "inputs first": (9, 9, 40, 6, 20),
    "sum first": (9, 2, 5, 7, 40),
    "sum first, several parts": (700, 2, 20, 30, 64),
    "one position": (300, 1, 40, 30, 1),
    "no positions": (1300, 3, 12, 20, None),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ORDERS)
class TestOrders:
    def rows(self, name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        n, r, m, d, t = ORDERS[name]
        positions = () if t is None else (t,)
        g, x = random((n, r, m, *positions), dtype), random((n, d, *positions), dtype, seed=1)
        return g, x, *bases(m, d, dtype=dtype)

    def test_loops(self, name: str, dtype: torch.dtype) -> None:
        g, x, U, V = self.rows(name, dtype)
        columns = (g, x) if x.dim() == 3 else (g.unsqueeze(3), x.unsqueeze(2))
        assert_near(correction(g, x, U, V, 0.5), 0.5 * by_loops(*columns, U, V))

    def test_positions_last_views(self, name: str, dtype: torch.dtype) -> None:
        g, x, U, V = self.rows(name, dtype)
        if x.dim() == 3:
            g, x = (a.mT.contiguous().mT for a in (g, x))
        expected = reference.eigen_correction(g.double(), x.double(), U.double(), V.double())
        assert_near(correction(g, x, U, V), expected)

    def test_ones_are_one_more_input(self, name: str, dtype: torch.dtype) -> None:
        g, x, U, _ = self.rows(name, dtype)
        d = x.shape[1] + 1
        V = bases(1, d, dtype=dtype)[1]
        acc = torch.zeros(len(U), d, dtype=dtype)
        ops.eigen_correction_(acc, g, x, U, V, ones=True)
        appended = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        expected = reference.eigen_correction(g.double(), appended.double(), U.double(), V.double())
        assert_near(acc, expected)

    def test_same_bits_again(self, name: str, dtype: torch.dtype) -> None:
        arguments = self.rows(name, dtype)
        assert torch.equal(correction(*arguments), correction(*arguments))

    def test_sum_is_the_trace(self, name: str, dtype: torch.dtype) -> None:
        g, x, U, V = self.rows(name, dtype)
        columns = (g, x) if x.dim() == 3 else (g.unsqueeze(3), x.unsqueeze(2))
        rows = torch.einsum("nrmt,ndt->nrmd", *(a.double() for a in columns))
        total = float(correction(g, x, U, V).double().sum())
        assert total == pytest.approx(float(rows.square().sum()), rel=1e-6)

    def test_groups_are_layers_of_their_own(self, name: str, dtype: torch.dtype) -> None:
        g, x, _, _ = self.rows(name, dtype)
        m, d = g.shape[2], x.shape[1]
        if m % 5 or d % 5:
            g, x = g.repeat_interleave(5, 2), x.repeat_interleave(5, 1)
            m, d = 5 * m, 5 * d
        U, V = bases(m // 5, d // 5, groups=5, dtype=dtype)
        each = [
            correction(*parts) for parts in zip(g.chunk(5, 2), x.chunk(5, 1), U, V, strict=True)
        ]
        assert_near(correction(g, x, U, V), torch.cat(each).double())


@pytest.mark.parametrize("t", [None, 1, 3, 40])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_long_sums_of_one_sign(t: int | None, dtype: torch.dtype) -> None:
    """Float32 sums of many equal terms drift, unless they are short ones that are added."""
    n, r, m, d = 20_000 if t is None else 60_000 // t, 2, 7, 9
    positions = () if t is None else (t,)
    g = random((n, r, m, *positions), F32).abs().to(dtype)
    x = random((n, d, *positions), F32, seed=1).abs().to(dtype)
    U, V = bases(m, d, dtype=F32)
    acc = correction(g, x, U, V, 1 / n)
    expected = correction(g.double(), x.double(), U.double(), V.double(), 1 / n)
    assert relative_error(acc, expected) <= 1e-6


@pytest.mark.parametrize("t", [None, 2])
def test_equal_samples(t: int | None) -> None:
    """Rounding errors of equal terms have one sign for long."""
    positions = () if t is None else (t,)
    g = random((1, 1, 5, *positions), F32).expand(30_000, -1, *[-1] * (1 + len(positions)))
    x = random((1, 6, *positions), F32, seed=1).expand(30_000, *[-1] * (1 + len(positions)))
    U, V = bases(5, 6, dtype=F32)
    expected = 30_000 * correction(g[:1].double(), x[:1].double(), U.double(), V.double())
    assert relative_error(correction(g, x, U, V), expected) <= 2e-6


@pytest.mark.parametrize("layer", ["linear", "positions", "sums first", "convolution"])
def test_memory(layer: str) -> None:
    """Beside the arguments few samples are held, whatever their number: 16 MB and a little."""
    if layer == "convolution":
        g, x = torch.ones(600, 1, 8, 32, 32), torch.ones(600, 6, 32, 32)
        U, V = bases(8, 54, dtype=F32)
        window = ([3, 3], [1, 1], [1, 1], [1, 1])
        acc = torch.zeros(8, 54)
        assert peak_bytes(lambda: ops.conv_eigen_correction_(acc, g, x, U, V, *window)) < 40 << 20
        return
    n, r, m, d, t = {
        "linear": (60_000, 1, 100, 120, None),
        "positions": (200, 1, 200, 160, 150),
        "sums first": (300, 1, 40, 50, 600),
    }[layer]
    positions = () if t is None else (t,)
    g, x = torch.ones(n, r, m, *positions), torch.ones(n, d, *positions)
    U, V = bases(m, d, dtype=F32)
    assert peak_bytes(lambda: correction(g, x, U, V)) < 40 << 20


def test_layers_of_a_transformer() -> None:
    g, x = random((4, 1, 96, 256), F32).mT, random((4, 96, 100), F32, seed=1).mT
    U, V = bases(256, 100, dtype=F32)
    expected = reference.eigen_correction(g.double(), x.double(), U.double(), V.double())
    assert relative_error(correction(g, x, U, V), expected) <= 1e-6


def test_padding_adds_nothing() -> None:
    g, x = random((6, 2, 5, 9)), random((6, 8, 9), seed=1)
    U, V = bases(5, 8)
    g[..., 6:] = 0
    assert_near(correction(g, x, U, V), correction(g[..., :6], x[..., :6], U, V))


def test_not_a_number_stays_in_its_sample() -> None:
    g, x = random((3, 1, 5, 9)), random((3, 8, 9), seed=1)
    U, V = bases(5, 8)
    x[1, 2, 3] = float("nan")
    assert correction(g, x, U, V).isnan().all()
    keep = torch.tensor([0, 2])
    assert correction(g[keep], x[keep], U, V).isfinite().all()


# x, outputs, kernel size, stride, padding, dilation, groups.
WINDOWS = {
    "plain": ((3, 2, 6, 7), 4, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "few outputs": ((5, 3, 28, 28), 6, [5, 5], [1, 1], [2, 2], [1, 1], 1),
    "many channels": ((9, 40, 4, 4), 35, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "stride": ((3, 4, 9, 8), 8, [3, 2], [2, 3], [1, 0], [1, 1], 1),
    "stride beyond the kernel": ((2, 3, 9, 10), 5, [2, 1], [3, 4], [0, 2], [1, 1], 1),
    "dilation": ((2, 3, 11, 9), 5, [3, 3], [1, 2], [2, 1], [2, 3], 1),
    "pointwise": ((4, 6, 5, 5), 7, [1, 1], [1, 1], [0, 0], [1, 1], 1),
    "pointwise stride": ((4, 6, 5, 5), 7, [1, 1], [2, 2], [0, 0], [1, 1], 1),
    "groups": ((3, 6, 8, 8), 9, [3, 3], [1, 1], [1, 1], [1, 1], 3),
    "depthwise": ((3, 5, 8, 8), 10, [3, 3], [2, 2], [1, 1], [1, 1], 5),
    "line": ((4, 3, 20), 5, [4], [2], [3], [2], 1),
    "line groups": ((4, 4, 20), 6, [3], [1], [1], [1], 2),
    "one position": ((6, 3, 4, 4), 5, [4, 4], [1, 1], [0, 0], [1, 1], 1),
    "parts": ((300, 4, 16, 16), 9, [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "more padding than kernel": ((2, 2, 3, 4), 3, [2, 2], [1, 1], [3, 2], [1, 1], 1),
}


@pytest.mark.parametrize("name", WINDOWS)
class TestConvolutions:
    def rows(self, name: str, r: int = 2) -> tuple[Tensor, ...]:
        shape, m, kernel, stride, padding, dilation, groups = WINDOWS[name]
        conv = F.conv2d if len(shape) == 4 else F.conv1d
        x = random(shape)
        weight = random((m, shape[1] // groups, *kernel), seed=1)
        out = conv(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        g = random((len(x), r, *out.shape[1:]), seed=2)
        lead = groups if groups > 1 else None
        return g, x, *bases(m // groups, weight[0].numel(), lead)

    def call(self, name: str, arguments: tuple[Tensor, ...], ones: bool = False) -> Tensor:
        _, m, *window = WINDOWS[name]
        acc = torch.zeros(m, arguments[3].shape[-1], dtype=arguments[2].dtype)
        ops.conv_eigen_correction_(acc, *arguments, *window, 0.5, ones)
        return acc

    def test_autograd(self, name: str) -> None:
        """The gradients of samples in the weight, by autograd, one after another."""
        shape, m, kernel, stride, padding, dilation, groups = WINDOWS[name]
        conv = F.conv2d if len(shape) == 4 else F.conv1d
        g, x, U, V = arguments = self.rows(name)
        total = torch.zeros(m, V.shape[-1], dtype=F64)
        for image, rows in zip(x.split(1), g, strict=True):
            weight = torch.zeros(m, shape[1] // groups, *kernel, dtype=F64, requires_grad=True)
            out = conv(image, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
            for row in rows:
                (grad,) = torch.autograd.grad(out, weight, row.unsqueeze(0), retain_graph=True)
                turned = U.mT @ grad.reshape(groups, m // groups, -1) @ V
                total += 0.5 * turned.square().reshape(m, -1)
        assert_near(self.call(name, arguments), total)

    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("ones", [False, True])
    def test_patches(self, name: str, dtype: torch.dtype, ones: bool) -> None:
        _, _, *window, groups = WINDOWS[name]
        g, x, U, V = self.rows(name, 1)
        if ones:
            V = bases(1, V.shape[-1] + 1, groups if groups > 1 else None)[1]
        g, x, U, V = g.to(dtype), x.to(dtype), U.float(), V.float()
        patches = reference.unfold(x.double(), *window)
        expected = torch.zeros(g.shape[2], V.shape[-1], dtype=F64)
        ops.eigen_correction_(
            expected, g.double().flatten(3), patches, U.double(), V.double(), 0.5, ones
        )
        assert relative_error(self.call(name, (g, x, U, V), ones), expected) <= 1e-6

    def test_channels_last(self, name: str) -> None:
        g, x, U, V = arguments = self.rows(name)
        turned = arrange(g.flatten(0, 1), "channels_last").unflatten(0, g.shape[:2])
        last = (turned, arrange(x, "channels_last"), U, V)
        assert_near(self.call(name, last), self.call(name, arguments))

    def test_no_samples(self, name: str) -> None:
        g, x, U, V = self.rows(name)
        assert not self.call(name, (g[:0], x[:0], U, V)).any()
        assert not self.call(name, (g[:, :0], x, U, V)).any()
