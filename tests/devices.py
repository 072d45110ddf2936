"""Which tests need a GPU."""

from __future__ import annotations

import pytest
import torch

import hesskern as hk

CUDA_KERNELS = torch.cuda.is_available() and bool(hk.build_info()["cuda"])
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not CUDA_KERNELS, reason="needs a GPU and CUDA kernels"),
]
