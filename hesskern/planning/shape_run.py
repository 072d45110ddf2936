"""Code run on shapes alone: floating-point tensors have no values, and no memory either.

Whatever the code would hold is counted instead. Integers and masks, which decide where code goes,
are computed as they are. Where code asks for the value of a floating-point number, it is told what
data without a fault give: numbers are finite, limits are kept.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hesskern.planning.operations import count_operations
from hesskern.planning.workspaces import workspace_bytes

__all__ = ["ELSEWHERE", "ROWS", "SAMPLES", "WORKSPACE", "KernelCall", "ShapeRun"]

ROWS = "root rows"
SAMPLES = "stored samples"
WORKSPACE = "workspaces"
# What spill= puts somewhere else: no memory of the device.
ELSEWHERE = "elsewhere"
_ROOT = Path(__file__).resolve().parent.parent
_MODEL = "activations"
# The innermost file of this package that asks for memory says what it is for.
_PURPOSES = (
    ("factors/eigenbases", "eigenvectors"),
    ("operators/decompositions", "eigenvectors"),
    ("factors/input_rows", "inputs"),
    ("factors/batch_sums", ROWS),
    ("factors/corrections", ROWS),
    ("factors/", "factors"),
    ("operators/", SAMPLES),
    ("graph/", ROWS),
    ("passes/forward_pass", _MODEL),
    ("passes/input_capture", _MODEL),
    ("passes/transformers", _MODEL),
    ("passes/capture", ROWS),
    ("passes/losses", ROWS),
    ("passes/roots", ROWS),
    ("passes/", "inputs"),
    ("zoo/", _MODEL),
)
_BESIDE = "other"

aten = torch.ops.aten
# Truth of a comparison where data have no fault: a limit is kept, nothing differs.
_TRUTHS = {
    "isfinite": True,
    "lt": True,
    "le": True,
    "ge": True,
    "eq": True,
    "gt": False,
    "ne": False,
    "isnan": False,
    "isinf": False,
    "zeros_like": False,
}


@dataclass(frozen=True)
class KernelCall:
    """One call of an operator of this package that adds to an accumulator.

    Attributes:
        name: of the operator.
        shape: of the accumulator.
        workspace: bytes that it takes inside.
    """

    name: str
    shape: tuple[int, ...]
    workspace: int


class ShapeRun(TorchDispatchMode):
    """Inside this context tensors that :meth:`shaped` gave go through any code.

    Args:
        device: whose memory is counted.

    Attributes:
        events: bytes that were taken or given back (negative), and what for, one after another.
        operations: floating-point operations by what they were for.
        kernels: calls of this package's accumulating operators.
        held: bytes that are held now.
    """

    def __init__(self, device: torch.device) -> None:
        # torch's own has no types.
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        mode: Any = FakeTensorMode
        self._fake = mode(allow_non_fake_inputs=True)
        self._live: dict[int, tuple[int, str, Any]] = {}
        self._before: list[Any] = []
        self._known: set[int] = set()
        self._truths: Any = WeakIdKeyDictionary()
        self._files: dict[str, str | None] = {}
        self.events: list[tuple[int, str]] = []
        self.operations: dict[str, int] = {}
        self.kernels: list[KernelCall] = []
        self.held = 0

    def shaped(self, tensor: Tensor) -> Tensor:
        """The tensor without values, as something that lies there before the run.

        Args:
            tensor: of any device; one on the meta device is taken for one where memory is counted.
        """
        place = self._device if tensor.is_meta else tensor.device
        with self._fake:
            found = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place
            )
        self.note(found)
        return found

    def note(self, tensor: Tensor) -> None:
        """Does not count the tensor's memory: it was there before."""
        storage = tensor.untyped_storage()
        self._before.append(storage)
        self._known.add(storage._cdata)

    def peak(self, until: int | None = None) -> tuple[int, dict[str, int]]:
        """The most bytes held at a time, and what they were for.

        Args:
            until: so many events are looked at; None: all.
        """
        held = most = place = 0
        for i, (nbytes, purpose) in enumerate(self.events[:until]):
            held += nbytes * (purpose != ELSEWHERE)
            if held > most:
                most, place = held, i + 1
        parts: dict[str, int] = {}
        for nbytes, purpose in self.events[:place]:
            if purpose != ELSEWHERE:
                parts[purpose] = parts.get(purpose, 0) + nbytes
        return most, {purpose: nbytes for purpose, nbytes in parts.items() if nbytes}

    def elsewhere(self) -> int:
        """The most bytes that lie elsewhere at a time."""
        held = most = 0
        for nbytes, purpose in self.events:
            held += nbytes * (purpose == ELSEWHERE)
            most = max(most, held)
        return most

    def put_elsewhere(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the host that takes none of the memory that is counted."""
        # Unseen by the run itself, which would count it.
        with _disable_current_modes(), self._fake:
            found = torch.empty(tuple(shape), dtype=dtype)
        storage = found.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        self._live[key] = nbytes, ELSEWHERE, weakref.ref(storage, self._giver(key))
        self._change(nbytes, ELSEWHERE)
        return found

    def lies_elsewhere(self, tensor: Tensor) -> bool:
        """Whether :meth:`put_elsewhere` gave it."""
        live = self._live.get(tensor.untyped_storage()._cdata)
        return live is not None and live[1] == ELSEWHERE

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shaped = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if shaped:
            return self._on_shapes(func, args, kwargs, shaped)
        if not tensors and _makes_floats(func, args, kwargs):
            with self._fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        self._take(out)
        return out

    def _on_shapes(self, func: Any, args: Any, kwargs: Any, shaped: Sequence[Tensor]) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._scalar(shaped[0])
        if func is aten.equal.default:
            return True
        purpose = self._purpose()
        if func.namespace.startswith("hesskern") and not func._schema.returns:
            self._call(func, args, kwargs, purpose)
            return None
        if func is aten.index.Tensor:
            args = (args[0], _by_numbers(args[1]))
        workspace = workspace_bytes(func, args, kwargs)
        out = func(*args, **kwargs)
        self._note_truth(func, args, out)
        self._count(func, args, kwargs, out, purpose)
        self._take(out, purpose)
        if workspace:
            self._change(workspace, WORKSPACE)
            self._change(-workspace, WORKSPACE)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any, purpose: str) -> None:
        workspace = workspace_bytes(func, args, kwargs)
        # One that takes lists has no shape of its own.
        shape = tuple(args[0].shape) if isinstance(args[0], Tensor) else (len(args[0]),)
        self.kernels.append(KernelCall(func._opname, shape, workspace))
        self._count(func, args, kwargs, None, purpose)
        self._change(workspace, WORKSPACE)
        self._change(-workspace, WORKSPACE)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, purpose: str) -> None:
        operations = count_operations(func, args, kwargs, out)
        if operations:
            self.operations[purpose] = self.operations.get(purpose, 0) + operations

    def _scalar(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return bool(self._truths.get(tensor, True))
        return 1.0 if tensor.is_floating_point() else 1

    def _note_truth(self, func: Any, args: Any, out: Any) -> None:
        if not isinstance(out, FakeTensor) or out.dtype != torch.bool:
            return
        name = func._opname.removesuffix("_")
        # Flags that were computed are what they are; of those in a mask most are data.
        given = [
            bool(self._truths.get(a, True))
            for a in tree_leaves(args)
            if isinstance(a, Tensor) and a.dtype == torch.bool
        ]
        if name == "ne" and args[1:] == (math.inf,):
            # What torch.isfinite asks.
            truth = True
        elif func._opname == "zeros_like" or (name in _TRUTHS and not given):
            truth = _TRUTHS[name]
        elif name in ("bitwise_not", "logical_not"):
            truth = not given[0]
        elif name in ("bitwise_or", "logical_or"):
            truth = any(given)
        elif name == "any" and not given:
            truth = False
        else:
            truth = all(given)
        self._truths[out] = truth

    def _take(self, out: Any, purpose: str | None = None) -> None:
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            if tensor.device.type != self._device.type:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in self._live:
                continue
            nbytes = storage.nbytes()
            purpose = self._purpose() if purpose is None else purpose
            self._live[key] = nbytes, purpose, weakref.ref(storage, self._giver(key))
            self._change(nbytes, purpose)

    def _giver(self, key: int) -> Callable[[Any], None]:
        def give(_: Any) -> None:
            nbytes, purpose, _ref = self._live.pop(key)
            self._change(-nbytes, purpose)

        return give

    def _change(self, nbytes: int, purpose: str) -> None:
        if nbytes:
            self.held += nbytes * (purpose != ELSEWHERE)
            self.events.append((nbytes, purpose))

    def _purpose(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name not in self._files:
                self._files[name] = _purpose_of(name)
            found = self._files[name]
            if found is not None:
                return found
            frame = frame.f_back
        return _BESIDE


def _purpose_of(file: str) -> str | None:
    path = Path(file)
    if _ROOT not in path.parents:
        return None
    name = path.relative_to(_ROOT).as_posix()
    if name.startswith("planning/"):
        return None
    return next((purpose for start, purpose in _PURPOSES if name.startswith(start)), None)


def _makes_floats(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation without tensors makes floating-point numbers, which have no values."""
    if not any("Tensor" in str(given.type) for given in func._schema.returns):
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return bool(dtype.is_floating_point or dtype.is_complex)
    if func._opname in ("randint", "randperm"):
        return False
    if func._opname in ("arange", "full", "scalar_tensor"):
        # As the numbers they are made of.
        return any(isinstance(value, (float, complex)) for value in tree_leaves(args))
    return True


def _by_numbers(indices: Any) -> list[Tensor | None]:
    """Indices with the numbers of what masks select in their place."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
            found.append(index)
        else:
            found += index.nonzero().unbind(1)
    return found
