"""Files read by a thread of its own, some ahead of whoever computes with what they hold."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from torch import Tensor

from hesskern.spill.raw_files import RawFile, aligned_memory

__all__ = ["RING", "read_ahead", "ring_bytes"]

# Memory of so many files: of the one that is computed with, of one that is ready, of one on its
# way. With two the reader waits where a file takes longer than usual.
RING = 3


def ring_bytes(files: Sequence[RawFile]) -> int:
    """Bytes that :func:`read_ahead` holds."""
    return min(RING, len(files)) * max((file.nbytes for file in files), default=0)


def read_ahead(
    files: Sequence[RawFile], pinned: bool = False
) -> Generator[list[Tensor], None, None]:
    """The tensors of file after file, each valid until the next is asked for.

    Args:
        files: in their order.
        pinned: whether a GPU copies from the tensors.

    Raises:
        OSError: a file cannot be read; those before it have come.
    """
    count = min(RING, len(files))
    largest = max((file.nbytes for file in files), default=0)
    free: SimpleQueue[Tensor | None] = SimpleQueue()
    ready: SimpleQueue[tuple[Tensor, list[Tensor]] | BaseException] = SimpleQueue()
    for _ in range(count):
        free.put(aligned_memory(largest, pinned))
    # The thread knows nothing else of whoever asked: it keeps nobody alive.
    thread = threading.Thread(
        target=_read, args=(files, free, ready), name="hesskern-read-ahead", daemon=True
    )
    try:
        thread.start()
        for _ in files:
            found = ready.get()
            if isinstance(found, BaseException):
                raise found
            memory, tensors = found
            yield tensors
            del tensors, found
            free.put(memory)
    finally:
        # Whatever it is at, behind that it ends.
        with suppress(Empty):
            while True:
                free.get_nowait()
        free.put(None)
        # It is not where Ctrl-C came while it was being started.
        if thread.is_alive():
            thread.join()


def _read(
    files: Sequence[RawFile],
    free: SimpleQueue[Tensor | None],
    ready: SimpleQueue[tuple[Tensor, list[Tensor]] | BaseException],
) -> None:
    try:
        for file in files:
            memory = free.get()
            if memory is None:
                return
            ready.put((memory, file.read(memory)))
            del memory
    # Whoever waits is told, whatever it is.
    except BaseException as error:
        ready.put(error)
