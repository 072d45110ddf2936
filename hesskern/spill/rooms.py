"""Memory of sums: a device's own, the host's for a GPU, or that of files."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Room", "Spill", "check_place", "on_paper", "paper"]

Spill = Literal["cpu", "disk"]
"""Where tensors go: to pinned memory of the host, or to files."""

# Bytes that are written at a time where the system cannot set room aside.
_ZEROS = 2**20

Make = Callable[[Sequence[int], torch.dtype], Tensor]

_PAPER: ContextVar[Make | None] = ContextVar("_PAPER", default=None)


@contextmanager
def on_paper(make: Make) -> Iterator[None]:
    """Inside, nothing is put anywhere.

    Args:
        make: gives, for its shape and dtype, what stands for a tensor that would lie elsewhere.
    """
    token = _PAPER.set(make)
    try:
        yield
    finally:
        _PAPER.reset(token)


def paper() -> Make | None:
    """What :func:`on_paper` was given; None outside it."""
    return _PAPER.get()


def check_place(spill: Any, device: torch.device, what: str) -> None:
    """Raises ValueError unless the argument ``spill`` is None or a place for a device's tensors.

    Args:
        spill: the argument.
        device: of the model.
        what: goes there, for a message.
    """
    if spill is None:
        return
    if spill not in ("cpu", "disk"):
        raise ValueError(f"spill must be None, 'cpu' or 'disk', got {spill!r}")
    if spill == "cpu" and device.type == "cpu":
        raise ValueError(
            f"spill='cpu' takes {what} from a GPU to the host, where the model is already; "
            "spill='disk' takes them to files"
        )


@dataclass(frozen=True)
class Room:
    """Where tensors get their memory.

    Memory of a file is the system's to write and to read: of what does not fit it keeps what is at
    work. The file has no name, and goes with its tensor, whatever becomes of the process.

    Attributes:
        place: None for the device's own.
        device: of the model.
    """

    place: Spill | None
    device: torch.device

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros.

        Raises:
            OSError: there is no room for a file.
        """
        if self.place is None:
            return torch.zeros(tuple(shape), dtype=dtype, device=self.device)
        make = paper()
        if make is not None:
            return make(shape, dtype)
        if self.place == "cpu":
            # Whatever torch's default device is.
            pinned = self.device.type == "cuda"
            return torch.zeros(tuple(shape), dtype=dtype, device="cpu", pin_memory=pinned)
        return _mapped(shape, dtype)

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy, without a place on the tensor's own device.

        Raises:
            OSError: as :meth:`zeros`.
        """
        return tensor.clone() if self.place is None else self.taken(tensor)

    def taken(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of any device.

        Raises:
            OSError: as :meth:`zeros`.
        """
        if self.place is None:
            return tensor.to(self.device, copy=True)
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        # A mapping of nothing is refused.
        return torch.zeros(tuple(shape), dtype=dtype, device="cpu")
    try:
        descriptor, name = tempfile.mkstemp(prefix="hesskern-spill-")
        try:
            try:
                # Without it a full disk would end the process where it first writes.
                _set_aside(descriptor, nbytes)
                memory = mmap.mmap(descriptor, nbytes)
            finally:
                os.close(descriptor)
        finally:
            # The memory stays. Where a mapped file cannot be removed, it is left to the system.
            with suppress(PermissionError):
                Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"spill: there is no room for a file of {nbytes} bytes in {tempfile.gettempdir()} (set "
            f"TMPDIR to a folder with room): {error}"
        ) from error
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def _set_aside(descriptor: int, nbytes: int) -> None:
    """Has the file system take so many bytes of zeros for an empty file."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    zeros, left = bytes(_ZEROS), nbytes
    while left:
        left -= os.write(descriptor, zeros[: min(left, _ZEROS)])
