"""A device that the CPU plays: its values are out of reach, its operators and reads are counted.

Tensors on it say that they are on "meta", where torch computes nothing, and hold one of the CPU, on
which every operator is run. What mixes the two, or looks at a value other than by copying it to the
host, is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

# They launch nothing: another view of the same memory.
_VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "expand", "permute", "reshape", "select", "slice",
    "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
# They are values, or their results' sizes depend on values.
_LOOKS = {"_local_scalar_dense", "equal", "masked_select", "nonzero"}
# Torch looks whether they have succeeded.
_LOOKED_AT = {"_linalg_eigh", "_linalg_svd", "_linalg_check_errors"}


class Waited(AssertionError):
    """The host would have waited."""


class OnDevice(Tensor):
    """A tensor of the played device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{function} outside of played_device()")


class Played(TorchDispatchMode):
    """Runs operators of the device, and counts.

    Attributes:
        operators: by name, those that launch something.
        reads: copies to the host, and decompositions.
        uploads: copies from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.reads = 0
        self.uploads = 0

    @property
    def launches(self) -> int:
        return sum(self.operators.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        given = tree_flatten((args, kwargs))[0]
        played = [x for x in given if isinstance(x, OnDevice)]
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        if not played and not made_there:
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            return self._copy(function, name, args, kwargs)
        if name in _LOOKS:
            raise Waited(name)
        self.reads += name in _LOOKED_AT
        if name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise Waited(name)
        if any(x.is_meta for x in given if isinstance(x, Tensor) and not isinstance(x, OnDevice)):
            raise AssertionError(f"{name}: torch copied a tensor of the host on its own")
        plain = [x for x in given if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
        if any(x.dim() for x in plain):
            raise AssertionError(f"{name} of tensors on two devices")
        if name not in _VIEWS:
            self.operators[name] += 1
        if made_there:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        result = function(*inner_args, **inner_kwargs)
        return tree_map(lambda x: _outer(x, played), result)

    def _copy(self, function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "copy_":
            target, source = args[:2]
            if not isinstance(target, OnDevice):
                raise Waited("copy_ to the host")
            self._upload(source)
            function(target.inner, _inner(source), *args[2:])
            return target
        source = args[0]
        target = kwargs.pop("device", None) or source.device
        kwargs.pop("non_blocking", None)
        result = function(_inner(source), **kwargs)
        if torch.device(target) == DEVICE:
            self._upload(source)
            return OnDevice(result)
        self.reads += 1
        return result

    def _upload(self, source: Tensor) -> None:
        if isinstance(source, OnDevice):
            self.operators["copy"] += 1
        else:
            self.uploads += 1


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _outer(x: Any, played: list[OnDevice]) -> Any:
    if not isinstance(x, Tensor):
        return x
    # What is written in place or to out= stays the tensor that it was.
    for known in played:
        if known.inner is x:
            return known
    return OnDevice(x)


@contextmanager
def played_device() -> Iterator[Played]:
    """Makes tensors of :class:`OnDevice` usable, and counts what is done with them."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), Played() as mode:
        patch.setattr("hesskern.device_subspace._generator", lambda device: torch.Generator())
        yield mode
