"""``layer_hessian_matmul`` over a grid: networks' layers, blocks of vectors, rows, positions.

Beside each stands what bounds it: the two GEMMs alone (Y = X V^T and Y^T X, nothing in between) or,
where no GEMM is large, one read of the operands.

    python benchmarks/layer_hessian.py [PROBLEM]... [--json FILE]
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

# Samples, classes, outputs, inputs, vectors (0: one, without a block).
_LINEAR = {
    "f200-fc1": (60_000, 9, 200, 784, 0),
    "f200-fc2": (60_000, 9, 200, 200, 0),
    "f200-fc3": (60_000, 9, 10, 200, 0),
    "f200-fc1-block8": (10_000, 9, 200, 784, 8),
    "f200-fc1-block20": (4_000, 9, 200, 784, 20),
    "binary-output": (60_000, 1, 1, 784, 0),
    "wide": (4_096, 9, 1024, 1024, 0),
    "wider": (2_048, 9, 2048, 2048, 0),
}
# Samples, classes, outputs, inputs, vectors, share of the inputs that is zero.
_ZEROS = {
    "zeros-80": (30_000, 9, 200, 784, 0, 0.8),
    "zeros-50": (30_000, 9, 200, 784, 0, 0.5),
    "zeros-60-square": (60_000, 9, 200, 200, 0, 0.6),
    "zeros-80-few-outputs": (30_000, 9, 32, 784, 0, 0.8),
    "zeros-90-wide": (4_096, 9, 2048, 1024, 0, 0.9),
    "zeros-80-block8": (8_000, 9, 200, 784, 8, 0.8),
}
# Samples, classes, row length, vectors.
_ROWS = {
    "rows-450": (20_000, 9, 450, 0),
    "rows-450-block8": (20_000, 9, 450, 8),
    "rows-2400": (5_000, 9, 2400, 0),
    "rows-150000": (80, 9, 150_000, 0),
}
# Samples, classes, outputs, inputs, positions, vectors, whether positions come before features.
_POSITIONS = {
    "positions-8": (2_000, 9, 64, 256, 8, 0, True),
    "positions-49": (500, 9, 64, 576, 49, 0, False),
    "positions-196-block20": (200, 9, 16, 150, 196, 20, False),
}


def problems() -> list[Problem]:
    """One per entry of the tables above."""
    named: list[tuple[str, Callable[[Settings, Progress], Built]]] = [
        *((key, partial(_linear, shape)) for key, shape in _LINEAR.items()),
        *((key, partial(_linear, shape[:5], zeros=shape[5])) for key, shape in _ZEROS.items()),
        *((key, partial(_rows, shape)) for key, shape in _ROWS.items()),
        *((key, partial(_positions, shape)) for key, shape in _POSITIONS.items()),
    ]
    return [
        Problem("kernels", f"layer-hessian-{key}", build, relative_difference)
        for key, build in named
    ]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def _few(settings: Settings, samples: int) -> int:
    return max(samples // 32, 2) if settings.quick else samples


def _read(product: Tensor) -> Tensor:
    return product


def _contender(name: str, call: Callable[[], Tensor], limit: float | None = None) -> Contender:
    return Contender(name, lambda: call, read=_read, limit=limit)


def _bound(name: str, call: Callable[[], object]) -> Contender:
    return Contender(name, lambda: call)


def _linear(
    shape: tuple[int, int, int, int, int],
    settings: Settings,
    progress: Progress,
    zeros: float = 0.0,
) -> Built:
    samples, c, m, d, k = shape
    n = _few(settings, samples)
    x, s = _normal(n, d), _normal(n, c, m)
    # Anywhere in the row, unlike the background of an image: a hard case.
    x.masked_fill_(torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) < zeros, 0.0)
    V = _normal(k, m, d) if k else _normal(m, d)
    flat = V.reshape(-1, d)
    blocks = flat.shape[0] // m

    def torch_way() -> Tensor:
        y = (x @ flat.T).view(n, blocks, m).transpose(1, 2)
        y = torch.bmm(s.transpose(1, 2), torch.bmm(s, y))
        return (y.transpose(1, 2).reshape(n, -1).T @ x).view(V.shape)

    def panels() -> Tensor:
        by_name = torch.ops.hesskern_internal.layer_hessian_matmul_by
        return by_name(x, s, V, 1.0, "panels")

    flops = 4.0 * n * m * d * blocks
    return (
        f"layer_hessian_matmul: x [{n}, {d}], s [{n}, {c}, {m}], {blocks} vectors"
        + (f", {zeros:.0%} of x zero" if zeros else ""),
        f"standard normal operands; {flops / 1e9:.3g} GFLOP in GEMMs, "
        f"{4 * (x.numel() + s.numel()) / 1e6:.3g} MB of operands",
        [
            _contender("hesskern", lambda: hk.ops.layer_hessian_matmul(x, s, V)),
            *([_contender("hesskern, zeros multiplied", panels, _AGREEMENT)] if zeros else []),
            _contender("torch, two GEMMs and two batched products", torch_way, _AGREEMENT),
            _bound("the two GEMMs alone", lambda: (x @ flat.T).T @ x),
        ],
    )


def _rows(shape: tuple[int, int, int, int], settings: Settings, progress: Progress) -> Built:
    samples, c, p, k = shape
    n = _few(settings, samples)
    x, s = torch.ones(n, 1), _normal(n, c, p)
    V = _normal(k, p, 1) if k else _normal(p, 1)
    flat, rows = V.reshape(-1, p), s.view(n * c, p)
    return (
        f"layer_hessian_matmul: whole rows s [{n}, {c}, {p}], {len(flat)} vectors",
        f"standard normal operands; {4 * s.numel() / 1e6:.3g} MB of operands",
        [
            _contender("hesskern", lambda: hk.ops.layer_hessian_matmul(x, s, V)),
            _contender(
                "torch, (S V^T)^T S", lambda: ((rows @ flat.T).T @ rows).view(V.shape), _AGREEMENT
            ),
            _bound("one read: sum of the operands", s.sum),
        ],
    )


def _positions(
    shape: tuple[int, int, int, int, int, int, bool], settings: Settings, progress: Progress
) -> Built:
    samples, c, m, d, t, k, features_last = shape
    n = _few(settings, samples)
    if features_last:
        x, s = _normal(n, t, d).transpose(1, 2), _normal(n, c, t, m).transpose(2, 3)
    else:
        x, s = _normal(n, d, t), _normal(n, c, m, t)
    V = _normal(k, m, d) if k else _normal(m, d)
    block = V.reshape(-1, m, d)

    def torch_way() -> Tensor:
        rows = torch.matmul(s, x.transpose(1, 2).unsqueeze(1)).reshape(n * c, m * d)
        return ((rows @ block.reshape(-1, m * d).T).T @ rows).view(V.shape)

    def by_products() -> Tensor:
        y = torch.matmul(block.reshape(-1, d), x).view(n, -1, m * t)
        flat = s.reshape(n, c, m * t)
        y = torch.bmm(torch.bmm(y, flat.transpose(1, 2)), flat).view(n, -1, t)
        return torch.einsum("nit,ndt->id", y, x).reshape(V.shape)

    return (
        f"layer_hessian_matmul: x [{n}, {d}, {t}], s [{n}, {c}, {m}, {t}], {len(block)} vectors"
        + (", features last in memory" if features_last else ""),
        f"standard normal operands; {4 * (x.numel() + s.numel()) / 1e6:.3g} MB of operands",
        [
            _contender("hesskern", lambda: hk.ops.layer_hessian_matmul(x, s, V)),
            _contender("torch, rows s x^T first", torch_way, _AGREEMENT),
            _contender("torch, V x first", by_products, _AGREEMENT),
        ],
    )


if __name__ == "__main__":
    from standalone import main

    main(problems)
