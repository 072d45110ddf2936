"""Sums that are kept away from their layers' device, and come there while they are added to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesskern.factors.layer_sums import LayerSums

__all__ = ["AtWork"]


class AtWork:
    """What one layer's rows are added to, on their device; one tensor at a time.

    A sum that lies there is itself at work.
    """

    def __init__(self) -> None:
        self._home: Tensor | None = None
        self._here: Tensor | None = None

    def of(self, sums: Tensor, device: torch.device) -> Tensor:
        """The sum, to be added to on a device until the next one is asked for.

        Behind the last one :meth:`put_back` is called.
        """
        if sums.device == device:
            return sums
        if self._here is None or self._home is not sums:
            self.put_back()
            self._home, self._here = sums, sums.to(device)
        return self._here

    def put_back(self) -> None:
        """Has the sum at work, if any, kept where it came from."""
        if self._home is not None and self._here is not None:
            self._home.copy_(self._here)
        self._home = self._here = None

    @staticmethod
    def on_inputs(sums: LayerSums, device: torch.device, add: Callable[[LayerSums], None]) -> None:
        """Calls a function that adds to all of a layer's sums but that of its outputs."""
        if sums.inputs.device == device:
            add(sums)
            return
        images = None if sums.images is None else [i.to(device) for i in sums.images]
        here = LayerSums(sums.inputs.to(device), sums.outputs, sums.column.to(device), images)
        add(here)
        sums.inputs.copy_(here.inputs)
        sums.column.copy_(here.column)
        if here.images is None:
            sums.images = None
            return
        for home, image in zip(sums.images or (), here.images, strict=True):
            home.copy_(image)
