"""The model that every rank of a group has for itself, and whether it is the same everywhere."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.digests import module_facts

__all__ = ["checksums", "inner_model", "model_facts"]

# Words that are summed at a time.
_WORDS = 2**22
# Odd, so that no bit of a word is lost; from the golden ratio, as hash functions have it.
_FACTOR = -0x61C8864680B583EB


def inner_model(model: Any) -> Any:
    """The module that ``DistributedDataParallel`` wraps; others as they are.

    Raises:
        NotImplementedError: the model is sharded by ``FullyShardedDataParallel``.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return inner_model(model.module)
    if type(model).__name__ == "FullyShardedDataParallel":
        raise NotImplementedError(
            "model is wrapped by FullyShardedDataParallel, whose parameters are flat shards; "
            "torch's fully_shard keeps them by layer"
        )
    return model


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What the ranks have to agree on, in the order in which a difference is to be told."""
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    return {
        "names of the model's tensors": list(named),
        "dtypes": {name: str(tensor.dtype) for name, tensor in named.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in named.items()},
        "checksums of values": checksums(named),
        "modules": module_facts(model),
    }


def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Numbers that differ where a bit does, but for chance; made where the tensors are.

    The host waits once.
    """
    made = [_checksum(tensor.detach()) for tensor in tensors.values()]
    if not made:
        return {}
    return dict(
        zip(tensors, torch.stack([s.to(made[0].device) for s in made]).tolist(), strict=True)
    )


def _checksum(tensor: Tensor) -> Tensor:
    """0-dim int64: words times odd numbers of their places, modulo 2^64."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.is_meta or tensor.layout != torch.strided:
        return total
    data = tensor.contiguous().view(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    rest = data.new_zeros(8)
    rest[: len(data) - whole] = data[whole:]
    # A view of storage that begins at an odd place cannot be read as words.
    aligned = data[:whole]
    if aligned.storage_offset() % 8:
        aligned = aligned.clone()
    for words in (*aligned.view(torch.int64).split(_WORDS), rest.view(torch.int64)):
        # Of tensors below eight bytes there are no whole words.
        places = 2 * torch.arange(len(words), device=tensor.device) + 1
        total = total * _FACTOR + (words * (places * _FACTOR)).sum()
    return total
