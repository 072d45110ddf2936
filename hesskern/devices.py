"""Devices by their names, and whether a value lies where the host can see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "on_host", "sent", "usable_device"]


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


class HostCopy:
    """A tensor's copy on the host, made beside what its device is given to do next.

    Where the device's module of torch has events, one tells when the copy has arrived (CUDA, XPU);
    another device is waited for as a whole.

    Args:
        tensor: on any device; nobody changes it before :meth:`awaited` has returned.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._module: Any = None if on_host(tensor) else torch.get_device_module(tensor.device)
        self._values = tensor.to("cpu", non_blocking=True)
        event = getattr(self._module, "Event", None)
        stream = getattr(self._module, "current_stream", None)
        self._event: Any = None
        if event is not None and stream is not None:
            self._event = event()
            self._event.record(stream(self._device))

    @property
    def arrived(self) -> bool:
        """Whether it is known to be there, without waiting."""
        return self._event is not None and bool(self._event.query())

    def awaited(self) -> Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        elif self._module is not None:
            self._module.synchronize(*_devices(self._module, self._device))
        return self._values


def _devices(module: Any, device: torch.device) -> tuple[torch.device, ...]:
    # Of what there is one alone of, as on a Mac, none is named.
    return (device,) if int(module.device_count()) > 1 else ()
