"""Operation by operation, whether weights are read by anything but their own module's forward()."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from hesskern.passes.layers import own_parameters, weight_of

__all__ = ["WeightWatch"]

# Rows of a tied embedding are looked up, which is no product with its weight.
_LOOKED_UP = ("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")


class _Memory(NamedTuple):
    """Where a tensor's entries lie: its storage's address, and its own first and last byte's."""

    storage: int
    begin: int
    end: int


class WeightWatch(TorchDispatchMode):
    """What is around a run of a model notes who reads its weights.

    An operation counts if one of its arguments shares memory with the weight; views alone do not,
    nor do look-ups in an embedding. Weights that are computed from other parameters are not told
    apart from any other value.

    Args:
        modules: of the model, by name.
        names: of the layers.

    Attributes:
        elsewhere: layers whose weight was read outside their own module's forward(), with the name
            of the operation.
    """

    def __init__(self, modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elsewhere: dict[str, str] = {}
        # By storage: weights may be pieces of one, as nn.utils.vector_to_parameters makes them.
        self._owners: dict[int, list[tuple[_Memory, str, nn.Module]]] = {}
        self._running: list[nn.Module] = []
        self._handles: list[Any] = []
        self._counts: dict[Any, bool] = {}
        for name in names:
            module, attribute = weight_of(modules, name)
            memory = _memory(own_parameters(module).get(attribute))
            if memory is not None:
                self._owners.setdefault(memory.storage, []).append((memory, name, module))

    def __enter__(self) -> WeightWatch:
        holders = {id(m): m for owners in self._owners.values() for _, _, m in owners}
        for module in holders.values():
            self._handles += [
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(self._end, always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles, self._running = [], []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operations are not looked at, and cost what they cost without the watch."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        with _pop_mode_temporarily():
            yield

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        if module in self._running:
            self._running.remove(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counts = self._counts.get(func)
        if counts is None:
            looks_up = func._schema.name.split("::")[-1] in _LOOKED_UP
            counts = self._counts[func] = not (func.is_view or looks_up)
        if counts:
            for tensor in _tensors((*args, *kwargs.values())):
                owners = self._owners_of(tensor)
                if owners and not any(module in self._running for module in owners.values()):
                    for name in owners:
                        self.elsewhere.setdefault(name, str(func).removesuffix(".default"))
        return func(*args, **kwargs)

    def _owners_of(self, tensor: Tensor) -> dict[str, nn.Module]:
        """The layers, with their modules, whose weights have entries in common with a tensor."""
        storage = _storage(tensor)
        memory = _memory(tensor) if storage in self._owners else None
        if memory is None:
            return {}
        return {
            name: module
            for own, name, module in self._owners[memory.storage]
            if own.begin <= memory.end and memory.begin <= own.end
        }


def _memory(tensor: Tensor | None) -> _Memory | None:
    """Where a tensor's entries lie; None where that cannot be told, or it has none."""
    storage = None if tensor is None or not tensor.numel() else _storage(tensor)
    if tensor is None or not storage:
        return None
    try:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    except (NotImplementedError, RuntimeError):
        return None
    size = tensor.element_size()
    begin = storage + int(tensor.storage_offset()) * size
    return _Memory(storage, begin, begin + (int(last) + 1) * size - 1)


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; None where that cannot be told."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        # Tensors of other packages, and sparse ones.
        return None


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
