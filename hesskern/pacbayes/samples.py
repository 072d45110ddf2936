"""The training samples of a certificate: collected once, counted, and recognized again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

__all__ = ["Samples", "collect"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs [N, *shape], floating; targets [N], class indices; every sample once."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def digests(self) -> list[bytes]:
        """SHA-256 of every sample, input and target, sorted."""
        inputs = self.inputs.detach().cpu().contiguous()
        targets = self.targets.detach().cpu().tolist()
        rows = inputs.view(len(inputs), -1).view(torch.uint8).numpy()
        return sorted(
            hashlib.sha256(row.tobytes() + int(target).to_bytes(8, "little", signed=True)).digest()
            for row, target in zip(rows, targets, strict=True)
        )

    def fingerprint(self) -> str:
        """SHA-256 of the samples, whatever their order."""
        head = f"{self.inputs.dtype} {tuple(self.inputs.shape)}".encode()
        return hashlib.sha256(head + b"".join(self.digests())).hexdigest()

    def to(self, device: torch.device) -> Samples:
        """The same on another device."""
        return Samples(self.inputs.to(device), self.targets.to(device))

    def split(self, share: float, seed: int) -> tuple[Samples, Samples]:
        """A random part of about ``share`` of the samples, and the others.

        Raises:
            ValueError: ``share`` leaves fewer than 8 samples on one side.
        """
        count = round(share * len(self))
        if not 8 <= count <= len(self) - 8:
            raise ValueError(
                f"share must leave at least 8 of {len(self)} samples on both sides, got {share}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        parts = order[:count].sort().values, order[count:].sort().values
        first, second = (Samples(self.inputs[rows], self.targets[rows]) for rows in parts)
        return first, second


def collect(data: Any, n: int | None = None) -> Samples:
    """Reads ``data`` once into memory.

    Args:
        data: an iterable of (inputs [B, *shape], targets [B]) batches: a
            :class:`hesskern.zoo.data.Dataset`, a DataLoader, a list.
        n: the number of samples there must be.

    Raises:
        TypeError: ``data`` is no iterable of pairs of tensors.
        ValueError: there are no samples, not ``n`` of them, a DataLoader leaves samples out or
            draws them more than once, values are not finite, or targets are no class indices.
    """
    if isinstance(data, Samples):
        samples = data
    elif isinstance(getattr(data, "inputs", None), Tensor):
        samples = Samples(data.inputs, data.targets)
    else:
        _check_loader(data)
        samples = _read(data)
    _check(samples, n)
    if isinstance(data, DataLoader) and hasattr(data.dataset, "__len__"):
        size = len(data.dataset)
        if len(samples) != size:
            raise ValueError(
                f"data: the loader yields {len(samples)} samples, its data set holds {size}; every "
                "training sample must be counted exactly once"
            )
    return samples


def _check_loader(data: Any) -> None:
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of (inputs, targets) batches, got {type(data).__name__}"
        )
    if not isinstance(data, DataLoader):
        return
    sampler = data.sampler
    if isinstance(sampler, WeightedRandomSampler) or (
        isinstance(sampler, RandomSampler) and sampler.replacement
    ):
        raise ValueError(
            f"data: {type(sampler).__name__} draws samples more than once or not at all; every "
            "training sample must be counted exactly once"
        )
    if data.drop_last and hasattr(data.dataset, "__len__"):
        left_out = len(data.dataset) % (data.batch_size or 1)
        if left_out:
            raise ValueError(
                f"data: drop_last leaves {left_out} of {len(data.dataset)} samples out; every "
                "training sample must be counted exactly once (drop_last=False)"
            )


def _read(data: Iterable[Any]) -> Samples:
    inputs, targets = [], []
    for i, batch in enumerate(data):
        if (
            not isinstance(batch, (tuple, list))
            or len(batch) != 2
            or not all(isinstance(part, Tensor) for part in batch)
        ):
            raise TypeError(
                f"data: batch {i} must be a pair of tensors (inputs [B, ...], targets [B]), got "
                f"{type(batch).__name__}"
            )
        inputs.append(batch[0])
        targets.append(batch[1])
    if not inputs:
        raise ValueError("data is empty; a certificate needs at least 8 samples")
    return Samples(torch.cat(inputs), torch.cat(targets))


def _check(samples: Samples, n: int | None) -> None:
    inputs, targets = samples.inputs, samples.targets
    if not inputs.is_floating_point() or inputs.dim() < 2:
        raise ValueError(
            f"inputs must be floating and [N, ...], got {inputs.dtype} {list(inputs.shape)}"
        )
    if targets.is_floating_point() or targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"targets must be integer class indices [N] = [{len(inputs)}], got {targets.dtype} "
            f"{list(targets.shape)}"
        )
    if n is not None and len(samples) != n:
        raise ValueError(f"n is {n}, but the data hold {len(samples)} samples")
    if len(samples) < 8:
        raise ValueError(f"data must hold at least 8 samples, got {len(samples)}")
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("inputs must be finite, got NaN or Inf")
