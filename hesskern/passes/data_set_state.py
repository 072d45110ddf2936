"""What an element of a data set may depend on besides its index, as one digest."""

from __future__ import annotations

import hashlib
import pickle
import sys
import sysconfig
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor

from hesskern.digests import digest, function_parts, tensor_digest

__all__ = ["LARGEST_STATE", "state_digest"]

# Bytes beyond which nobody looks: such data sets lie in memory, and are loaded fast.
LARGEST_STATE = 2**28

_LIBRARIES = tuple(
    path for key in ("purelib", "platlib", "stdlib") if (path := sysconfig.get_path(key))
)


def state_digest(dataset: Any, largest: int = LARGEST_STATE) -> str | None:
    """Of all that a data set would be pickled with, functions and the code of its classes included.

    Args:
        dataset: map-style.
        largest: bytes to look at.

    Returns:
        None where it cannot be told: it holds what cannot be pickled, or too much.
    """
    found = _Sum(largest)
    try:
        _Walk(found).dump(dataset)
    except Exception:  # an object's own code may raise anything
        return None
    return found.digest()


class _Sum:
    """A file that keeps the digest of what is written to it."""

    def __init__(self, largest: int) -> None:
        self._sum, self._left = hashlib.sha256(), largest

    def room(self, size: int) -> None:
        """Raises where so many bytes are too much."""
        self._left -= size
        if self._left < 0:
            raise ValueError("too large a state")

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.room(size)
        self._sum.update(data)
        return size

    def digest(self) -> str:
        return self._sum.hexdigest()[:32]


class _Walk(pickle.Pickler):
    """Pickles what the usual one refuses, or takes by its name alone, as what it is made of."""

    def __init__(self, found: _Sum) -> None:
        super().__init__(found, protocol=4)
        self._found = found
        self._begun: set[int] = set()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._found.room(value.numel() * value.element_size())
            return str, (f"tensor {tensor_digest(value)}",)
        if isinstance(value, np.memmap) and not value.flags.writeable:
            where = value.filename, value.offset, value.shape, value.strides, value.dtype.str
            return tuple, (where,)
        if isinstance(value, CodeType):
            return str, (digest(value),)
        if isinstance(value, (FunctionType, type)):
            if _of_library(value.__module__):
                return NotImplemented
            # What names itself, or is named again, counts once.
            if id(value) in self._begun:
                return str, (_name(value),)
            self._begun.add(id(value))
            if isinstance(value, type):
                return list, (_of_class(value),)
            return list, (function_parts(value, all_values=True),)
        return NotImplemented


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _of_class(kind: type) -> list[Any]:
    """Its name, what it derives from, and its functions."""
    functions: list[tuple[str, Callable[..., Any]]] = []
    for name, value in sorted(vars(kind).items()):
        inner = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(inner, FunctionType):
            functions.append((name, inner))
    values = [
        (name, value)
        for name, value in sorted(vars(kind).items())
        if isinstance(value, (bool, int, float, str, bytes, list, dict, set, tuple))
        and not name.startswith("__")
    ]
    return [_name(kind), list(kind.__bases__), functions, values]


def _of_library(module: str | None) -> bool:
    """Whether a module is no code of the user's, and its state none of a data set."""
    name = (module or "").split(".")[0]
    if name in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return isinstance(path, str) and path.startswith(_LIBRARIES)
