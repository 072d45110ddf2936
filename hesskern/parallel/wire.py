"""Tensors between the ranks of a group: the same path for gloo and NCCL, as plain bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Wire"]


class Wire:
    """Collectives of a group, on its backend for a device.

    Bytes are sent, so that every backend takes every dtype; no backend adds anything.

    Args:
        group: a process group.
        device: where the tensors are.

    Attributes:
        device: where sent tensors have to lie; pinned host memory stands in for devices that the
            backend does not reach by itself.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._tensors = device
        self._timeout = group._get_backend(group._device_types[0]).options._timeout
        backends = {kind.type: _backend(group, kind) for kind in group._device_types}
        if backends.get(device.type, "gloo") != "gloo":
            self.device = device
        elif backends.get("cpu") is not None:
            self.device = torch.device("cpu")
        else:
            # A group of devices alone, and tensors of the host.
            kind = next(iter(backends))
            self.device = torch.device(kind, torch.accelerator.current_device_index())

    def buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count] of a dtype, to be sent or received."""
        pinned = self.device.type == "cpu" and self._tensors.type == "cuda"
        return torch.empty(count, dtype=dtype, device=self.device, pin_memory=pinned)

    def exchange(self, out: Tensor, given: Tensor) -> None:
        """Part r of ``given`` goes to rank r; ``out`` gets the parts that others give for here."""
        given, out = _bytes(given), _bytes(out)
        self._await(dist.all_to_all_single(out, given, group=self._group, async_op=True))

    def gather(self, out: Tensor, given: Tensor) -> None:
        """``out`` gets what all ranks give, in their order."""
        # Renamed in torch 2.13.
        renamed = hasattr(dist, "all_gather_single")
        collective = getattr(dist, "all_gather_single" if renamed else "all_gather_into_tensor")
        self._await(collective(_bytes(out), _bytes(given), group=self._group, async_op=True))

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Every rank gets what rank ``owner`` has in the tensor."""
        sent = dist.broadcast(_bytes(tensor), group=self._group, group_src=owner, async_op=True)
        self._await(sent)

    def _await(self, work: Any) -> None:
        # A backend that works beside the host would leave it waiting for a rank that has ended, in
        # its next look at a value; with a timeout it waits here, and says so.
        if self.device.type == "cpu":
            work.wait()
        else:
            work.wait(self._timeout)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _backend(group: dist.ProcessGroup, device: torch.device) -> str:
    return str(group._get_backend(device).name()).lower()
