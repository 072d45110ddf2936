"""Safetensors files, written tensor by tensor into one place.

The library's own writer takes a copy of all tensors, and a temporary file of a name of its own,
which a kill would leave behind.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["write_tensors"]

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# Bytes that the tensors begin at a multiple of, in the file.
_ALIGNED = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, tensor by tensor.

    Args:
        path: of the file.
        tensors: of any shape and layout, by name.
        metadata: of the file.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor's dtype has no name in such files.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    # Wide elements first, so that each tensor begins at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} is of {tensor.dtype}, which files do not hold")
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % _ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous()
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
