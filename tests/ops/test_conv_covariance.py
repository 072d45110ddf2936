"""Every way the CPU computes a convolution's input covariance, against float64 patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hesskern import ops
from hesskern.ops import reference

PATHS = ("patches", "bands", "lags", "spectral")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

by_path = torch.ops.hesskern_internal.conv_input_covariance_by_


@dataclass(frozen=True)
class Geometry:
    """A convolution of x [shape]."""

    shape: Sequence[int]
    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    @property
    def window(self) -> tuple[Sequence[int], ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation

    @property
    def order(self) -> int:
        return self.shape[1] // self.groups * torch.Size(self.kernel_size).numel()


def covariance(geometry: Geometry, x: Tensor, path: str | None, alpha: float = 1.0) -> Tensor:
    """Upper triangles [g, d, d] by one path, or by the one that the operator picks."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    acc = torch.zeros(geometry.groups, geometry.order, geometry.order, dtype=dtype)
    if path is None:
        ops.conv_input_covariance_(acc, x, *geometry.window, geometry.groups, alpha)
    else:
        by_path(acc, x, *geometry.window, geometry.groups, alpha, path)
    return acc.triu()


def check(geometry: Geometry, x: Tensor, path: str | None, alpha: float = 1.0) -> None:
    result = covariance(geometry, x, path, alpha)
    expected = reference.conv_input_covariance(
        x.double(), *geometry.window, geometry.groups, alpha
    ).triu()
    error = (result.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[result.dtype], f"relative error {error:.1e}"


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any geometry: more padding than kernel, windows that skip pixels, lines of one pixel."""

    def pair(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(2))

    groups = draw(st.sampled_from((1, 1, 1, 2, 5)))
    channels = draw(st.sampled_from((1, 2, 3, 7, 17)))
    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 4), pair(1, 3)
    size = pair(1, 13)
    for s, k, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(s + 2 * p > d * (k - 1))
    shape = (draw(st.integers(1, 5)), groups * channels, *size)
    return Geometry(shape, kernel, stride, padding, dilation, groups)


@pytest.mark.parametrize("path", PATHS)
class TestPaths:
    @given(geometry=geometries(), double=st.booleans(), channels_last=st.booleans(),
           alpha=st.sampled_from((1.0, -0.5)), seed=st.integers(0, 999))  # fmt: skip
    def test_any_geometry(
        self, path: str, geometry: Geometry, double: bool, channels_last: bool, alpha: float,
        seed: int,
    ) -> None:  # fmt: skip
        x = normal(*geometry.shape, dtype=torch.float64 if double else torch.float32, seed=seed)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        check(geometry, x, path, alpha)

    @pytest.mark.parametrize(
        "geometry",
        [
            Geometry((5, 33, 11, 10), (3, 3), padding=(1, 1)),
            Geometry((4, 20, 9, 9), (5, 5), padding=(2, 2)),
            Geometry((3, 6, 14, 14), (7, 7), padding=(3, 3)),
            Geometry((3, 3, 30, 30), (7, 7), (2, 2), (3, 3)),
            Geometry((2, 18, 12, 12), (3, 3), (2, 2), (1, 1)),
            Geometry((4, 16, 7, 7), (3, 3)),
            Geometry((2, 8, 12, 12), (3, 3), dilation=(2, 2), padding=(2, 2)),
            Geometry((6, 48, 6, 6), (3, 3), padding=(1, 1), groups=48),
            Geometry((6, 64, 6, 6), (3, 3), padding=(1, 1), groups=4),
            Geometry((3, 40, 8, 8), (1, 1)),
            Geometry((3, 40, 9, 9), (1, 1), (2, 2)),
            Geometry((3, 5, 4, 50), (1, 5), padding=(0, 2)),
            Geometry((2, 4, 1, 300), (1, 9), padding=(0, 4)),
        ],
        ids=lambda g: "-".join(map(str, (*g.shape, *g.kernel_size, *g.stride, g.groups))),
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_layers(self, path: str, geometry: Geometry, dtype: torch.dtype) -> None:
        check(geometry, normal(*geometry.shape, dtype=dtype), path)

    def test_many_samples(self, path: str) -> None:
        """More samples than one chunk of any path, and not a multiple of it."""
        geometry = Geometry((45, 1, 60, 60), (3, 3), padding=(1, 1))
        check(geometry, normal(*geometry.shape, dtype=torch.float32), path)
        geometry = Geometry((1100, 2, 3, 3), (2, 2))
        check(geometry, normal(*geometry.shape, dtype=torch.float32), path)

    def test_long_rows(self, path: str) -> None:
        """Images larger than what a register tile runs over at once."""
        geometry = Geometry((1, 2, 90, 110), (3, 3), padding=(1, 1))
        check(geometry, normal(*geometry.shape, dtype=torch.float32), path)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_inputs(self, path: str, dtype: torch.dtype) -> None:
        geometry = Geometry((5, 17, 9, 9), (3, 3), padding=(1, 1))
        check(geometry, normal(*geometry.shape, dtype=dtype), path)

    def test_activations(self, path: str) -> None:
        """After a ReLU all products are non-negative: nothing cancels, and errors add up."""
        geometry = Geometry((300, 4, 24, 24), (5, 5), padding=(2, 2))
        check(geometry, normal(*geometry.shape, dtype=torch.float32).relu_().add_(0.3), path)

    def test_constant_image(self, path: str) -> None:
        """Equal terms: rounding errors of one sign."""
        geometry = Geometry((200, 3, 28, 28), (3, 3), padding=(1, 1))
        check(geometry, torch.full(geometry.shape, 0.1), path)

    def test_no_samples(self, path: str) -> None:
        geometry = Geometry((0, 4, 8, 8), (3, 3))
        assert not covariance(geometry, torch.zeros(geometry.shape), path).any()

    def test_one_sample(self, path: str) -> None:
        geometry = Geometry((1, 20, 8, 8), (3, 3), padding=(1, 1))
        check(geometry, normal(*geometry.shape, dtype=torch.float32), path)

    def test_windows_on_padding_alone(self, path: str) -> None:
        geometry = Geometry((2, 3, 1, 1), (1, 1), (5, 5), (2, 2))
        x = normal(*geometry.shape)
        assert not covariance(geometry, x, path).any()

    def test_sliced_images(self, path: str) -> None:
        geometry = Geometry((3, 18, 8, 7), (3, 3), padding=(1, 1))
        x = normal(5, 20, 10, 9)[1:4, 1:19, 2:, 1:8]
        check(geometry, x, path)
        check(geometry, x[:1].expand(3, -1, -1, -1), path)

    def test_adds_to_what_is_there(self, path: str) -> None:
        geometry = Geometry((3, 18, 8, 7), (3, 3), padding=(1, 1))
        x = normal(*geometry.shape)
        acc = normal(geometry.order, geometry.order)
        expected = acc.triu() + covariance(geometry, x, path, 2.0)[0]
        by_path(acc, x, *geometry.window, 1, 2.0, path)
        torch.testing.assert_close(acc.triu(), expected)

    def test_transposed_accumulator(self, path: str) -> None:
        geometry = Geometry((3, 4, 6, 6), (2, 2))
        x = normal(*geometry.shape)
        acc = torch.zeros(geometry.order, geometry.order, dtype=torch.float64)
        by_path(acc.t(), x, *geometry.window, 1, 1.0, path)
        torch.testing.assert_close(acc.t().triu(), covariance(geometry, x, path)[0])

    def test_threads(self, path: str) -> None:
        geometry = Geometry((9, 35, 10, 10), (3, 3), padding=(1, 1))
        x = normal(*geometry.shape)
        threads = torch.get_num_threads()
        expected = covariance(geometry, x, path)
        try:
            for count in (1, 3, 16):
                torch.set_num_threads(count)
                torch.testing.assert_close(covariance(geometry, x, path), expected)
                assert torch.equal(covariance(geometry, x, path), covariance(geometry, x, path))
        finally:
            torch.set_num_threads(threads)


class TestPointwise:
    """1 x 1 kernels with few channels per group."""

    @given(channels=st.integers(1, 16), groups=st.sampled_from((1, 1, 3)),
           samples=st.integers(1, 4), height=st.integers(1, 20), width=st.integers(1, 40),
           stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
           padding=st.tuples(st.integers(0, 4), st.integers(0, 4)), double=st.booleans(),
           alpha=st.sampled_from((1.0, -0.5)), seed=st.integers(0, 999))  # fmt: skip
    def test_any_geometry(
        self, channels: int, groups: int, samples: int, height: int, width: int,
        stride: tuple[int, int], padding: tuple[int, int], double: bool, alpha: float, seed: int,
    ) -> None:  # fmt: skip
        geometry = Geometry(
            (samples, groups * channels, height, width), (1, 1), stride, padding, groups=groups
        )
        dtype = torch.float64 if double else torch.float32
        x = normal(*geometry.shape, dtype=dtype, seed=seed)
        check(geometry, x, "pointwise", alpha)
        check(geometry, x, None, alpha)

    @pytest.mark.parametrize("shape", [(2, 1, 90, 110), (40, 5, 60, 60), (3, 16, 70, 70)])
    def test_long_runs_and_threads(self, shape: tuple[int, ...]) -> None:
        geometry = Geometry(shape, (1, 1))
        check(geometry, normal(*shape, dtype=torch.float32), "pointwise")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_inputs(self, dtype: torch.dtype) -> None:
        """More samples than are converted at a time."""
        geometry = Geometry((90, 3, 128, 130), (1, 1))
        check(geometry, normal(*geometry.shape, dtype=dtype), "pointwise")

    def test_sliced_images(self) -> None:
        geometry = Geometry((3, 6, 8, 7), (1, 1), (2, 1))
        x = normal(5, 9, 10, 9)[1:4, 1:7, 2:, 1:8]
        check(geometry, x, "pointwise")
        check(geometry, x[:1].expand(3, -1, -1, -1), "pointwise")

    def test_transposed_accumulator(self) -> None:
        geometry = Geometry((3, 4, 6, 6), (1, 1))
        x = normal(*geometry.shape)
        acc = torch.zeros(geometry.order, geometry.order, dtype=torch.float64)
        by_path(acc.t(), x, *geometry.window, 1, 1.0, "pointwise")
        torch.testing.assert_close(acc.t().triu(), covariance(geometry, x, "pointwise")[0])

    @pytest.mark.parametrize(
        ("shape", "kernel", "channels_last"),
        [((2, 17, 4, 4), 1, False), ((2, 3, 4, 4), 2, False), ((2, 3, 4, 4), 1, True)],
    )
    def test_refused(self, shape: tuple[int, ...], kernel: int, channels_last: bool) -> None:
        geometry = Geometry(shape, (kernel, kernel))
        x = normal(*shape)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="where it fits, pointwise"):
            covariance(geometry, x, "pointwise")


@given(geometry=geometries(), seed=st.integers(0, 999))
def test_choice(geometry: Geometry, seed: int) -> None:
    check(geometry, normal(*geometry.shape, seed=seed), None)


def test_unknown_path() -> None:
    with pytest.raises(
        ValueError, match=r"path must be patches, bands, lags, spectral or, .*, got fast"
    ):
        by_path(torch.zeros(4, 4), torch.zeros(1, 4, 2, 2), [1, 1], [1, 1], [0, 0], [1, 1], 1, 1.0,
                "fast")  # fmt: skip
