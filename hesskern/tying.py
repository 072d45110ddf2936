"""Weights that a forward pass reads in more places than their layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["WeightReads"]


class WeightReads(TorchFunctionMode):
    """Counts, inside a ``with`` block, the operations that take given weights as an argument.

    Attributes:
        counts: by the weight's ``id``; reading a shape or a dtype does not count.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.counts = {id(weight): 0 for weight in weights}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if next(_tensors((result,)), None) is not None:
            for tensor in _tensors((*args, *kwargs.values())):
                if id(tensor) in self.counts:
                    self.counts[id(tensor)] += 1
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
