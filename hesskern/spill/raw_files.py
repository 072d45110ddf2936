"""Tensors in files of this process alone: their bytes one behind the other, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["RawFile", "aligned_memory", "own_folder", "write_raw"]

# Bytes that a tensor begins at a multiple of in its file, as an allocator would align it.
_ALIGNED = 64
# Bytes that memory begins at a multiple of, and is read in multiples of, past the system's cache.
_PAGE = 4096
# Bytes that are read at a time: a reader that is to stop has no more to wait for.
_STEP = 2**22
# A file system, or memory, that cannot be read past the cache.
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT)


def own_folder(keeper: Any) -> Path:
    """A new folder below the system's for temporary files ($TMPDIR), which goes with an object.

    Args:
        keeper: the object. A copy of it in a forked process leaves the folder alone.

    Raises:
        OSError: there is no such place, or no room.
    """
    folder = Path(tempfile.mkdtemp(prefix="hesskern-spill-"))
    weakref.finalize(keeper, _remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def aligned_memory(nbytes: int, pinned: bool = False) -> Tensor:
    """[nbytes] uint8, at least, that files can be read into past the system's cache.

    Args:
        nbytes: of the largest file.
        pinned: whether a GPU copies from it.
    """
    size = -(-nbytes // _PAGE) * _PAGE
    # Whatever torch's default device is.
    memory = torch.empty(size + _PAGE, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    begin = -memory.data_ptr() % _PAGE
    return memory[begin : begin + size]


@dataclass(frozen=True)
class RawFile:
    """Where tensors lie in a file.

    Attributes:
        path: of the file.
        shapes, dtypes: of the tensors.
    """

    path: Path
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of every tensor, in bytes."""
        found, end = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            begin = -(-end // _ALIGNED) * _ALIGNED
            end = begin + shape.numel() * dtype.itemsize
            found.append((begin, end))
        return found

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.spans[-1][1]

    def tensors(self, memory: Tensor) -> list[Tensor]:
        """The tensors in memory [>= nbytes] uint8 that holds what the file does."""
        return [
            memory[begin:end].view(dtype).view(shape)
            for (begin, end), shape, dtype in zip(self.spans, self.shapes, self.dtypes, strict=True)
        ]

    def read(self, memory: Tensor) -> list[Tensor]:
        """The tensors in memory that :func:`aligned_memory` gave, read now.

        Raises:
            OSError: the file cannot be read, or is shorter than it was.
        """
        nbytes = self.nbytes
        view: memoryview = memory.numpy().data
        try:
            with _Source(self.path) as source:
                done = 0
                while done < nbytes:
                    end = min(done + _STEP, -(-nbytes // _PAGE) * _PAGE)
                    got = source.read(view[done:end], done)
                    if got == 0:
                        self._check_size(done)
                    done += got
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return self.tensors(memory)

    def _check_size(self, found: int) -> None:
        if found < self.nbytes:
            raise OSError(f"it holds {found} bytes of {self.nbytes}")

    def _unreadable(self, error: Exception) -> OSError:
        return OSError(f"spill: {self.path} cannot be read: {error}")


class _Source:
    """A file that is read past the system's cache, or through it where it cannot be.

    What is read at every product is more than memory holds: the cache would let go of all of it
    before it is wanted again, and filling it takes processors' time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            # Some file systems have no such way.
            if error.errno not in _NOT_DIRECT:
                raise
            self._file = os.open(path, os.O_RDONLY)

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)

    def read(self, into: memoryview, begin: int) -> int:
        """Bytes that were read; 0 behind the file's end."""
        try:
            return self._read(into, begin)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
        # Nor do some between two pages, or into some memory.
        os.close(self._file)
        self._file = os.open(self._path, os.O_RDONLY)
        return self._read(into, begin)

    def _read(self, into: memoryview, begin: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file, [into], begin)
        os.lseek(self._file, begin, os.SEEK_SET)
        found = os.read(self._file, len(into))
        into[: len(found)] = found
        return len(found)


def write_raw(path: Path, tensors: Sequence[Tensor], what: str) -> RawFile:
    """Writes tensors, of any device and layout, in place of what the file held.

    Args:
        path: of the file.
        tensors: one or more.
        what: they are, for a message.

    Raises:
        OSError: they cannot be written; no file is left.
    """
    file = RawFile(path, tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors))
    try:
        with path.open("wb") as out:
            for tensor, (begin, _) in zip(tensors, file.spans, strict=True):
                out.write(bytes(begin - out.tell()))
                plain = tensor.detach().cpu().contiguous()
                out.write(plain.reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"spill: {what} cannot be written to {path.parent} (set TMPDIR to a folder with room): "
            f"{error}"
        ) from error
    return file
