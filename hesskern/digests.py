"""Digests of what a pass is given: tensors bit by bit, and whatever else holds them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Set
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["digest", "tensor_digest"]

# Of the hexadecimal digits of a SHA-256: enough to tell any two things apart that come by chance.
_DIGITS = 32


def tensor_digest(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and bits, wherever it lies; waits for its device."""
    found = hashlib.sha256()
    _add_tensor(found, tensor)
    return found.hexdigest()[:_DIGITS]


def digest(value: Any, before: str = "") -> str:
    """Of nested tuples, lists and mappings of tensors, arrays and plain values.

    Of a function counts its name, its code, its defaults and what it encloses; of another object
    its type and its attributes, or what it pickles as.

    Args:
        value: anything.
        before: a digest that this one goes on from, so that it speaks of all before as well.
    """
    found = hashlib.sha256(before.encode())
    _add(found, value, set())
    return found.hexdigest()[:_DIGITS]


def _add_tensor(found: Any, tensor: Tensor) -> None:
    found.update(f"tensor {tensor.dtype} {list(tensor.shape)};".encode())
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    # Conjugates and negatives are views that share the bits of what they belong to.
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous()
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _add(found: Any, value: Any, above: set[int]) -> None:
    if isinstance(value, Tensor):
        _add_tensor(found, value)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        found.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        found.update(f"array {value.dtype.str} {value.shape};".encode())
        found.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data)
    elif id(value) in above:
        found.update(b"above;")
    else:
        # Something that holds itself ends there.
        _add_parts(found, value, above | {id(value)})


def _add_parts(found: Any, value: Any, above: set[int]) -> None:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    parts: Any
    if isinstance(value, (tuple, list)):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, Set):
        parts = sorted(digest(part) for part in value)
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, FunctionType):
        parts = _of_function(value)
    elif isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, value.co_consts]
    elif isinstance(value, type):
        parts = [value.__module__, value.__qualname__]
    elif hasattr(value, "__dict__"):
        parts = [part for item in sorted(vars(value).items()) for part in item]
    else:
        parts = [_pickled(value)]
    found.update(f"{name} {len(parts)};".encode())
    for part in parts:
        _add(found, part, above)


def _of_function(function: FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            # A name that has no value yet.
            cells.append(None)
    own = function.__defaults__, function.__kwdefaults__
    return [function.__module__, function.__qualname__, function.__code__, *own, *cells]


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value, protocol=4)
    except Exception:  # an object's own code may raise anything
        return b"unknown"
