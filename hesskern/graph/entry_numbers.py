"""Which entry of a weight stands where, behind operations that only move entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesskern.graph.nodes import axis_of, kind, output_shape, passes_gradients, product

__all__ = ["CHAIN", "Numbers"]

_SAME_ORDER = frozenset("Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View".split())
# Views, and copies of all entries.
CHAIN = _SAME_ORDER | frozenset(
    "Expand Permute Select Slice Split SplitWithSizes T Transpose Unbind".split()
)


class Numbers:
    """Which entry of the weight stands where, after operations that only move entries.

    Attributes:
        plain: how the weight [m, d] looks now: "same", "transposed", or "" for what only the
            numbers tell.
    """

    def __init__(
        self, shape: tuple[int, ...], plain: str = "same", tensor: Tensor | None = None
    ) -> None:
        self._shape, self.plain, self._tensor = shape, plain, tensor

    @property
    def tensor(self) -> Tensor:
        """Numbers of entries, in the shape of the operand."""
        if self._tensor is None:
            whole = torch.arange(product(self._shape), device="cpu").reshape(self._shape)
            self._tensor = whole.t() if self.plain == "transposed" else whole
        return self._tensor

    def through(self, node: Any, number: int) -> Numbers | None:
        """The same behind a node of the graph; None where that is not known."""
        name = kind(node)
        if name in ("ToCopy", "Clone", "Alias") or passes_gradients(node):
            return self
        if name == "T" and len(self._shape) == 2 and self.plain:
            flipped = "transposed" if self.plain == "same" else "same"
            return Numbers(self._shape, flipped)
        shape = output_shape(node, number)
        if shape is None:
            return None
        moved = _moved(name, node, number, self.tensor, shape)
        if moved is None or tuple(moved.shape) != shape:
            return None
        return Numbers(self._shape, "", moved)


def _moved(
    name: str, node: Any, number: int, tensor: Tensor, shape: tuple[int, ...]
) -> Tensor | None:
    """What a view-like operation makes of a tensor."""
    dim = tensor.dim()
    if name in _SAME_ORDER:
        return tensor.reshape(shape) if tensor.numel() == product(shape) else None
    if name == "T":
        return tensor.t()
    if name == "Transpose":
        return tensor.transpose(axis_of(node._saved_dim0, dim), axis_of(node._saved_dim1, dim))
    if name == "Permute":
        return tensor.permute([axis_of(axis, dim) for axis in node._saved_dims])
    if name == "Expand":
        return tensor.expand(shape)
    axis = axis_of(node._saved_dim, dim)
    if name == "Slice":
        begin, end = int(node._saved_start or 0), node._saved_end
        stop = tensor.shape[axis] if end is None else int(end)
        if begin < 0 or stop < 0 or begin >= 2**62:
            return None
        stop = min(stop, tensor.shape[axis])
        return tensor.narrow(axis, begin, max(stop - begin, 0)).index_select(
            axis, torch.arange(0, max(stop - begin, 0), int(node._saved_step), device="cpu")
        )
    if name == "Select":
        index = int(node._saved_index)
        return tensor.select(axis, index - 2**64 if index >= 2**63 else index)
    if name == "Unbind":
        return tensor.unbind(axis)[number]
    if name == "Split":
        return tensor.split(int(node._saved_split_size), axis)[number]
    if name == "SplitWithSizes":
        return tensor.split([int(size) for size in node._saved_split_sizes], axis)[number]
    return None
