"""A layer's samples outside its device's memory, read piece by piece at every product."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hesskern.devices import sent
from hesskern.operators.samples import SampleRows, join

__all__ = ["Spill", "SpilledSamples", "check_spill", "keep_few_waiting"]

Spill = Literal["cpu", "disk"]
"""Where samples go: to pinned memory of the host, or to files."""

# Pieces are put together up to so many bytes before they go.
_TOGETHER = 2**25


def check_spill(spill: Any, device: torch.device, tolerance: float, checkpoint: Any) -> None:
    """Raises ValueError where samples cannot be put there, or not with the other arguments."""
    if spill is None:
        return
    if spill not in ("cpu", "disk"):
        raise ValueError(f"spill must be None, 'cpu' or 'disk', got {spill!r}")
    if spill == "cpu" and device.type == "cpu":
        raise ValueError(
            "spill='cpu' takes samples from a GPU to the host, where the model is already; "
            "spill='disk' takes them to files"
        )
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
        self._pieces: list[SampleRows | Path] = []
        self._folder: Path | None = None
        if place == "disk":
            self._folder = Path(tempfile.mkdtemp(prefix="hesskern-spill-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self()),)

    def add(self, piece: SampleRows) -> None:
        """Takes a piece.

        Raises:
            OSError: it cannot be written.
        """
        self._waiting.append(piece)
        self._bytes += piece.nbytes
        if self._bytes >= _TOGETHER:
            self.finish()

    @property
    def waiting(self) -> int:
        """Bytes that have not gone yet."""
        return self._bytes

    def finish(self) -> None:
        """Lets go of what has not gone yet."""
        together, self._waiting, self._bytes = self._waiting, [], 0
        for piece in join(together, _TOGETHER):
            if self._folder is None:
                self._pieces.append(_pinned(piece))
            else:
                self._pieces.append(self._written(piece, self._folder))

    def _written(self, piece: SampleRows, folder: Path) -> Path:
        path = folder / f"{len(self._pieces)}.safetensors"
        tensors = {"x": piece.x.cpu().contiguous(), "s": piece.s.cpu().contiguous()}
        try:
            save_file(tensors, path, metadata={"stored": str(int(piece.stored))})
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"spill: samples cannot be written to {folder} (set TMPDIR to a folder with room): "
                f"{error}"
            ) from error
        return path

    def __call__(self) -> Generator[SampleRows, None, None]:
        """The pieces, one or two of them on the device at a time."""
        if self._device.type == "cuda":
            yield from self._streamed()
        elif self._device.type == "cpu":
            yield from self._on_host()
        else:
            yield from (_moved(piece, self._device) for piece in self._on_host())

    def _on_host(self) -> Iterator[SampleRows]:
        for piece, following in zip(self._pieces, [*self._pieces[1:], None], strict=True):
            if isinstance(following, Path):
                _read_ahead(following)
            yield _mapped_file(piece) if isinstance(piece, Path) else piece

    def _streamed(self) -> Iterator[SampleRows]:
        """Pieces copied to the device beside the work on those before."""
        beside = torch.cuda.Stream(self._device)
        ready: list[tuple[SampleRows, torch.cuda.Event]] = []
        for piece in self._on_host():
            with torch.cuda.stream(beside):
                ready.append((_moved(piece, self._device), beside.record_event()))
            if len(ready) > 1:
                yield self._awaited(*ready.pop(0))
        while ready:
            yield self._awaited(*ready.pop(0))

    def _awaited(self, piece: SampleRows, event: torch.cuda.Event) -> SampleRows:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in (piece.x, piece.s):
            # Its memory is not the other stream's again before this one's work is done.
            tensor.record_stream(current)
        return piece


def keep_few_waiting(layers: Sequence[SpilledSamples], budget: int) -> None:
    """Has the fullest let go until all together hold what one may, or a quarter of a budget."""
    while layers and sum(layer.waiting for layer in layers) > max(_TOGETHER, budget // 4):
        max(layers, key=lambda layer: layer.waiting).finish()


def _moved(piece: SampleRows, device: torch.device) -> SampleRows:
    """The piece on a device."""
    return SampleRows(sent(piece.x, device), sent(piece.s, device), piece.stored)


def _pinned(piece: SampleRows) -> SampleRows:
    """The piece in memory of the host that copies need not wait for."""
    moved = []
    for tensor in (piece.x, piece.s):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        moved.append(host.copy_(tensor))
    return SampleRows(moved[0], moved[1], piece.stored)


def _mapped_file(path: Path) -> SampleRows:
    """A piece whose memory is the file's."""
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("stored") == "1"
        return SampleRows(file.get_tensor("x"), file.get_tensor("s"), stored)


def _read_ahead(path: Path) -> None:
    """Asks the system to read a file that is wanted next; where it does not, the time is lost."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    file = os.open(path, os.O_RDONLY)
    try:
        advise(file, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)
