"""A device that the CPU plays: what a GPU would refuse or wait for shows without one.

Tensors of the device ``"played"`` hold a CPU tensor, on which every operation runs, so that results
are the CPU's own. What a real device would not do raises: operations on tensors of both devices,
and random numbers from the other one's generator. Counted are the values that the host asks for,
each of which makes it wait, and the operations, each at least one launch.

Made of torch's hooks for backends that are written in Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["NAME", "Counts", "OnDevice", "Waited", "counting", "generators", "played"]

NAME = "played"

# Values, and sizes that depend on values.
_ASKS = frozenset("_local_scalar_dense nonzero masked_select equal unique_dim _unique2".split())
# Torch looks whether they have succeeded.
_LOOKED_AT = frozenset("_linalg_eigh _linalg_svd _linalg_check_errors".split())
# Numbers of the other device are taken, too: they are copied first.
_COPIES = frozenset(("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"))
_ABOUT = frozenset(
    "sym_size sym_stride sym_numel sym_storage_offset size stride numel dim is_contiguous"
    " is_strides_like_format is_non_overlapping_and_dense storage_offset".split()
)
_COUNTED: list[Counts] = []


class Waited(AssertionError):
    """The host would have waited where it may not."""


@dataclass
class Counts:
    """What happened on the device.

    Attributes:
        strict: values may be looked at by copying them to the host alone, and tensors of the host
            go along with nothing; both raise otherwise.
        asked: values that the host asked for and copies to it that it waits for, by operation.
        operations: those that are no views, by name.
        uploads: copies from the host.
    """

    strict: bool = False
    asked: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    uploads: int = 0

    @property
    def reads(self) -> int:
        """How often the host waited."""
        return self.asked.total()

    @property
    def launches(self) -> int:
        """Operations, each at least one launch."""
        return self.operations.total()


@contextmanager
def counting(strict: bool = False) -> Iterator[Counts]:
    """Counts what happens inside; see :class:`Counts`."""
    counts = Counts(strict)
    _COUNTED.append(counts)
    try:
        yield counts
    finally:
        _COUNTED.remove(counts)


def _strict() -> bool:
    return any(counts.strict for counts in _COUNTED)


def _count_look(name: str, copied: bool = False) -> None:
    if _strict() and not copied and name not in _LOOKED_AT:
        raise Waited(name)
    for counts in _COUNTED:
        counts.asked[name] += 1


class OnDevice(Tensor):
    """A tensor on the device, whose values lie in the CPU tensor ``inner``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
            # Asked of the CPU tensor every time: some operations change them in place.
            dispatch_sizes_strides_policy="sizes",
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        copied = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As from a file that is read to the CPU.
        return self.inner.__reduce_ex__(protocol)

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _count_look("tolist")
        return self.inner.tolist()


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, OnDevice)]
    _check_one_device(function, name, tensors, there, kwargs)
    device = kwargs.get("device")
    result_there = bool(there) if device is None else _is_played(device)
    if name == "copy_":
        result_there = isinstance(args[0], OnDevice)
    if there:
        _count_operation(function, name, args, kwargs, result_there)
    if result_there and name in ("copy_", "_to_copy") and len(there) < len(tensors):
        for counts in _COUNTED:
            counts.uploads += 1
    kwargs = tree_map(_inner, kwargs)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    result = function(*tree_map(_inner, args), **kwargs)
    if not result_there or name == "equal":
        return result

    def outward(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # In place: the very tensor that was given.
        given = [t for t in there if t.inner is value]
        return given[0] if given else OnDevice(value)

    return tree_map(outward, result)


def _count_operation(
    function: Any, name: str, args: Any, kwargs: dict[str, Any], result_there: bool
) -> None:
    if name in _ABOUT:
        return
    if name in _ASKS or name in _LOOKED_AT or _selects_by_mask(name, args):
        _count_look(name)
    elif not result_there and not kwargs.get("non_blocking"):
        _count_look(name, copied=True)
    if not function.is_view:
        for counts in _COUNTED:
            counts.operations[name] += 1


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _selects_by_mask(name: str, args: Any) -> bool:
    return name in ("index", "index_put_", "_index_put_impl_") and any(
        i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )


def _check_one_device(
    function: Any, name: str, tensors: list[Tensor], there: list[OnDevice], kwargs: dict[str, Any]
) -> None:
    # Numbers on the host go along with an operation.
    on_host = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    copies = ("copy_", "_to_copy") if _strict() else _COPIES
    if there and on_host and name not in copies:
        shapes = [(t.device.type, list(t.shape)) for t in tensors]
        raise RuntimeError(f"{function} on tensors of two devices: {shapes}")


def _is_played(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class _Generator(torch.Generator):
    """A generator of the device, which draws the CPU's numbers."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, 0)


class _OfEitherDevice(torch.Generator):
    """What ``torch.Generator`` is inside :func:`generators`."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return _Generator() if _is_played(device) else _Plain(device)


_Plain = torch.Generator


class _Calls(TorchFunctionMode):
    """Refuses random numbers of one device from the generator of the other."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            tensors = tree_leaves((args, kwargs))
            there = _is_played(kwargs.get("device")) or any(
                isinstance(t, OnDevice) for t in tensors
            )
            if isinstance(generator, _Generator) != there:
                wanted = NAME if there else "the CPU"
                raise RuntimeError(f"{function.__name__} on {wanted}, its generator is not")
        if function in (torch.eye, torch.tensor, torch.as_tensor) and _is_played(
            kwargs.get("device")
        ):
            # These fill a tensor in a way that no operation here sees.
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


@contextmanager
def generators() -> Iterator[None]:
    """Inside, ``torch.Generator`` makes generators of the device, which fit no other."""
    torch.Generator = _OfEitherDevice  # type: ignore[misc]
    try:
        with _Calls():
            yield
    finally:
        torch.Generator = _Plain  # type: ignore[misc]


class _Backend(backend_registration._DummyBackendModule):  # type: ignore[name-defined, misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        pass


@cache
def played() -> torch.device:
    """The device, made when it is first asked for."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    # It lives as long as the process.
    _KEPT.append(library)
    return torch.device(NAME, 0)


_KEPT: list[Any] = []


# Autograd counts devices once, when it is first used.
played()
