"""Digests of what a pass is given: tensors bit by bit, and whatever else holds them."""

from __future__ import annotations

import ast
import hashlib
import linecache
import pickle
import re
from collections.abc import Iterator, Mapping, Set
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["BYTECODE", "digest", "function_parts", "marked_digest", "module_facts", "tensor_digest"]

# Behind a digest that another version of Python would not come to.
BYTECODE = " (bytecode)"

# Of the hexadecimal digits of a SHA-256: enough to tell any two things apart that come by chance.
_DIGITS = 32


def tensor_digest(tensor: Tensor) -> str:
    """Of a tensor's dtype, shape and bits, wherever it lies; waits for its device."""
    found = _Sum()
    _add_tensor(found, tensor)
    return found.digits


def digest(value: Any, before: str = "") -> str:
    """Of nested tuples, lists and mappings of tensors, arrays and plain values.

    Of a function counts its name, its code, its defaults, what it encloses, and of its module the
    values and functions that it names; of another object its type and its attributes, or what it
    pickles as. Code is what stands in its file, and bytecode where there is none to be read.

    Args:
        value: anything.
        before: a digest that this one goes on from, so that it speaks of all before as well.
    """
    found = _Sum(before)
    _add(found, value, set())
    return found.digits


def marked_digest(value: Any) -> str:
    """The same, and behind it :data:`BYTECODE` where it hangs on the version of Python."""
    found = _Sum()
    _add(found, value, set())
    return found.digits + BYTECODE * found.bytecode


class _Sum:
    """A digest on its way.

    Attributes:
        bytecode: whether some of it is of no other version of Python.
    """

    def __init__(self, before: str = "") -> None:
        self._sum, self.bytecode = hashlib.sha256(before.encode()), False
        self.update = self._sum.update

    @property
    def digits(self) -> str:
        return self._sum.hexdigest()[:_DIGITS]


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
    found = marked_digest(forward.__code__)
    return f" with forward() {found[:8]}" + BYTECODE * found.endswith(BYTECODE)


def _said(module: nn.Module) -> str:
    """Its words about itself, without places in memory."""
    try:
        return re.sub(r"0x[0-9a-fA-F]+", "", str(module.extra_repr()))
    except Exception:  # an object's own code may raise anything
        return ""


def _add_tensor(found: _Sum, tensor: Tensor) -> None:
    found.update(f"tensor {tensor.dtype} {list(tensor.shape)};".encode())
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    # Conjugates and negatives are views that share the bits of what they belong to.
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous()
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _add(found: _Sum, value: Any, above: set[int]) -> None:
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


def _add_parts(found: _Sum, value: Any, above: set[int]) -> None:
    name = _qualified(type(value))
    parts: Any
    if isinstance(value, (tuple, list)):
        parts = list(value)
    elif isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, Set):
        parts = sorted(marked_digest(part) for part in value)
        found.bytecode |= any(part.endswith(BYTECODE) for part in parts)
    elif isinstance(value, partial):
        # What it holds is no attribute.
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, FunctionType):
        parts = function_parts(value)
    elif isinstance(value, CodeType):
        source = _source_of(value)
        parts = [value.co_code, value.co_names, value.co_consts] if source is None else [source]
        found.bytecode |= source is None
    elif isinstance(value, type):
        parts = [value.__module__, value.__qualname__]
    elif hasattr(value, "__dict__"):
        parts = [part for item in sorted({**_slots(value), **vars(value)}.items()) for part in item]
    else:
        parts = [_pickled(value)]
    found.update(f"{name} {len(parts)};".encode())
    for part in parts:
        _add(found, part, above)


def function_parts(function: FunctionType) -> list[Any]:
    """What a function may depend on besides what it is called with."""
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


_VALUES = (bool, int, float, complex, str, bytes, Tensor, np.ndarray)


def _of_module(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What of its module a function may depend on: tensors, plain values, other functions there."""
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        beside = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if beside or isinstance(value, _VALUES):
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


_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def _source_of(code: CodeType) -> str | None:
    """What stands in the file that a function's code comes from, without layout and comments.

    Returns:
        None where there is no file, or it is no longer, or not for sure, that of the code.
    """
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename))
    try:
        codes, nodes = _functions(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    place = code.co_name, code.co_firstlineno
    # The file may have changed since it was imported: what runs is the code.
    if codes.get(place) != [code] or len(nodes.get(place, [])) != 1:
        return None
    return _words(nodes[place][0])


@lru_cache(maxsize=8)
def _functions(
    text: str,
) -> tuple[dict[tuple[str, int], list[CodeType]], dict[tuple[str, int], list[_Function]]]:
    """All functions of a file by name and first line: as code, and as nodes of its tree."""
    codes: dict[tuple[str, int], list[CodeType]] = {}
    nodes: dict[tuple[str, int], list[_Function]] = {}
    tree = ast.parse(text)
    for found in _codes(compile(text, "", "exec", dont_inherit=True)):
        codes.setdefault((found.co_name, found.co_firstlineno), []).append(found)
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            nodes.setdefault(("<lambda>", node.lineno), []).append(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            nodes.setdefault((node.name, first), []).append(node)
    return codes, nodes


def _codes(code: CodeType) -> Iterator[CodeType]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from _codes(part)


def _words(value: Any) -> str:
    """A tree in words; fields that hold nothing are those that some versions do not have."""
    if isinstance(value, ast.AST):
        held = ((name, getattr(value, name, None)) for name in value._fields)
        words = (f"{name}={_words(part)}" for name, part in held if part is not None and part != [])
        return f"{type(value).__name__}({' '.join(words)})"
    if isinstance(value, list):
        return f"[{' '.join(_words(part) for part in value)}]"
    return repr(value)
