"""How one forward pass's tensors hold the samples, and what a rule of propagation is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.graph.nodes import product

__all__ = [
    "DTYPES",
    "Apply",
    "Layout",
    "Make",
    "Memory",
    "Operands",
    "Rule",
    "Shapes",
    "Unknown",
    "cut",
    "dtype_of",
    "metadata",
    "shape_of",
    "times",
    "view",
]

# What rules work in.
DTYPES = (torch.float32, torch.float64)

Operands = tuple[int, ...]
Shapes = list[tuple[int, ...]]
Apply = Callable[[Tensor, slice, Tensor | None], list[Tensor]]


class Unknown(Exception):
    """The graph holds something that no rule covers."""


@dataclass(frozen=True)
class Rule:
    """How gradients go on from one operation.

    Attributes:
        operands: positions of those operands of the node that gradients go on to.
        apply: (gradient [n, r, ...], samples, factor [n, ...] or None) to the operands' gradients;
            a factor, given only where there is one operand, multiplies that operand's gradient.
        masked: instead of ``apply`` on a device, where there is one operand: the same, with the
            result [n, ...] of a ReLU or None behind the factor, through which gradients go, too.
        factor: instead of ``apply``, for an elementwise operation: samples to its derivative
            [n or 1, ...], which broadcasts against the operand, in the operation's dtype.
        relu: for a ReLU its result [N, ...], beside ``factor``.
    """

    operands: tuple[int, ...]
    apply: Apply | None = None
    masked: Callable[[Tensor, slice, Tensor | None, Tensor | None], Tensor] | None = None
    factor: Callable[[slice], Tensor] | None = None
    relu: Tensor | None = None


def metadata(node: Any) -> Any:
    """Of the node's first output in the forward pass."""
    outputs = node._input_metadata
    if len(outputs) < 1 or outputs[0].is_nested_tensor:
        raise Unknown
    return outputs[0]


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of the node's first output in the forward pass."""
    return tuple(map(int, metadata(node).shape))


def dtype_of(node: Any) -> torch.dtype:
    """Its dtype, one that rules work in."""
    dtype: torch.dtype = metadata(node).dtype
    if dtype not in DTYPES:
        raise Unknown
    return dtype


class Layout:
    """Where the samples are in the tensors of one forward pass.

    Args:
        samples: N.
        by_kernels: whether this package's kernels on the CPU take the rows; else torch's own.
        nodes: of the graph, whose tensors are [N, ...] or [N t, ...].

    Attributes:
        shapes: of one sample of each node's result.
    """

    def __init__(self, samples: int, by_kernels: bool, nodes: Iterable[Any]) -> None:
        self.samples = samples
        self.by_kernels = by_kernels
        self.shapes = {node: self._sample_shape(shape_of(node)) for node in nodes}

    def _sample_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[...] of one sample of a tensor [N, ...] or [N t, ...]."""
        if not shape or shape[0] % self.samples:
            raise Unknown
        rest = shape[1:]
        return rest if shape[0] == self.samples else (shape[0] // self.samples, *rest)

    def merged(self, node: Any) -> bool:
        """Whether the first axis counts more than the samples."""
        return shape_of(node)[0] != self.samples

    def by_sample(self, tensor: Tensor) -> Tensor:
        """[N, ...] of a tensor with samples in its first axis."""
        return tensor.reshape(self.samples, *self._sample_shape(tuple(tensor.shape)))

    def check_same(self, node: Any, shapes: list[tuple[int, ...]]) -> None:
        """Refuses operands that were broadcast."""
        if any(shape != self.shapes[node] for shape in shapes):
            raise Unknown


Make = Callable[[Layout, Any, Operands, Shapes], Rule]


class Memory:
    """One operation's gradients, in the same memory for every block: new pages cost as much as the
    values written to them."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape, of the dtype and device of ``like``, with any values."""
        size = product(shape)
        if self._tensor is None or len(self._tensor) < size:
            self._tensor = like.new_empty(size)
        return self._tensor[:size].view(shape)


def view(g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[n, r, *shape] of a gradient [n, r, ...]."""
    return g if tuple(g.shape[2:]) == shape else g.reshape(*g.shape[:2], *shape)


def times(g: Tensor, factor: Tensor | None) -> Tensor:
    return g if factor is None else g * factor.unsqueeze(1)


def _channels_are_last(g: Tensor) -> bool:
    """Whether channels of gradients [n, r, C, H, W] are last in memory."""
    return g.dim() == 5 and g.stride(2) == 1 and g.shape[2] > 1


def cut(g: Tensor, factor: Tensor | None, relu: Tensor) -> Tensor:
    """Gradients [n, r, ...] times a factor where a ReLU's result [n, ...] is positive."""
    if _channels_are_last(g):
        # Read across the rows' memory format it would take as long as all of them.
        relu = relu.contiguous(memory_format=torch.channels_last)
    if factor is not None:
        factor = torch.ops.aten.threshold_backward(factor.expand_as(relu), relu, 0.0)
        return times(g, factor)
    return torch.ops.aten.threshold_backward(g, relu.unsqueeze(1), 0.0)
