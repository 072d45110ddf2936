"""In which precision a pass computes, in words for a result's settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["precision_of", "precisions"]


def precisions(model: nn.Module, device: torch.device) -> list[str]:
    """:func:`precision_of` for every dtype that the model's weights have."""
    weights = [p for p in model.parameters() if p.is_floating_point() and p.dim() > 1]
    return [precision_of(dtype, device) for dtype in dict.fromkeys(w.dtype for w in weights)]


def precision_of(model_dtype: torch.dtype, device: torch.device) -> str:
    """The precision of the rows that a pass makes now, e.g. "float32, convolutions in TF32".

    Args:
        model_dtype: of the layers' weights.
        device: of the model; on CUDA torch runs convolutions of float32 in TF32 unless told not to.

    Returns:
        the model's precision, with what autocast and TF32 make of it, and that of the sums where
        they are wider.
    """
    name = _name(model_dtype)
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        narrow = _name(torch.get_autocast_dtype(kind))
        return f"{name} model under {narrow} autocast, sums in {_name(_sums(model_dtype))}"
    if model_dtype.itemsize < 4:
        return f"{name} model, sums in float32"
    if model_dtype != torch.float32 or kind != "cuda":
        return name
    # torch's stubs do not know the newer flags.
    cudnn: Any = torch.backends.cudnn
    backends: tuple[tuple[str, Any], ...] = (
        ("convolutions", cudnn.conv),
        ("matrix products", torch.backends.cuda.matmul),
    )
    rounded = [
        what
        for what, backend in backends
        # Reading the older flags is an error where somebody has set the newer ones.
        if backend.fp32_precision == "tf32"
    ]
    return f"float32, {' and '.join(rounded)} in TF32" if rounded else "float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
