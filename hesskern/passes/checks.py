"""Conditions on the data of a pass, looked at without making the host wait for a device.

A condition is a flag. On the CPU it is looked at as it is made. On a device, looking at it would
wait for everything queued there, so flags are copied to the host batch by batch beside the work;
what is accumulated meanwhile is masked by them on the device, and the host looks at what has
arrived, at the latest at the end of the pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesskern.devices import HostCopy, on_host
from hesskern.ops.foreach import are_finite

__all__ = ["Checks", "as_weights", "check_dense"]


def check_dense(tensor: Tensor, what: str) -> None:
    """Raises TypeError for a sparse tensor, which the message calls ``what``.

    Nothing but dense (strided) memory goes through the model, the losses and the kernels here.
    """
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{what} must be dense, got a tensor {list(tensor.shape)} of layout {tensor.layout}; "
            "pass its .to_dense()"
        )


def as_weights(given: Any) -> Any:
    """Weights that were given by name: whole numbers and masks count as weights, too.

    In the data itself they count as something else;
    :func:`hesskern.passes.roots.sample_weights` refuses them there.
    """
    if isinstance(given, Tensor) and not (given.is_floating_point() or given.is_complex()):
        return given.double()
    return given


def _made(detail: Tensor | Callable[[], Tensor]) -> Tensor:
    return detail if isinstance(detail, Tensor) else detail()


def _whole(tensor: Tensor) -> Tensor:
    """[1] of a tensor of one element; a view that changes nothing is an operation, too."""
    return tensor if tensor.dim() == 1 else tensor.reshape(1)


@dataclass
class _Condition:
    """How an error speaks of a flag, and how many values its message takes.

    Attributes:
        place: of two errors of a batch the one with the lower place counts.
    """

    message: Callable[..., str]
    error: type[Exception]
    details: int
    place: int = 0


@dataclass
class _Pending:
    """A batch's flags and details on their way to the host, one float64 vector.

    Attributes:
        values: flags (1 or 0), then the details of each condition in turn.
        mark: what the caller wants to find again should the batch turn out bad.
    """

    values: HostCopy
    conditions: list[_Condition]
    mark: Any

    def raise_if_bad(self) -> None:
        values = self.values.awaited().tolist()
        details = values[len(self.conditions) :]
        bad: dict[int, Exception] = {}
        for good, condition in zip(values, self.conditions, strict=False):
            if not good:
                message = condition.message(*details[: condition.details])
                bad[condition.place] = condition.error(message)
            del details[: condition.details]
        if bad:
            raise bad[min(bad)]


@dataclass
class Checks:
    """The conditions of one pass, batch after batch.

    As a context it settles when the pass ends, also by an error: of two the earlier batch's counts,
    which may be found last.

    Attributes:
        alive: 0-dim bool on the device, whether all closed batches are good; None while everything
            was looked at on the host.
        failed: mark of the batch that :meth:`poll` or :meth:`settle` raised for; None before.
    """

    alive: Tensor | None = None
    failed: Any = None
    _flags: list[Tensor] = field(default_factory=list)
    _details: list[Tensor] = field(default_factory=list)
    _conditions: list[_Condition] = field(default_factory=list)
    _unseen: list[tuple[Tensor, _Condition]] = field(default_factory=list)
    _places: int = 0
    _pending: deque[_Pending] = field(default_factory=deque)

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or issubclass(kind, Exception):
            self.settle()

    def require(
        self,
        good: Tensor,
        message: Callable[..., str],
        *details: Tensor | Callable[[], Tensor],
        error: type[Exception] = ValueError,
    ) -> bool:
        """Adds a condition to the current batch.

        Args:
            good: bool of one element.
            message: of the error, called with the details as floats.
            details: what the message tells, each of one element, or how to make it where it is
                needed: in an error on the host, at once on a device.
            error: what to raise.

        Returns:
            whether the flag was looked at; False on a device.

        Raises:
            the error, where the flag lies on the host and is False.
        """
        if on_host(good):
            if not bool(good):
                raise error(message(*(float(_made(detail)) for detail in details)))
            return True
        self._flags.append(_whole(good))
        self._details.extend(_whole(_made(detail)) for detail in details)
        self._conditions.append(_Condition(message, error, len(details), self.place()))
        return False

    @property
    def conditions(self) -> int:
        """How many conditions of the current batch a device has yet to tell of."""
        return len(self._conditions)

    def place(self) -> int:
        """A place for a condition of which more is known later, before those still to come."""
        self._places += 1
        return self._places

    def require_finite(
        self, tensor: Tensor, message: Callable[[], str], place: int | None = None
    ) -> None:
        """Adds the condition that a tensor on a device holds no NaN or Inf.

        All such tensors are looked at together, when the batch is closed or :meth:`gather` is
        called; until then they must keep their values.

        Args:
            tensor: any shape; an empty one holds none.
            message: of the error.
            place: of the condition, from :meth:`place`; None: behind those before.
        """
        if tensor.numel():
            place = self.place() if place is None else place
            self._unseen.append((tensor, _Condition(message, ValueError, 0, place)))

    def gather(self) -> None:
        """Looks, on the device, at the tensors that are to be finite, and lets go of them."""
        if not self._unseen:
            return
        with torch.no_grad():
            flags, order = are_finite([tensor for tensor, _ in self._unseen])
        self._flags += flags
        self._conditions += [self._unseen[i][1] for i in order]
        self._unseen = []

    def close(self, mark: Any = None) -> Tensor | None:
        """Ends the current batch.

        Args:
            mark: see :attr:`failed`.

        Returns:
            :attr:`alive`: what the batch adds counts only where that is True.

        Raises:
            as :meth:`poll`.
        """
        self.gather()
        if self._flags:
            # Layers, targets and weights may lie on several devices.
            device = self._flags[0].device
            good = torch.cat([flag.to(device, non_blocking=True) for flag in self._flags])
            details = [d.to(device, non_blocking=True) for d in self._details]
            alive = good.all()
            self.alive = alive if self.alive is None else self.alive & alive
            values = torch.cat([good.double(), *details]) if details else good.double()
            self._pending.append(_Pending(HostCopy(values), self._conditions, mark))
        self.drop()
        self.poll()
        return self.alive

    def drop(self) -> None:
        """Forgets the current batch, of which nothing is kept."""
        self._flags, self._details, self._conditions = [], [], []
        self._unseen = []
        self._places = 0

    def poll(self) -> None:
        """Looks at the batches whose flags have arrived.

        Raises:
            the first error among them.
        """
        while self._pending and self._pending[0].values.arrived:
            self._look()

    def settle(self) -> None:
        """Waits for the flags of all closed batches and looks at them.

        Raises:
            the first error among them.
        """
        while self._pending:
            self._look()
        self.alive = None

    def _look(self) -> None:
        pending = self._pending.popleft()
        try:
            pending.raise_if_bad()
        except Exception:
            self.failed = pending.mark
            # Whatever came later is masked: there is nothing to learn from it.
            self._pending.clear()
            raise
