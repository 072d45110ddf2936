"""``output_hessian_`` over a grid of classes, outputs and positions in both memory orders.

python benchmarks/output_hessian.py [PROBLEM]... [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import hesskern as hk
from hesskern.apps.bench.contenders import Built, Contender, Problem, relative_difference
from hesskern.apps.bench.settings import Settings
from hesskern.progress import Progress

_AGREEMENT = 1e-4

# Samples, classes, outputs, positions (0: none), whether outputs are last in memory.
_SHAPES = {
    "10x10": (60_000, 10, 10, 0, True),
    "10x84": (16_384, 10, 84, 0, True),
    "10x200": (8_192, 10, 200, 0, True),
    "2x200": (40_000, 2, 200, 0, True),
    "100x512": (512, 100, 512, 0, True),
    "10x1024": (1_024, 10, 1024, 0, True),
    "conv-6x784": (256, 10, 6, 784, False),
    "conv-16x100": (1_024, 10, 16, 100, False),
    "conv-64x256": (64, 10, 64, 256, False),
    "conv-256x64": (64, 10, 256, 64, False),
    "sequence-64x64": (256, 10, 64, 64, True),
}


def problems() -> list[Problem]:
    """One per entry of the table above."""
    return [
        Problem("kernels", f"output-hessian-{key}", partial(_build, shape), relative_difference)
        for key, shape in _SHAPES.items()
    ]


def _build(shape: tuple[int, int, int, int, bool], settings: Settings, progress: Progress) -> Built:
    samples, c, m, t, outputs_last = shape
    n = max(samples // 32, 2) if settings.quick else samples
    generator = torch.Generator().manual_seed(6)
    if t and outputs_last:
        jacobian = torch.randn(n, c, t, m, generator=generator).transpose(2, 3)
    else:
        jacobian = torch.randn(n, c, m, *([t] if t else []), generator=generator)
    p = torch.randn(n, c, generator=generator).softmax(1)

    def torch_way() -> Tensor:
        flat = jacobian.reshape(n, c, -1)
        mean = torch.einsum("nc,ncq->nq", p, flat)
        rows = ((flat - mean.unsqueeze(1)) * p.sqrt().unsqueeze(2)).view(jacobian.shape)
        rows = rows.movedim(2, -1).reshape(-1, m)
        return rows.T @ rows

    def rank_update() -> Tensor:
        rows = jacobian.movedim(2, -1).reshape(-1, m)
        return rows.T @ rows

    def read(acc: Tensor) -> Tensor:
        return acc.triu()

    calls: list[tuple[str, Callable[[], Tensor], float | None]] = [
        ("hesskern", lambda: hk.ops.output_hessian_(torch.zeros(m, m), jacobian, p), None),
        ("torch, scale, center and one GEMM", torch_way, _AGREEMENT),
    ]
    positions = f", {t}" if t else ""
    return (
        f"output_hessian_: jacobian [{n}, {c}, {m}{positions}]"
        + (", outputs last in memory" if t and outputs_last else ""),
        "standard normal Jacobians, softmax of normal logits; "
        f"{4 * jacobian.numel() / 1e6:.3g} MB, "
        f"{max(c - 1, 1) * n * (t or 1) * m * m / 1e9:.3g} GFLOP on one triangle",
        [
            *(Contender(name, partial(_ready, call), read=read, limit=limit)
              for name, call, limit in calls),
            Contender("one GEMM of the Jacobian with itself", lambda: rank_update),
        ],
    )  # fmt: skip


def _ready(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return call


if __name__ == "__main__":
    from standalone import main

    main(problems)
