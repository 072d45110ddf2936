"""Lists of tensors in few launches: what would be an operation for every layer is one for all."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

__all__ = ["add_", "add_triangles_", "are_finite", "have_triangles", "inverse_shifted", "scale_"]


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the tensors that share a device and a dtype, which go together fast."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(groups.values())


def are_finite(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Which of the tensors hold no NaN or Inf.

    Args:
        tensors: floating point of any shape, none of them empty.

    Returns:
        flags [k] bool on the tensors' devices, and which tensors they belong to, one after another.
    """
    flags, order = [], []
    for group in _alike(tensors):
        # The largest absolute value is NaN if one of them is, and overflows for no finite ones.
        largest = torch._foreach_norm([tensors[i] for i in group], inf)
        flags.append(torch.stack(list(largest)) < inf)
        order += group
    return flags, order


def add_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Adds to every target the other of its shape and dtype."""
    for group in _alike(targets):
        torch._foreach_add_([targets[i] for i in group], [others[i] for i in group])


def have_triangles(target: Tensor, other: Tensor) -> bool:
    """Whether :func:`add_triangles_` takes a pair: both on the host, contiguous, of one dtype."""
    pair = (target, other)
    return target.dtype == other.dtype and all(
        one.device.type == "cpu" and one.is_contiguous() for one in pair
    )


def add_triangles_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Adds to every target [(g,) d, d] the other of its shape and dtype on the upper triangle.

    Args:
        targets, others: each pair as :func:`have_triangles` has it.

    Raises:
        ValueError: a pair is another; nothing is added then.
    """
    torch.ops.hesskern_internal.add_triangles_(list(targets), list(others))


def scale_(targets: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiplies every target by a number or a 0-dim tensor, in the target's dtype."""
    for group in _alike(targets):
        chosen = [targets[i] for i in group]
        torch._foreach_mul_(chosen, factor.to(chosen[0]) if isinstance(factor, Tensor) else factor)


def inverse_shifted(tensors: Sequence[Tensor], shifts: Sequence[float]) -> list[Tensor]:
    """``1 / (tensor + shift)`` of every tensor with its shift."""
    found: dict[int, Tensor] = {}
    for group in _alike(tensors):
        sums = torch._foreach_add([tensors[i] for i in group], [shifts[i] for i in group])
        torch._foreach_reciprocal_(sums)
        found.update(zip(group, sums, strict=True))
    return [found[i] for i in range(len(tensors))]
