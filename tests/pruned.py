"""Data whose pruning leaves much out, and what a pruned Hessian has to satisfy."""

from __future__ import annotations

from typing import Any

import torch
from networks import Case, classes, randn
from torch import Tensor

import hesskern as hk


def heavy_tailed(case: Case, seed: int) -> list[tuple[Any, Tensor]]:
    """Batches in which few samples carry most of the trace."""
    data = []
    for i, n in enumerate((6, 5)):
        scale = (2 * randn(n, seed=seed + 50 + i)).exp()
        x = case.inputs(n, seed + i)
        data.append((x * scale.reshape(-1, *[1] * (x.dim() - 1)), classes(n, c=3, seed=seed + i)))
    return data


def check_pruned(H: hk.LayerHessian, exact: Tensor, tolerance: float) -> None:
    """0 <= H - H_t, ‖H - H_t‖_2 <= pruning_error <= tolerance tr(H), all up to rounding."""
    trace = float(exact.trace())
    rounding = 1e-12 * trace
    left_out = torch.linalg.eigvalsh(exact - H.to_dense())
    assert float(left_out[0]) >= -rounding
    assert float(left_out[-1]) <= H.pruning_error + rounding
    assert H.pruning_error <= tolerance * trace + rounding
    # What is left out is known exactly, not only bounded.
    assert abs(H.trace() + H.pruned_trace - trace) <= rounding
    assert H.pruning_error <= H.pruned_trace + rounding
