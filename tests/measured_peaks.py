"""What torch's allocator hands out in a pass over batches that are loaded one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from allocations import peak_bytes
from torch import nn
from torch.utils._pytree import tree_map

Call = Callable[[nn.Module, Iterable[Any]], Any]


class Loaded:
    """A batch so many times, each time in memory of its own, as a DataLoader has them."""

    def __init__(self, batch: Any, count: int) -> None:
        self._batch, self._count = batch, count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            yield tree_map(torch.clone, self._batch)


def measured(call: Call, model: nn.Module, data: Iterable[Any]) -> int:
    """The allocator's peak."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peak_bytes(lambda: call(model, data))
