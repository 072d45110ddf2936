"""Digests of what a pass is given: tensors bit by bit, and whatever else holds them."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping, Set
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["digest", "module_facts", "tensor_digest"]

# Of the hexadecimal digits of a SHA-256: enough to tell any two things apart that come by chance.
_DIGITS = 32


def tensor_digest(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and bits, wherever it lies; waits for its device."""
    found = hashlib.sha256()
    _add_tensor(found, tensor)
    return found.hexdigest()[:_DIGITS]


def digest(value: Any, before: str = "") -> str:
    """Of nested tuples, lists and mappings of tensors, arrays and plain values.

    Of a function counts its name, its code, its defaults, what it encloses, and of its module the
    values and functions that it names; of another object its type and its attributes, or what it
    pickles as.

    Args:
        value: anything.
        before: a digest that this one goes on from, so that it speaks of all before as well.
    """
    found = hashlib.sha256(before.encode())
    _add(found, value, set())
    return found.hexdigest()[:_DIGITS]


def module_facts(model: nn.Module) -> dict[str, list[str]]:
    """[type, what it says of itself] of every module by its name, as JSON has it.

    They tell models apart that have the same weights. Of what does not come from torch counts the
    code of its ``forward`` as well.
    """
    return {
        name: [_qualified(type(module)) + _forward(type(module)), _said(module)]
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _forward(kind: type) -> str:
    """A digest of a module's code, of a few digits; nothing for torch's own."""
    forward = getattr(kind, "forward", None)
    if kind.__module__.split(".")[0] == "torch" or not isinstance(forward, FunctionType):
        return ""
    return f" with forward() {digest(forward.__code__)[:8]}"


def _said(module: nn.Module) -> str:
    """Its words about itself, without places in memory."""
    try:
        return re.sub(r"0x[0-9a-fA-F]+", "", str(module.extra_repr()))
    except Exception:  # an object's own code may raise anything
        return ""


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
    name = _qualified(type(value))
    parts: Any
    if isinstance(value, (tuple, list)):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, Set):
        parts = sorted(digest(part) for part in value)
    elif isinstance(value, partial):
        # What it holds is no attribute.
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, FunctionType):
        parts = _of_function(value)
    elif isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, value.co_consts]
    elif isinstance(value, type):
        parts = [value.__module__, value.__qualname__]
    elif hasattr(value, "__dict__"):
        parts = [part for item in sorted({**_slots(value), **vars(value)}.items()) for part in item]
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
    named = [part for item in _of_module(function) for part in item]
    return [function.__module__, function.__qualname__, function.__code__, *own, *cells, *named]


def _of_module(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What of its module a function may depend on: tensors, plain values, other functions there."""
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        beside = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if beside or isinstance(value, (bool, int, float, complex, str, bytes, Tensor, np.ndarray)):
            yield name, value


def _names(code: CodeType) -> set[str]:
    """The names of globals, and of attributes, in a function and those defined in it."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return {*code.co_names}.union(*inner)


def _slots(value: Any) -> dict[str, Any]:
    """Attributes that an object's dictionary does not hold."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if not name.startswith("__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value, protocol=4)
    except Exception:  # an object's own code may raise anything
        return b"unknown"
