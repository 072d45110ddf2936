"""How long a pass takes: by two batches that are really passed."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn

from hesskern.passes.forward_pass import model_device
from hesskern.planning.requests import Request

__all__ = ["timed"]


def timed(request: Request, model: nn.Module, element: Any, batches: float) -> dict[str, float]:
    """Seconds of the parts of a pass.

    The second of two batches counts, the first one among them in what is done once.

    Args:
        request: the call.
        model, element: the model and a batch, with values.
        batches: of this size in the data.
    """
    device = model_device(model)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    ends: dict[str, list[float]] = {}

    def note(description: str, done: int, total: int | None) -> None:
        ends.setdefault(description, []).append(now())

    begin = now()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        request.run(model, [element, element], progress=note)
    last = now()
    found: dict[str, float] = {}
    once = last - begin
    for description, (first, second) in ends.items():
        found[description] = (second - first) * batches
        once -= 2 * (second - first)
    found["once"] = max(0.0, once)
    return found
