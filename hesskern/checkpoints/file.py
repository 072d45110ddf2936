"""A checkpoint's file: written durably, and read only if every bit of it is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hesskern.checkpoints.streamed import write_tensors
from hesskern.digests import tensor_digest
from hesskern.files import written_whole
from hesskern.tensor_files import TensorFormat

__all__ = ["read", "write"]

_FILE = TensorFormat(
    "hesskern.checkpoint/1", "a checkpoint of a pass", "checkpoint", argument="checkpoint"
)


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Writes a checkpoint, which takes the place of the one before when all of it is on the disk.

    Returns:
        a digest of all that is in it.

    Raises:
        OSError: it cannot be written; the one before is there as it was.
    """
    sums = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    content = {**header, "checksums": sums}
    own = _digest(content)
    with written_whole(path, durable=True) as temporary:
        write_tensors(temporary, tensors, _FILE.metadata({**content, "header": own}))
    return own


def read(path: Path, expected: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's header and tensors.

    Args:
        path: of the file.
        expected: the digest of all that is to be in it; None for any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none, is of a newer version, or is damaged.
    """
    with _FILE.opened(path) as file:
        content = dict(file.header)
        own = content.pop("header")
        if own != _digest(content):
            raise _damaged(path, "its header is not what was written")
        if expected not in (None, own):
            raise _damaged(path, "it is not the one that was written beside its checkpoint")
        sums = content.pop("checksums")
        if sorted(sums) != sorted(file.names):
            raise _damaged(path, "its tensors are not those that its header names")
        tensors = {}
        for name in file.names:
            tensors[name] = file.tensor(name)
            if tensor_digest(tensors[name]) != sums[name]:
                raise _damaged(path, f"tensor {name!r} holds other bits than were written")
    return content, tensors


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"checkpoint: {str(path)!r} is damaged: {how}")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
