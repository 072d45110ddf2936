"""A checkpoint's file: written durably, and read only if every bit of it is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hesskern.digests import tensor_digest
from hesskern.tensor_files import TensorFormat

__all__ = ["read", "write"]

_FILE = TensorFormat(
    "hesskern.checkpoint/1", "a checkpoint of a pass", "checkpoint", argument="checkpoint"
)


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a checkpoint, which takes the place of the one before when all of it is on the disk.

    Raises:
        OSError, SafetensorError: it cannot be written; the one before is there as it was.
    """
    sums = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    content = {**header, "checksums": sums}
    _FILE.write(path, tensors, {**content, "header": _digest(content)}, durable=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's header and tensors.

    Raises:
        ValueError: the file is none, is of a newer version, or is damaged.
    """
    with _FILE.opened(path) as file:
        content = dict(file.header)
        if content.pop("header") != _digest(content):
            raise _damaged(path, "its header is not what was written")
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
