"""Nested states as tensors by name and plain values, as a file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["packed", "unpacked"]

# The key of what stands for a tensor, or for a mapping whose keys are no strings.
_TENSOR = "tensor"


def packed(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A state's tensors by the way to them, and the state with these names in their places.

    Args:
        state: nested mappings with string keys, lists and tuples of tensors and plain values.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            return {"items": {key: plain(item, f"{name}/{key}") for key, item in value.items()}}
        if isinstance(value, (tuple, list)):
            return [plain(item, f"{name}/{i}") for i, item in enumerate(value)]
        return value

    return tensors, plain(state, "state")


def unpacked(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """The state again; tuples have become lists."""
    if isinstance(plain, list):
        return [unpacked(tensors, item) for item in plain]
    if isinstance(plain, dict):
        if _TENSOR in plain:
            return tensors[plain[_TENSOR]]
        return {key: unpacked(tensors, item) for key, item in plain["items"].items()}
    return plain
