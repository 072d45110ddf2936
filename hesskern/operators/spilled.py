"""A layer's samples outside its device's memory, read piece by piece at every product."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesskern.devices import sent
from hesskern.operators.samples import SampleRows, join
from hesskern.spill.raw_files import RawFile, own_folder, write_raw
from hesskern.spill.read_ahead import RING, read_ahead
from hesskern.spill.rooms import Spill, check_place, paper

__all__ = [
    "SpilledSamples",
    "check_spill",
    "keep_few_waiting",
    "piece_bytes",
    "read_ahead_bytes",
    "waiting_bytes",
]

# Bytes that wait, of all layers together, before they go.
_WAITING = 2**25
# Bytes of a piece: what is read ahead is a few of them, in the host's memory. With smaller ones
# the threads of a product wait for one another, and for the reader, more often.
_PIECE = 2**25


def check_spill(spill: Any, device: torch.device, tolerance: float, checkpoint: Any) -> None:
    """Raises ValueError where samples cannot be put there, or not with the other arguments."""
    if spill is None:
        return
    check_place(spill, device, "samples")
    if tolerance > 0:
        raise ValueError(f"spill must be None where samples are left out: tolerance={tolerance}")
    if checkpoint is not None:
        raise ValueError("spill must be None where there is a checkpoint")


class SpilledSamples:
    """Takes pieces, and gives them back as often as it is called.

    Files lie in a folder of their own below the system's for temporary ones ($TMPDIR), and go with
    this object. A pickle of it is the list of pieces.

    Args:
        place: "cpu" or "disk".
        device: that the pieces come from and are wanted on.
    """

    def __init__(self, place: Spill, device: torch.device) -> None:
        self._device = device
        self._waiting: list[SampleRows] = []
        self._bytes = 0
        self._pinned: list[SampleRows] = []
        self._files: list[RawFile] = []
        # Whether the rows of a file are stored themselves.
        self._stored: list[bool] = []
        self._on_paper: list[Tensor] = []
        files = place == "disk" and paper() is None
        self._folder: Path | None = own_folder(self) if files else None

    def __reduce__(self) -> tuple[Any, ...]:
        return list, ([piece.alone() for piece in self()],)

    def add(self, piece: SampleRows) -> None:
        """Takes a piece.

        Raises:
            OSError: it cannot be written.
        """
        self._waiting.append(piece)
        self._bytes += piece.nbytes
        if self._bytes >= _WAITING:
            self.finish()

    @property
    def waiting(self) -> int:
        """Bytes that have not gone yet."""
        return self._bytes

    def finish(self) -> None:
        """Lets go of what has not gone yet."""
        together, self._waiting, self._bytes = self._waiting, [], 0
        for joined in join(together, _PIECE):
            for piece in _cut(joined, _PIECE):
                make = paper()
                if make is not None:
                    self._on_paper.append(make([piece.nbytes], torch.uint8))
                elif self._folder is None:
                    self._pinned.append(_pinned(piece))
                else:
                    path = self._folder / f"{len(self._files)}.samples"
                    self._files.append(write_raw(path, [piece.x, piece.s], "samples"))
                    self._stored.append(piece.stored)

    def __call__(self) -> Generator[SampleRows, None, None]:
        """The pieces, one or two of them on the device at a time; each until the next one comes."""
        if self._device.type == "cuda":
            yield from self._streamed()
        elif self._device.type == "cpu":
            yield from self._on_host()
        else:
            for piece in self._on_host():
                # Memory that is read into again must not be on its way still.
                yield SampleRows(piece.x.to(self._device), piece.s.to(self._device), piece.stored)

    def _on_host(self) -> Generator[SampleRows, None, None]:
        if self._folder is None:
            yield from self._pinned
            return
        with closing(read_ahead(self._files, self._device.type == "cuda")) as read:
            for (x, s), stored in zip(read, self._stored, strict=True):
                yield SampleRows(x, s, stored)

    def _streamed(self) -> Iterator[SampleRows]:
        """Pieces copied to the device beside the work on those before."""
        beside = torch.cuda.Stream(self._device)
        before: tuple[SampleRows, torch.cuda.Event] | None = None
        for piece in self._on_host():
            with torch.cuda.stream(beside):
                copied = _moved(piece, self._device), beside.record_event()
            if before is not None:
                yield self._awaited(*before)
            if self._folder is not None:
                # The memory that it was copied from is read into again.
                copied[1].synchronize()
            before = copied
        if before is not None:
            yield self._awaited(*before)

    def _awaited(self, piece: SampleRows, event: torch.cuda.Event) -> SampleRows:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in (piece.x, piece.s):
            # Its memory is not the other stream's again before this one's work is done.
            tensor.record_stream(current)
        return piece


def piece_bytes() -> int:
    """Bytes of samples that are put together, and lie in a file."""
    return _PIECE


def waiting_bytes(budget: int, layers: int) -> int:
    """Bytes of so many layers that may wait beside a budget: what one may, or a quarter of it."""
    return min(max(_WAITING, budget // 4), layers * _WAITING)


def keep_few_waiting(layers: Sequence[SpilledSamples], budget: int) -> None:
    """Has the fullest let go until all together hold what may wait."""
    while layers and sum(layer.waiting for layer in layers) > waiting_bytes(budget, len(layers)):
        max(layers, key=lambda layer: layer.waiting).finish()


def read_ahead_bytes() -> int:
    """Bytes of the host's memory that a product reads a layer's files into, at most.

    A sample that is larger than a piece takes more.
    """
    return RING * _PIECE


def _moved(piece: SampleRows, device: torch.device) -> SampleRows:
    """The piece on a device."""
    return SampleRows(sent(piece.x, device), sent(piece.s, device), piece.stored)


def _pinned(piece: SampleRows) -> SampleRows:
    """The piece in memory of the host that copies need not wait for."""
    moved = []
    for tensor in (piece.x, piece.s):
        # Whatever torch's default device is.
        given: dict[str, Any] = {"device": "cpu", "pin_memory": tensor.is_cuda}
        moved.append(torch.empty(tensor.shape, dtype=tensor.dtype, **given).copy_(tensor))
    return SampleRows(moved[0], moved[1], piece.stored)


def _cut(piece: SampleRows, limit: int) -> Iterator[SampleRows]:
    """A piece in parts of so many bytes, or of one sample."""
    step = max(1, limit * len(piece.x) // max(1, piece.nbytes))
    for begin in range(0, len(piece.x), step):
        part = slice(begin, begin + step)
        yield SampleRows(piece.x[part], piece.s[part], piece.stored)
