"""Pickling and deep copies of objects that hold what a user gave: a model, data, a loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["ModelRun", "Portable"]


class Portable:
    """Base of objects that can be pickled and copied as far as what they were given can be.

    Subclasses name these parts in :meth:`_given`; all else they hold is the package's own.
    """

    def _given(self) -> Mapping[str, Any]:
        """The user's parts by the names of their arguments."""
        raise NotImplementedError

    def _about(self) -> str:
        """What this is, and why it needs these parts, for messages."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """What a copy takes over."""
        return dict(self.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        for name, part in self._given().items():
            try:
                _Rehearsal(_Nowhere()).dump(part)
            except Exception as error:  # a part's own code may raise anything
                raise pickle.PicklingError(self._refused(name, part, "pickled", error)) from error
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for name, part in self._given().items():
            try:
                copy.deepcopy(part, memo)
            except Exception as error:  # a part's own code may raise anything
                raise TypeError(self._refused(name, part, "copied", error)) from error
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        # The parts are taken from the memo.
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        return copied

    def _refused(self, name: str, part: Any, what: str, error: Exception) -> str:
        return (
            f"{self._about()} cannot be {what}: its {name}, a {type(part).__name__}, cannot "
            f"({type(error).__name__}: {error})"
        )


class ModelRun(Portable):
    """Base of what runs a model again and must notice that its weights are no longer the same.

    Attributes:
        model: whose tensors :meth:`remember` looks at.
        data, loss: what it runs with.
    """

    model: nn.Module

    data: Any
    loss: Any

    def _given(self) -> dict[str, Any]:
        return {"model": self.model, "data": self.data, "loss": self.loss}

    def remember(self) -> None:
        """From now on, a change of the model's tensors is one."""
        self._versions: list[Any] | None = self._current()

    def ran(self) -> None:
        """Behind a run of its own: buffers that the model wrote meanwhile are no change.

        InstanceNorm writes its running statistics back in eval mode, too, up to torch 2.10.
        """
        now, own = self._current(), len(list(self.model.parameters()))
        if self._versions is not None and self._versions[:own] == now[:own]:
            self._versions = now

    @property
    def changed(self) -> bool:
        """Whether the model was changed since :meth:`remember`, or before this was copied."""
        return self._versions != self._current()

    def _current(self) -> list[Any]:
        """By parameter, then by buffer, what changes with the tensor."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]

    def _state(self) -> dict[str, Any]:
        # A copy's tensors lie elsewhere and count their versions anew.
        return {**super()._state(), "_versions": None, "_changed": self.changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_changed = state.pop("_changed")
        super().__setstate__(state)
        if not was_changed:
            self.remember()


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)


class _Rehearsal(pickle.Pickler):
    """Pickles everything but the arrays, which always can be: it costs next to nothing."""

    def persistent_id(self, obj: Any) -> str | None:
        # Subclasses, such as parameters, may hold more than their numbers.
        return "array" if type(obj) in (Tensor, nn.Parameter, np.ndarray) else None
