"""Devices by their names."""

from __future__ import annotations

import torch

__all__ = ["usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name, if tensors can be made there.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here ({reason})") from None
