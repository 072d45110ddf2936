"""Nested states as tensors by name and plain values, as a file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["packed", "unpacked"]

# The keys of what stands for a tensor and for a mapping.
_TENSOR, _ITEMS, _LAYOUT = "tensor", "items", "layout"
# Bytes that the begin of a tensor's memory is a multiple of, or how far it is from one: products of
# matrices may round by that.
_ALIGNED = 64


def packed(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A state's tensors by the way to them, and the state with these names in their places.

    A tensor that stands in several places is held once, and is one again when it is read; where its
    elements lie otherwise than one behind the other, so they will then.

    Args:
        state: nested mappings with string keys, lists and tuples of tensors and plain values.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[int, Any] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                tensors[name] = _compact(value)
                layout = _layout(value)
                seen[id(value)] = {_TENSOR: name} if layout is None else {_TENSOR: name, **layout}
            return seen[id(value)]
        if isinstance(value, Mapping):
            return {_ITEMS: {key: plain(item, f"{name}/{key}") for key, item in value.items()}}
        if isinstance(value, (tuple, list)):
            return [plain(item, f"{name}/{i}") for i, item in enumerate(value)]
        return value

    return tensors, plain(state, "state")


def unpacked(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """The state again; tuples have become lists."""
    made: dict[str, Tensor] = {}

    def value(of: Any) -> Any:
        if isinstance(of, list):
            return [value(item) for item in of]
        if isinstance(of, dict):
            if _TENSOR not in of:
                return {key: value(item) for key, item in of[_ITEMS].items()}
            name = of[_TENSOR]
            if name not in made:
                made[name] = _laid_out(tensors[name], of.get(_LAYOUT))
            return made[name]
        return of

    return value(plain)


def _compact(tensor: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _layout(tensor: Tensor) -> dict[str, Any] | None:
    """Where its elements lie, if not one behind the other from an aligned begin."""
    begin = tensor.data_ptr() % _ALIGNED
    if not tensor.numel() or (tensor.is_contiguous() and not begin):
        return None
    return {_LAYOUT: [list(tensor.shape), list(tensor.stride()), begin // tensor.element_size()]}


def _laid_out(tensor: Tensor, layout: Any) -> Tensor:
    if layout is None:
        # A file's tensors begin where they happen to.
        return tensor.clone()
    shape, strides, begin = layout
    last = begin + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.empty(last + 1, dtype=tensor.dtype)
    _compact(memory.as_strided(shape, strides, begin)).copy_(tensor)
    return memory.as_strided(shape, strides, begin)
