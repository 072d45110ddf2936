"""What an element of a data set may depend on besides its index, as one digest."""

from __future__ import annotations

import dis
import hashlib
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from types import (
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
)
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


def state_digest(held: Any, largest: int = LARGEST_STATE) -> str | None:
    """Of all that it would be pickled with, functions and the code of its classes included.

    Of functions that counts which they name of their modules, of classes what they hold.

    Args:
        held: a map-style data set, and what else makes batches of its samples.
        largest: bytes to look at.

    Returns:
        None where it cannot be told: it holds what cannot be pickled, or too much.
    """
    found = _Sum(largest)
    try:
        _Walk(found).dump(held)
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
        # Large buffers are looked at where they lie: a copy of them may not fit.
        super().__init__(found, protocol=5, buffer_callback=self._buffer)
        self._found = found
        self._begun: set[int] = set()

    def _buffer(self, buffer: pickle.PickleBuffer) -> None:
        self._found.write(buffer.raw())

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._found.room(value.numel() * value.element_size())
            return str, (f"tensor {tensor_digest(value)}",)
        if isinstance(value, np.memmap) and not value.flags.writeable:
            file = value.filename, value.offset, _beginning(value)
            return tuple, ((*file, value.shape, value.strides, value.dtype.str),)
        if isinstance(value, np.ndarray):
            # What does not lie in one piece, or holds objects, would be copied first.
            self._found.room(0 if value.flags.forc else value.nbytes)
            return NotImplemented
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
            return list, ([function_parts(value), *_globals_of(value)],)
        return NotImplemented


def _beginning(part: np.memmap[Any, Any]) -> int:
    """Bytes of what lies in a file before a part of it, which has the whole's offset."""
    whole: Any = part
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return int(part.__array_interface__["data"][0] - whole.__array_interface__["data"][0])


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _of_class(kind: type) -> list[Any]:
    """Its name, what it derives from, and all that it holds, functions included."""
    held = [
        (name, _inner(value))
        for name, value in sorted(vars(kind).items())
        if name != "_abc_impl" and not isinstance(value, _PLACES)
    ]
    kept = [(n, v) for n, v in held if isinstance(v, (FunctionType, list)) or n[:2] != "__"]
    return [_name(kind), list(kind.__bases__), kept]


# Where instances keep attributes.
_PLACES = (GetSetDescriptorType, MemberDescriptorType)


def _inner(value: Any) -> Any:
    """The functions of a method, a property or what else a class makes of functions."""
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, cached_property):
        return value.func
    return getattr(value, "__func__", getattr(value, "__wrapped__", value))


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function names of its module and, of the user's, of others."""
    globals_: set[str] = set()
    names: set[str] = set()
    for code in _codes(function.__code__):
        names.update(code.co_names)
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_.add(step.argval)
    for name in sorted(globals_ & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, ModuleType):
            yield name, value
        elif not _of_library(value.__name__):
            for inner in sorted(names & vars(value).keys()):
                if not isinstance(vars(value)[inner], ModuleType):
                    yield f"{name}.{inner}", vars(value)[inner]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of functions in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes(part)


def _of_library(module: str | None) -> bool:
    """Whether a module is no code of the user's, and its state none of a data set."""
    name = (module or "").split(".")[0]
    if name in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return isinstance(path, str) and path.startswith(_LIBRARIES)
