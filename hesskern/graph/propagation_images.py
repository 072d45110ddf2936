"""Rules of propagation for images: convolutions and pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesskern.graph.nodes import per_axis
from hesskern.graph.propagation_layout import (
    Apply,
    Layout,
    Make,
    Memory,
    Operands,
    Rule,
    Shapes,
    Unknown,
    dtype_of,
    times,
)

__all__ = ["adaptive_average_pool", "average_pool", "convolution", "max_pool"]

_internal = torch.ops.hesskern_internal


def _channels_last(g: Tensor) -> Tensor:
    """Gradients [n, r, C, H, W] with their channels last in memory; copied where they are not."""
    return g.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _wants_channels_last(dtype: torch.dtype, *channels: int) -> bool:
    """Whether a device convolves images with their channels last as they are, others in copies.

    Tensor cores multiply TF32 in such images, four channels at once.
    """
    # torch's stubs do not know the newer flags.
    cudnn: Any = torch.backends.cudnn
    rounded = dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32"
    return rounded and all(count % 4 == 0 for count in channels)


def _images(g: Tensor) -> Tensor:
    """[n, H, W, r, C] of a gradient [n, r, C, H, W]."""
    return g.permute(0, 3, 4, 1, 2)


def _gradients(images: Tensor) -> Tensor:
    """[n, r, C, H, W] of [n, H, W, r, C]."""
    return images.permute(0, 3, 4, 1, 2)


def _last_axis(factor: Tensor | None, n: int, shape: tuple[int, ...]) -> Tensor | None:
    """[n, H, W, C] of a factor that broadcasts to [n, *shape] = [n, C, H, W]."""
    return None if factor is None else factor.expand(n, *shape).permute(0, 2, 3, 1)


def convolution(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    weight = node._saved_weight
    if operands != (0,) or node._saved_transposed or len(shapes[0]) != weight.dim() - 1:
        raise Unknown
    if not layout.by_kernels:
        return Rule(operands, _convolution_by_torch(node, shapes[0]))
    axes = weight.dim() - 2
    if axes not in (1, 2):
        raise Unknown
    flat = axes == 1
    size = list(shapes[0][1:])
    stride, padding, dilation = (
        list(per_axis(values, axes))
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    if flat:
        weight = weight.unsqueeze(2)
        size, stride, padding, dilation = [1, *size], [1, *stride], [0, *padding], [1, *dilation]
    weight = weight.detach().contiguous()
    groups = int(node._saved_groups)
    channels = weight.shape[1] * groups
    memory = Memory()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        if flat:
            g = g.unsqueeze(3)
            factor = factor if factor is None else factor.unsqueeze(2)
        factor = _last_axis(factor, len(g), (channels, *size))
        images = memory.take(g, (len(g), *size, g.shape[1], channels))
        _internal.conv_input_gradient_(
            images, _images(g), weight, stride, padding, dilation, groups, factor
        )
        result = _gradients(images)
        return [result.squeeze(3) if flat else result]

    return Rule(operands, apply)


def _merged(g: Tensor) -> Tensor:
    """[n r, C, ...] of gradients [n, r, C, ...]; a view where their memory permits."""
    return g.flatten(0, 1)


def _convolution_by_torch(node: Any, shape: tuple[int, ...]) -> Apply:
    weight = node._saved_weight.detach()
    axes = weight.dim() - 2
    groups = int(node._saved_groups)
    if axes == 2 and groups == 1 and _wants_channels_last(weight.dtype, *weight.shape[:2]):
        return _convolution_channels_last(node, shape)
    stride, padding, dilation = (
        list(per_axis(values, axes))
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        rows = _merged(g)
        # Of the inputs only the shape counts.
        inputs = rows.new_empty(1).expand(len(rows), *shape)
        found = torch.ops.aten.convolution_backward(
            rows,
            inputs,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * axes,
            groups,
            (True, False, False),
        )[0]
        return [times(found.unflatten(0, g.shape[:2]), factor)]

    return apply


def _convolution_channels_last(node: Any, shape: tuple[int, ...]) -> Apply:
    """The same with channels last in memory, before and behind.

    A convolution's backward function takes the memory format from inputs that it does not read; the
    transposed convolution, which it is, from the gradients.
    """
    weight = node._saved_weight.detach().contiguous(memory_format=torch.channels_last)
    stride, padding, dilation = (
        list(per_axis(values, 2))
        for values in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    reach = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    # Inputs behind the last window.
    rest = [
        (size + 2 * p - r) % s
        for size, p, r, s in zip(shape[1:], padding, reach, stride, strict=True)
    ]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        rows = _merged(g).contiguous(memory_format=torch.channels_last)
        found = torch.ops.aten.convolution(
            rows, weight, None, stride, padding, dilation, True, rest, 1
        )
        return [times(found.unflatten(0, g.shape[:2]), factor)]

    return apply


def max_pool(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    indices = node._saved_result1
    if operands != (0,) or len(shapes[0]) != 3 or indices.dim() != 4:
        raise Unknown
    where = indices.permute(0, 2, 3, 1)
    size = list(shapes[0][1:])
    kernel = per_axis(node._saved_kernel_size, 2)
    stride = per_axis(node._saved_stride, 2) or kernel
    padding, dilation = per_axis(node._saved_padding, 2), per_axis(node._saved_dilation, 2)
    window = kernel, stride, padding, dilation
    if not layout.by_kernels:
        last = _wants_channels_last(dtype_of(node), shapes[0][0])

        def masked(g: Tensor, samples: slice, factor: Tensor | None, relu: Tensor | None) -> Tensor:
            n, r, c = g.shape[:3]
            g = _channels_last(g) if last else g.contiguous()
            found = g.new_empty(n, r, *((*size, c) if last else (c, *size)))
            found = found.permute(0, 1, 4, 2, 3) if last else found
            factor, relu = (_last_axis(each, n, shapes[0]) for each in (factor, relu))
            _internal.max_pool_input_gradient_(
                _images(found), _images(g), where[samples], *window, factor, relu
            )
            return found

        return Rule(operands, masked=masked)
    memory = Memory()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        factor = _last_axis(factor, len(g), shapes[0])
        images = memory.take(g, (len(g), *size, g.shape[1], g.shape[2]))
        _internal.max_pool_input_gradient_(images, _images(g), where[samples], *window, factor)
        return [_gradients(images)]

    return Rule(operands, apply)


def _by_torch(plan_call: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]) -> Make:
    """A rule from torch's own backward function of a linear operation on images.

    Args:
        plan_call: of the node; returns (gradients [N, C, Ho, Wo], inputs [N, C, H, W] of which only
            the shape counts) to the inputs' gradients.
    """

    def make(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
        if operands != (0,) or len(shapes[0]) != 3:
            raise Unknown
        call = plan_call(node)

        def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
            rows = g.flatten(0, 1).contiguous()
            result = call(rows, rows.new_zeros(()).expand(len(rows), *shapes[0]))
            return [times(result.unflatten(0, g.shape[:2]), factor)]

        return Rule(operands, apply)

    return make


def _average_pool(node: Any) -> Callable[[Tensor, Tensor], Tensor]:
    settings = (
        node._saved_kernel_size,
        node._saved_stride,
        node._saved_padding,
        node._saved_ceil_mode,
        node._saved_count_include_pad,
        node._saved_divisor_override,
    )
    return lambda g, x: torch.ops.aten.avg_pool2d_backward(g, x, *settings)


def _adaptive_average_pool(node: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.ops.aten._adaptive_avg_pool2d_backward


average_pool = _by_torch(_average_pool)
adaptive_average_pool = _by_torch(_adaptive_average_pool)
