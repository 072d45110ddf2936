"""Reading an autograd graph: its nodes in order, their kinds and the shapes of their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = [
    "axis_of",
    "batch_norm_eps",
    "behind",
    "has_graph",
    "in_order",
    "kind",
    "output_shape",
    "passes_gradients",
    "per_axis",
    "product",
]


def kind(node: Any) -> str:
    """The operation's name: that of the node without "Backward" and the trailing number."""
    return _operation(type(node).__name__)


@lru_cache(maxsize=1024)
def _operation(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")


def passes_gradients(node: Any) -> bool:
    """Whether the node is a ``torch.autograd.Function`` that says it hands its tensor on."""
    return isinstance(node, BackwardCFunction) and bool(
        getattr(getattr(node, "_forward_cls", None), "passes_gradients", False)
    )


def has_graph(node: Any) -> bool:
    """Whether the graph that a node stood in is still there.

    Up to torch 2.10 the object of a ``torch.autograd.Function`` outlives it, and leads nowhere.
    """
    try:
        return node.next_functions is not None
    except RuntimeError:
        return False


def output_shape(node: Any, number: int = 0) -> tuple[int, ...] | None:
    """Shape of one of the node's outputs in the forward pass; None where it is not known."""
    metadata = node._input_metadata
    if number >= len(metadata):
        return None
    return tuple(map(int, metadata[number].shape))


def behind(outputs: Tensor) -> list[Any]:
    """All nodes that the outputs depend on, each behind every node that it leads to."""
    return [] if outputs.grad_fn is None else in_order([outputs.grad_fn])


def in_order(roots: Iterable[Any]) -> list[Any]:
    """All nodes that the roots lead to, each behind every node that it leads to."""
    done: set[Any] = set()
    order: list[Any] = []
    pending = [(root, False) for root in roots]
    while pending:
        node, left = pending.pop()
        if left:
            order.append(node)
            continue
        if node in done:
            continue
        done.add(node)
        pending.append((node, True))
        for follower, _ in node.next_functions:
            if follower is not None and follower not in done:
                pending.append((follower, False))
    return order


def batch_norm_eps(node: Any) -> float:
    """What a batch norm adds to its variances; cuDNN's has it by another name than torch's own."""
    name = "_saved_epsilon" if kind(node) == "CudnnBatchNorm" else "_saved_eps"
    return float(getattr(node, name))


def axis_of(axis: int, dim: int) -> int:
    """Axis counted from 0; autograd keeps axes as unsigned 64-bit numbers."""
    axis = int(axis)
    if axis >= 2**63:
        axis -= 2**64
    return axis % max(dim, 1)


def per_axis(values: Iterable[Any], axes: int) -> tuple[int, ...]:
    """A value for every axis, of which torch saves a single one where all are alike."""
    sizes = tuple(int(value) for value in values)
    return sizes * axes if len(sizes) == 1 else sizes


def product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
