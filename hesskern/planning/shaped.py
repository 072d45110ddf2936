"""A model and a batch without values, as the ones given: what a shape run is made with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.passes.batches import mapped
from hesskern.passes.forward_pass import model_device
from hesskern.planning.shape_run import ShapeRun

__all__ = [
    "ShapedBatches",
    "batches_of",
    "has_values",
    "planned_device",
    "repeated",
    "shaped_model",
]


def planned_device(model: nn.Module) -> torch.device:
    """Where the model is to be; the host for one on the meta device."""
    device = model_device(model)
    return torch.device("cpu") if device.type == "meta" else device


def has_values(model: nn.Module, element: Any) -> bool:
    """Whether neither the model nor a batch has tensors on the meta device."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]

    def seen(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(element, seen)
    return not any(tensor.is_meta for tensor in found)


def shaped_model(run: ShapeRun, model: nn.Module) -> nn.Module:
    """The model with parameters and buffers that have shapes alone; its own are not touched.

    Raises:
        TypeError: the model cannot be copied.
    """
    device = planned_device(model)
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            shaped = run.shaped(tensor)
        else:
            shaped = _numbers(tensor, device).clone()
            run.note(shaped)
        if isinstance(tensor, nn.Parameter):
            shaped = nn.Parameter(shaped, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = shaped
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"model must be one that copy.deepcopy copies, to be planned: {error}"
        ) from error


class ShapedBatches:
    """Data of some equal batches without values, made anew whenever one is asked for.

    So a batch takes memory from when it is loaded until nobody needs it, as those of a DataLoader.

    Args:
        run: that it is for.
        element: a batch as the data yield it.
        samples: its number of samples.
        size: the number wanted.
        count: of batches.
        device: that tensors on the meta device are for.
    """

    def __init__(
        self,
        run: ShapeRun,
        element: Any,
        samples: int,
        size: int,
        count: int,
        device: torch.device,
    ) -> None:
        self._count = count

        def numbers(tensor: Tensor) -> Any:
            if tensor.is_floating_point() or tensor.is_complex():
                shape = list(tensor.shape)
                if shape and shape[0] == samples:
                    shape[0] = size
                place = device if tensor.is_meta else tensor.device
                return _Floats(torch.Size(shape), tensor.dtype, place)
            found: Tensor = repeated(_numbers(tensor, device), samples, size)
            run.note(found)
            return found

        self._element = mapped(element, numbers)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            yield _loaded(self._element)


@dataclass(frozen=True)
class _Floats:
    """A tensor's shape, dtype and device."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _loaded(value: Any) -> Any:
    """The same nested values with tensors of their own."""
    if isinstance(value, _Floats):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _loaded(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_loaded(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def repeated(element: Any, samples: int, size: int) -> Any:
    """An element of the data as a batch of another number of samples, its own again and again."""
    if size == samples:
        return element

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[0] == samples:
            return tensor[torch.arange(size, device=tensor.device) % samples]
        return tensor

    return mapped(element, change)


def _numbers(tensor: Tensor, device: torch.device) -> Tensor:
    """Integers or truths with values."""
    if not tensor.is_meta:
        return tensor.detach()
    # A class, a token and a truth as good as any; in a mask: data.
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)


def batches_of(samples: int, size: int) -> int:
    """Into how many batches of a size samples are taken."""
    return max(1, math.ceil(samples / size))
