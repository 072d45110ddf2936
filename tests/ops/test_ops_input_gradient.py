"""Gradient rows through convolutions and max pooling, zeros left out, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import hesskern  # noqa: F401  (registers the operators)

_ops = torch.ops.hesskern_internal
Pair = tuple[int, int]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse_rows(n: int, size: Pair, r: int, m: int, density: float, seed: int) -> Tensor:
    """[n, H, W, r, m], zero at the same places in every row."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, *size, 1, m, generator=generator) < density
    return randn(n, *size, r, m, seed=seed + 1) * kept


def conv_reference(
    grad: Tensor, weight: Tensor, size: Pair, window: tuple[Pair, Pair, Pair], groups: int
) -> Tensor:
    n, ho, wo, r, m = grad.shape
    rows = grad.permute(0, 3, 4, 1, 2).reshape(n * r, m, ho, wo)
    shape = (n * r, weight.shape[1] * groups, *size)
    result = torch.nn.grad.conv2d_input(shape, weight, rows, *window, groups)
    return result.unflatten(0, (n, r)).permute(0, 3, 4, 1, 2)


def output_size(size: Pair, kernel: Pair, window: tuple[Pair, Pair, Pair]) -> Pair:
    stride, padding, dilation = window
    found = [
        (s + 2 * p - d * (k - 1) - 1) // st_ + 1
        for s, k, st_, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    return found[0], found[1]


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    n=st.integers(0, 3),
    size=st.tuples(st.integers(5, 12), st.integers(5, 9)),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 21),
    outputs=st.integers(1, 9),
    r=st.integers(1, 31),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution(
    n: int,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    inputs: int,
    outputs: int,
    r: int,
    density: float,
    scaled: bool,
    seed: int,
) -> None:
    window = stride, padding, dilation
    assume(min(output_size(size, kernel, window)) >= 1)
    weight = randn(groups * outputs, inputs, *kernel, seed=seed)
    positions = output_size(size, kernel, window)
    grad = sparse_rows(n, positions, r, groups * outputs, density, seed)
    factor = randn(n, *size, groups * inputs, seed=seed + 2) if scaled else None
    expected = conv_reference(grad, weight, size, window, groups) if n else None
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        out = torch.full((n, *size, r, groups * inputs), torch.nan, dtype=dtype)
        scale = None if factor is None else factor.to(dtype)
        _ops.conv_input_gradient_(out, grad.to(dtype), weight.to(dtype), *window, groups, scale)
        if expected is not None:
            wanted = expected if factor is None else expected * factor.unsqueeze(3)
            assert float((out - wanted).norm()) <= limit * float(wanted.norm())


@pytest.mark.parametrize("channels", [15, 16, 17, 31, 32, 33, 47, 64, 65])
@pytest.mark.parametrize("r", [1, 6, 7, 13, 14, 15, 28, 29])
def test_convolution_at_the_edges_of_blocks(channels: int, r: int) -> None:
    weight = randn(5, channels, 3, 3)
    grad = sparse_rows(2, (6, 6), r, 5, 0.5, 3)
    window = (1, 1), (1, 1), (1, 1)
    out = torch.empty(2, 6, 6, r, channels, dtype=torch.float64)
    _ops.conv_input_gradient_(out, grad, weight, *window, 1)
    expected = conv_reference(grad, weight, (6, 6), window, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_large_images_in_strips() -> None:
    weight = randn(24, 8, 5, 5)
    grad = sparse_rows(1, (150, 160), 9, 24, 0.2, 3).float()
    window = (1, 1), (2, 2), (1, 1)
    out = torch.empty(1, 150, 160, 9, 8)
    _ops.conv_input_gradient_(out, grad, weight.float(), *window, 1)
    expected = conv_reference(grad.double(), weight, (150, 160), window, 1)
    assert float((out - expected).norm()) <= 1e-6 * float(expected.norm())


def test_nan_is_not_left_out() -> None:
    grad = torch.zeros(1, 3, 3, 2, 4, dtype=torch.float64)
    grad[0, 1, 1, 0, 2] = torch.nan
    out = torch.empty(1, 3, 3, 2, 5, dtype=torch.float64)
    _ops.conv_input_gradient_(out, grad, randn(4, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert bool(out[0, 1, 1, 0].isnan().all())


@given(
    n=st.integers(0, 3),
    size=st.tuples(st.integers(4, 11), st.integers(4, 9)),
    kernel=pairs,
    stride=pairs,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ceil_mode=st.booleans(),
    padded=st.booleans(),
    channels=st.integers(1, 20),
    r=st.integers(1, 12),
    scaled=st.booleans(),
    cut=st.booleans(),
    channels_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_max_pooling(
    n: int,
    size: Pair,
    kernel: Pair,
    stride: Pair,
    dilation: Pair,
    ceil_mode: bool,
    padded: bool,
    channels: int,
    r: int,
    scaled: bool,
    cut: bool,
    channels_first: bool,
    seed: int,
) -> None:
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    assume(min(output_size(size, kernel, (stride, padding, dilation))) >= 1)
    x = randn(max(n, 1), channels, *size, seed=seed)[:n]
    # Windows without a positive value have the maximum 0, where ReLU has no gradient.
    x = x.relu() if cut else x
    geometry: tuple[Any, ...] = (kernel, stride, padding, dilation, ceil_mode)
    if n:
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
        positions = tuple(pooled.shape[2:])
    else:
        positions = output_size(size, kernel, (stride, padding, dilation))
        indices = torch.empty(0, channels, *positions, dtype=torch.int64)
    grad = randn(n, *positions, r, channels, seed=seed + 1)
    factor = randn(n, *size, channels, seed=seed + 2) if scaled else None
    order = (0, 3, 4, 1, 2)
    if channels_first:
        out = torch.full((n, r, channels, *size), torch.nan, dtype=torch.float64).permute(order)
        grad = grad.permute(0, 3, 4, 1, 2).contiguous().permute(order)
    else:
        out = torch.full((n, *size, r, channels), torch.nan, dtype=torch.float64)
    where = indices.permute(0, 2, 3, 1)
    relu = x.permute(0, 2, 3, 1) if cut else None
    _ops.max_pool_input_gradient_(out, grad, where, kernel, stride, padding, dilation, factor, relu)
    for row in range(r if n else 0):
        expected = torch.ops.aten.max_pool2d_with_indices_backward(
            grad[:, :, :, row].permute(0, 3, 1, 2).contiguous(), x, *geometry, indices
        ).permute(0, 2, 3, 1)
        expected = expected if factor is None else expected * factor
        expected = expected if relu is None else expected * (relu > 0)
        torch.testing.assert_close(out[:, :, :, row], expected, rtol=1e-13, atol=1e-13)


def conv_arguments(**changed: Any) -> list[Any]:
    arguments = {
        "out": torch.empty(2, 6, 6, 3, 4),
        "grad": torch.zeros(2, 4, 4, 3, 5),
        "weight": torch.zeros(5, 4, 3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
        "factor": None,
    }
    return list({**arguments, **changed}.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": torch.zeros(2, 4, 4, 5)}, r"grad must be \[N, Ho, Wo, r, c\]"),
        ({"out": torch.empty(2, 6, 6, 2, 4)}, r"out must be \[N, H, W, r, C\]"),
        ({"out": torch.empty(4, 6, 6, 3, 2).transpose(0, 4)}, "out must be contiguous"),
        ({"grad": torch.zeros(2, 4, 4, 3, 5).double()}, "out is Float but grad is Double"),
        ({"grad": torch.zeros(2, 4, 5, 3, 5)}, "grad must have 4 positions along axis 2"),
        ({"weight": torch.zeros(5, 4, 9)}, r"weight must be \[m, C / g, kh, kw\]"),
        ({"weight": torch.zeros(6, 4, 3, 3)}, "weight must have m = 5"),
        ({"weight": torch.zeros(5, 3, 3, 3)}, "groups must fit weight"),
        ({"groups": 2}, "groups must fit weight"),
        ({"stride": (0, 1)}, "stride and dilation must be positive"),
        ({"factor": torch.zeros(2, 6, 6, 5)}, r"factor must be \[N, H, W, C\]"),
        ({"padding": (0,)}, "padding and dilation must have 2 entries"),
        ({"stride": (1, 1, 1)}, "padding and dilation must have 2 entries"),
    ],
)
def test_convolution_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ops.conv_input_gradient_(*conv_arguments(**changed))


def pool_arguments(**changed: Any) -> list[Any]:
    arguments = {
        "out": torch.empty(2, 6, 6, 3, 4),
        "grad": torch.zeros(2, 3, 3, 3, 4),
        "indices": torch.zeros(2, 3, 3, 4, dtype=torch.int64),
        "kernel_size": (2, 2),
        "stride": (2, 2),
        "padding": (0, 0),
        "dilation": (1, 1),
        "factor": None,
        "relu": None,
    }
    return list({**arguments, **changed}.values())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"grad": torch.zeros(2, 5, 3, 3, 4)}, ValueError, "grad must have 3 positions"),
        ({"grad": torch.zeros(2, 3, 3, 3, 5)}, ValueError, "out must have 5 channels"),
        (
            {"indices": torch.zeros(2, 3, 3, 4, dtype=torch.int32)},
            ValueError,
            "indices must be int64",
        ),
        (
            {"indices": torch.zeros(2, 3, 3, 5, dtype=torch.int64)},
            ValueError,
            r"indices must be \[N, Ho, Wo, C\]",
        ),
        (
            {"stride": (1, 1), "grad": torch.zeros(2, 5, 5, 3, 4),
             "indices": torch.full((2, 5, 5, 4), 36)},
            IndexError,
            r"indices must lie in \[0, 36\), got 36",
        ),
        ({"padding": (0,)}, ValueError, "padding and dilation must have 2 entries"),
        ({"factor": torch.zeros(2, 6, 6)}, ValueError, r"factor must be \[N, H, W, C\]"),
        ({"relu": torch.zeros(2, 6, 6, 3)}, ValueError, r"relu must be \[N, H, W, C\]"),
        ({"relu": torch.zeros(2, 6, 6, 4).double()}, ValueError, "out is Float but relu is Double"),
        ({"out": torch.empty(2, 6, 6, 3, 1).expand(-1, -1, -1, -1, 4)}, ValueError,
         "out must fill its memory"),
    ],
)  # fmt: skip
def test_max_pooling_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _ops.max_pool_input_gradient_(*pool_arguments(**changed))
