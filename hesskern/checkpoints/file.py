"""A checkpoint's file: written durably, and read only if every bit of it is as it was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hesskern.checkpoints.streamed import write_tensors
from hesskern.files import written_whole
from hesskern.tensor_files import TensorFormat, sealed

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
    content = sealed(tensors, header)
    with written_whole(path, durable=True) as temporary:
        write_tensors(temporary, tensors, _FILE.metadata(content))
    own: str = content["header"]
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
        if file.seal is None:
            raise file.damaged("it has no checksums")
        if expected not in (None, file.seal):
            raise file.damaged("it is not the one that was written beside its checkpoint")
        return file.header, {name: file.tensor(name) for name in file.names}
