"""What a loss is made of, for ranks to compare: constants, functions, modules, and tensors' bits.

What may well differ between ranks and says nothing of the loss is left out: numbers of devices,
values of functions' modules, and what is inside of other objects than losses and modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesskern.digests import digest, module_facts
from hesskern.parallel.replicas import checksums

__all__ = ["loss_facts"]

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|meta)(:\d+)?")
# What torch keeps in every module; parameters and buffers are read by their names.
_OF_TORCH = frozenset(vars(nn.Module()))


def loss_facts(loss: Any) -> list[Any]:
    """[type, parts] of a loss as JSON has them; the host waits once for its tensors.

    Args:
        loss: any object. Its attributes count, and its methods where its class is a user's own.
    """
    walk = _Walk()
    parts = {name: walk.of(value, name, True) for name, value in vars(loss).items()}
    found = checksums(walk.tensors)
    return [type(loss).__name__, {**parts, **({"tensors": found} if found else {})}]


class _Walk:
    """Goes through nested values once.

    Attributes:
        tensors: found on the way, by where they are.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._above: list[int] = []

    def of(self, value: Any, place: str, whole: bool = False) -> Any:
        """A value as JSON has it; ``whole`` for an object whose attributes count."""
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, (str, torch.device)):
            device = _DEVICE.fullmatch(str(value))
            return device[1] if device else value
        if isinstance(value, Tensor):
            self.tensors[place] = value
            return f"{value.dtype} {list(value.shape)}"
        if isinstance(value, (complex, bytes, range, torch.dtype, np.generic)):
            return repr(value)
        if isinstance(value, Enum):
            return f"{_name(type(value))}.{value.name}"
        if isinstance(value, np.ndarray) and value.dtype != object:
            return f"array {digest(value)}"
        if id(value) in self._above:
            # Something that holds itself.
            return "above"
        self._above.append(id(value))
        try:
            return self._parts(value, place, whole)
        finally:
            self._above.pop()

    def _parts(self, value: Any, place: str, whole: bool) -> Any:
        if isinstance(value, (tuple, list)):
            return [self.of(part, f"{place} {i}") for i, part in enumerate(value)]
        if isinstance(value, Mapping):
            return self._named({str(key): part for key, part in value.items()}, place)
        if isinstance(value, Set):
            return sorted(str(self.of(part, place)) for part in value)
        if isinstance(value, MethodType):
            return [self.of(value.__func__, place), self.of(value.__self__, place, whole)]
        if isinstance(value, partial):
            given = self._named(value.keywords, place)
            return [self.of(value.func, place), self.of(value.args, place), given]
        if isinstance(value, FunctionType):
            return self._function(value, place)
        if isinstance(value, nn.Module):
            return self._module(value, place)
        kind = type(value)
        named = {"type": _name(value if isinstance(value, type) else kind)}
        if not hasattr(value, "__dict__") or isinstance(value, type):
            return named
        if whole or is_dataclass(value):
            named.update(self._named({**_methods(kind), **vars(value)}, place))
        return named

    def _named(self, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        return {name: self.of(part, f"{place}.{name}") for name, part in values.items()}

    def _function(self, function: FunctionType, place: str) -> dict[str, Any]:
        found = {"function": _name(function), "code": digest(function.__code__)}
        held = {}
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            try:
                held[name] = self.of(cell.cell_contents, f"{place} {name}")
            except ValueError:
                # A name that has no value yet.
                continue
        given = {"defaults": function.__defaults__, "named defaults": function.__kwdefaults__}
        return {**found, "encloses": held, **self._named(given, place)}

    def _module(self, module: nn.Module, place: str) -> dict[str, Any]:
        for named in (module.named_parameters(), module.named_buffers()):
            self.tensors.update({f"{place}.{name}": tensor for name, tensor in named})
        own = {}
        for name, inner in module.named_modules():
            where = f"{place}.{name}" if name else place
            rest = {k: part for k, part in vars(inner).items() if k not in _OF_TORCH}
            own[name] = self._named({**_methods(type(inner)), **rest}, where)
        return {"modules": module_facts(module), "attributes": own}


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _methods(kind: type) -> dict[str, Any]:
    """A class's own functions, and those it has inherited from a user's; none of torch's."""
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.split(".")[0] not in ("torch", "hesskern", "builtins", "typing", "abc"):
            found.update({k: v for k, v in vars(each).items() if isinstance(v, FunctionType)})
    return found
