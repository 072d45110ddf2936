"""Which positions of a batch are data, and which rows of a layer's input those are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["PositionMask", "position_mask_of", "rows_follow"]

PositionMask = Callable[[Any], Tensor | None]
"""From a batch's inputs, as the model gets them, to its mask [N, T]; None: all positions count."""


def position_mask_of(
    inputs: Any, given: PositionMask | None, samples: int, batch: int
) -> Tensor | None:
    """[N, T] bool, True where a position is data; None where all of them are.

    Args:
        inputs: of the batch; a dict's ``attention_mask`` tells, unless ``given`` does.
        given: the user's ``position_mask``.
        samples: N.
        batch: index, for messages.

    Raises:
        TypeError: the mask is no tensor.
        ValueError: it is not [N, T], or leaves no position at all.
    """
    if given is not None:
        name, mask = "position_mask", given(inputs)
    elif isinstance(inputs, Mapping):
        name, mask = "attention_mask", inputs.get("attention_mask")
    else:
        return None
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor [N, T], got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != samples:
        raise ValueError(
            f"{name} must be [N, T] with N = {samples}, 1 where a position is data, got "
            f"{list(mask.shape)} in batch {batch}"
            + ("; pass position_mask=" if given is None else "")
        )
    mask = mask != 0
    # One number is read, whatever the mask holds.
    count = int(mask.sum())
    if count == mask.numel():
        return None
    if not count:
        raise ValueError(f"{name} leaves no position in batch {batch}: it is all padding")
    return mask


def rows_follow(shape: torch.Size, mask: Tensor) -> bool:
    """Whether a linear layer's input [N, T, ..., d] or [N T, d] has the mask's rows [N, T]."""
    if len(shape) >= 3:
        return shape[:2] == mask.shape
    return len(shape) == 2 and shape[0] == mask.numel()
