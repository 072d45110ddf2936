"""Which tests need a GPU, and how their data get there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hesskern as hk

CUDA_KERNELS = torch.cuda.is_available() and bool(hk.build_info()["cuda"])
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not CUDA_KERNELS, reason="needs a GPU and CUDA kernels"),
]


def moved(value: Any, device: Any) -> Any:
    """Tensors in tuples, lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
