"""Inputs of stored samples in the form a GPU multiplies, kept from one product to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesskern import ops
from hesskern.passes.memory import has_room

__all__ = ["PackedInputs"]


class _Entry:
    """One tensor of inputs.

    Attributes:
        x: the inputs, held so that no other tensor takes their identity.
        version: of x when they were packed.
        columns: the widest product they were packed for; 0: not tried yet.
        packed: what became of that, or None.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, _version(x)
        self.columns = 0
        self.packed: Tensor | None = None

    def is_of(self, x: Tensor) -> bool:
        return self.x is x and self.version == _version(x)


class PackedInputs:
    """What :func:`hesskern.ops.pack_layer_inputs` makes of the inputs of one operator's samples.

    Made at the second product with them: an operator that multiplies once would keep it for
    nothing. Left out where a device has no memory to spare. Copies and pickles begin anew.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedInputs, ()

    def of(self, x: Tensor, columns: int) -> Tensor | None:
        """For a product with x, what its argument ``packed`` is to be.

        Args:
            x: [N, d] or [N, d, t]; the same tensor in every product.
            columns: k m of V [k, m, d].
        """
        entry = self._entries.get(id(x))
        if entry is None or not entry.is_of(x):
            self._entries[id(x)] = _Entry(x)
            return None
        nothing_yet = entry.packed is None or entry.packed.numel() == 0
        if nothing_yet and columns > entry.columns and not _is_captured(x):
            entry.columns, entry.packed = columns, _pack(x, columns)
        return entry.packed


def _pack(x: Tensor, columns: int) -> Tensor | None:
    """The packed inputs, which take the memory of x once more; None where it does not suffice."""
    if not has_room(x.nbytes, x.device):
        return None
    try:
        packed = ops.pack_layer_inputs(x, columns)
    except torch.OutOfMemoryError:
        return None
    if packed.is_cuda and packed.numel() > 0:
        # Later products may run on other streams, or in a captured graph.
        torch.cuda.current_stream(packed.device).synchronize()
    return packed


def _is_captured(x: Tensor) -> bool:
    """Whether what is launched now is recorded into a graph instead of run."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _version(x: Tensor) -> int:
    # Inference tensors count none.
    return 0 if x.is_inference() else x._version
