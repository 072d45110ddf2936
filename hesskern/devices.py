"""Devices by their names, and whether a value lies where the host can see it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["on_host", "sent", "usable_device"]


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


def on_host(tensor: Tensor) -> bool:
    """Whether the tensor's values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for one; to the host values come before it returns.

    A copy to the host that does not wait gives memory that the device has yet to write.
    """
    return tensor.to(device, non_blocking=device.type != "cpu")
