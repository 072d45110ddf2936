"""Rules of propagation: how rows of gradients go through an operation, by its node's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hesskern.graph.nodes import axis_of, batch_norm_eps, kind, passes_gradients, product
from hesskern.graph.propagation_images import (
    adaptive_average_pool,
    average_pool,
    convolution,
    max_pool,
)
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
    metadata,
    shape_of,
    times,
    view,
)

__all__ = ["rule_for"]

# Operations that act on every element alone: the derivative is a factor per element.
_ELEMENTWISE = frozenset(
    (
        "Elu Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu LogSigmoid Mish Neg Relu Sigmoid Silu"
        " Softplus Tanh Threshold"
    ).split()
)
_SAME_VALUES = frozenset(
    "Alias Clone ReshapeAlias Squeeze ToCopy Unsqueeze UnsafeView View".split()
)


def rule_for(layout: Layout, node: Any) -> Rule:
    """How gradients go on from a node to those of its operands that the layout holds.

    Raises:
        Unknown: autograd has to do it.
    """
    following = node.next_functions
    operands = tuple(i for i, (next_node, _) in enumerate(following) if next_node in layout.shapes)
    if not operands:
        return Rule(())
    name = kind(node)
    if isinstance(node, BackwardCFunction):
        # The name of a torch.autograd.Function says nothing.
        if not passes_gradients(node):
            raise Unknown
        name = "Alias"
    shapes = [layout.shapes[following[i][0]] for i in operands]
    if name in _ELEMENTWISE:
        layout.check_same(node, shapes)
        if name == "Relu":
            result = layout.by_sample(node._saved_result.detach())
            return Rule(operands, factor=_is_positive(result), relu=result)
        return Rule(operands, factor=_derivative(layout, node))
    if name in _SAME_VALUES:
        return Rule(operands, lambda g, _, factor: [times(view(g, shapes[0]), factor)])
    make = _RULES.get(name)
    if make is None:
        raise Unknown
    return make(layout, node, operands, shapes)


def _derivative(layout: Layout, node: Any) -> Callable[[slice], Tensor]:
    about = metadata(node)
    ones = torch.ones((), dtype=about.dtype, device=about.device).expand(shape_of(node))
    return _samples(layout.by_sample(node(ones)))


def _samples(factor: Tensor) -> Callable[[slice], Tensor]:
    """The samples' part of a factor [N, ...], or a factor [1, ...] of all."""
    return lambda samples: factor if factor.shape[0] == 1 else factor[samples]


def _is_positive(result: Tensor) -> Callable[[slice], Tensor]:
    """1 where the samples' part of a tensor [N, ...] is positive, 0 elsewhere."""
    return lambda samples: (result[samples] > 0).to(result.dtype)


def _matmul(matrix: Tensor, by_kernels: bool) -> Apply:
    """Gradients [n, r, ..., m] times a matrix [m, d]."""

    memory = Memory()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        if not by_kernels:
            # A device's allocator keeps memory for the next block by itself.
            return [times(torch.matmul(g, matrix), factor)]
        product = memory.take(g, (*g.shape[:-1], matrix.shape[1]))
        torch.matmul(g, matrix, out=product)
        return [product if factor is None else product.mul_(factor.unsqueeze(1))]

    return apply


def _linear(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    left = 1 if kind(node) == "Addmm" else 0
    if operands != (left,) or len(shapes[0]) != len(layout.shapes[node]):
        raise Unknown
    if getattr(node, "_saved_alpha", 1) != 1:
        raise Unknown
    return Rule(operands, _matmul(node._saved_mat2.detach().t(), layout.by_kernels))


def _batched_matmul(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    """A matrix of every sample times a constant one; so linear layers treat strided sequences."""
    if operands != (0,) or layout.merged(node):
        raise Unknown
    matrices = node._saved_mat2.detach()

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [times(torch.matmul(g, matrices[samples].unsqueeze(1).mT), factor)]

    return Rule(operands, apply)


def _expansion(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    layout.check_same(node, shapes)
    return Rule(operands, lambda g, _, factor: [times(g, factor)])


def _reduction(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    """Sum and mean over axes other than that of the samples."""
    full = tuple(int(size) for size in getattr(node, "_saved_self_sym_sizes", ()))
    if not full or full[0] != layout.samples or not hasattr(node, "_saved_dim"):
        raise Unknown
    axes = sorted(axis_of(axis, len(full)) for axis in (node._saved_dim or ()))
    if not axes or axes[0] == 0:
        raise Unknown
    scale = 1.0
    if kind(node) == "Mean":
        scale = 1.0 / product(tuple(full[axis] for axis in axes))
    keep = bool(node._saved_keepdim)

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        for axis in () if keep else axes:
            g = g.unsqueeze(axis + 1)
        return [times((g * scale).expand(*g.shape[:2], *full[1:]), factor)]

    return Rule(operands, apply)


def _sum(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    """a + alpha b and a - alpha b of equal shapes."""
    layout.check_same(node, shapes)
    sign = 1.0 if kind(node) == "Add" else -1.0
    scales = [1.0 if i == 0 else sign * float(node._saved_alpha) for i in operands]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [times(g if scale == 1.0 else g * scale, factor) for scale in scales]

    return Rule(operands, apply)


def _multiplication(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    """a b and a / b, each factor constant or of the same shape."""
    layout.check_same(node, shapes)
    if kind(node) == "Div" and (operands != (0,) or hasattr(node, "_saved_rounding_mode")):
        raise Unknown
    others = [node._saved_other if i == 0 else node._saved_self for i in operands]
    if any(not isinstance(other, Tensor) for other in others):
        raise Unknown
    # Masks and whole numbers as what the operation promotes them to, since products of the narrow
    # ones overflow. Python's numbers get an axis: their reciprocal without one is in float32.
    device = metadata(node).device
    others = [torch.atleast_1d(other.detach().to(device, dtype_of(node))) for other in others]
    if kind(node) == "Div":
        others = [other.reciprocal() for other in others]
    factors = [layout.by_sample(other.expand(shape_of(node))) for other in others]
    if len(factors) == 1:
        return Rule(operands, factor=_samples(factors[0]))

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [g * other[samples].unsqueeze(1) for other in factors]

    return Rule(operands, apply)


def _batch_norm(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    """Normalization by running statistics: a factor per channel."""
    layout.check_same(node, shapes)
    shape = shape_of(node)
    if operands != (0,) or node._saved_training or shape[0] != layout.samples:
        raise Unknown
    scale = (node._saved_running_var.to(dtype_of(node)) + batch_norm_eps(node)).rsqrt()
    if node._saved_weight is not None:
        scale = scale * node._saved_weight.detach().to(dtype_of(node))
    return Rule(operands, factor=_samples(scale.reshape(1, -1, *(1,) * (len(shape) - 2))))


def _concatenation(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    axis = axis_of(node._saved_dim, len(shape_of(node)))
    if len(operands) != len(node.next_functions) or axis == 0 or layout.merged(node):
        raise Unknown
    sizes = [shape[axis - 1] for shape in shapes]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [times(part, factor) for part in g.split(sizes, axis + 1)]

    return Rule(operands, apply)


def _permutation(layout: Layout, node: Any, operands: Operands, shapes: Shapes) -> Rule:
    dim = len(shape_of(node))
    order = list(range(dim))
    if kind(node) == "Transpose":
        a, b = axis_of(node._saved_dim0, dim), axis_of(node._saved_dim1, dim)
        order[a], order[b] = b, a
    else:
        order = [axis_of(axis, dim) for axis in node._saved_dims]
    if order[0] != 0 or layout.merged(node):
        raise Unknown
    back = [0, 1, *(order.index(axis) + 1 for axis in range(1, dim))]

    def apply(g: Tensor, samples: slice, factor: Tensor | None) -> list[Tensor]:
        return [times(g.permute(back), factor)]

    return Rule(operands, apply)


_RULES: dict[str, Make] = {
    "Add": _sum,
    "AdaptiveAvgPool2D": adaptive_average_pool,
    "Addmm": _linear,
    "AvgPool2D": average_pool,
    "Bmm": _batched_matmul,
    "Cat": _concatenation,
    "Convolution": convolution,
    "Div": _multiplication,
    "Expand": _expansion,
    "MaxPool2DWithIndices": max_pool,
    "Mean": _reduction,
    "Mm": _linear,
    "Mul": _multiplication,
    "CudnnBatchNorm": _batch_norm,
    "NativeBatchNorm": _batch_norm,
    "Permute": _permutation,
    "Sub": _sum,
    "Sum": _reduction,
    "Transpose": _permutation,
}
