"""Kronecker products over a grid of layers, blocks of vectors and groups of layers.

python benchmarks/kron.py [PROBLEM]... [--json FILE]
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

# Outputs, inputs, vectors (0: one, without a block).
_LAYERS = {
    "16x32": (16, 32, 0),
    "10x84": (10, 84, 0),
    "16x150": (16, 150, 0),
    "120x400": (120, 400, 0),
    "200x784": (200, 784, 0),
    "200x784-block8": (200, 784, 8),
    "512x512": (512, 512, 0),
    "1024x1024": (1024, 1024, 0),
    "2048x1024": (2048, 1024, 0),
}
# Layers, outputs, inputs.
_GROUPS = {
    "64-of-16x32": (64, 16, 32),
    "200-of-16x48": (200, 16, 48),
    "32-of-64x128": (32, 64, 128),
}


def problems() -> list[Problem]:
    """For each layer A X B^T and U (S . (U^T X V)) V^T; for each group the same in one call."""
    named: list[tuple[str, Callable[[Settings, Progress], Built]]] = [
        *((f"kron-{key}", partial(_layer, shape, False)) for key, shape in _LAYERS.items()),
        *((f"kron-eigen-{key}", partial(_layer, shape, True)) for key, shape in _LAYERS.items()),
        *((f"kron-group-{key}", partial(_group, shape)) for key, shape in _GROUPS.items()),
    ]
    return [Problem("kernels", key, build, relative_difference) for key, build in named]


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _contender(name: str, call: Callable[[], Tensor], limit: float | None = None) -> Contender:
    return Contender(name, lambda: call, read=lambda result: result, limit=limit)


def _layer(
    shape: tuple[int, int, int], eigen: bool, settings: Settings, progress: Progress
) -> Built:
    scale = 8 if settings.quick and min(shape[:2]) >= 64 else 1
    m, d, k = shape[0] // scale, shape[1] // scale, shape[2]
    X = _normal(3, k, m, d) if k else _normal(3, m, d)
    vectors = k or 1
    if eigen:
        U, V = (torch.linalg.qr(_normal(i, size, size))[0] for i, size in enumerate((m, d)))
        S = _normal(2, m, d).abs()
        contenders = [
            _contender("hesskern", lambda: hk.ops.kron_eigen_matmul(U, S, V, X)),
            _contender(
                "torch, U @ (S * (U.T @ X @ V)) @ V.T",
                lambda: U @ (S * (U.T @ X @ V)) @ V.T,
                _AGREEMENT,
            ),
        ]
        title, flops = "U (S . (U^T X V)) V^T", 4.0 * vectors * m * d * (m + d)
    else:
        A, B = _normal(0, m, m), _normal(1, d, d)
        contenders = [
            _contender("hesskern", lambda: hk.ops.kron_matmul(A, B, X)),
            _contender("torch, A @ X @ B.T", lambda: A @ X @ B.T, _AGREEMENT),
        ]
        title, flops = "A X B^T", 2.0 * vectors * m * d * (m + d)
    if min(m, d) >= 200:
        # One product of two large matrices with as many operations: the machine's GEMM rate.
        inner = round(flops / (2.0 * 1024 * 1024))
        left, right = _normal(4, 1024, inner), _normal(5, inner, 1024)
        contenders.append(Contender("one GEMM of as many operations", lambda: lambda: left @ right))
    return (
        f"{title}: {m} x {d}, {vectors} vectors",
        f"standard normal operands; {flops / 1e9:.3g} GFLOP",
        contenders,
    )


def _group(shape: tuple[int, int, int], settings: Settings, progress: Progress) -> Built:
    count, m, d = shape
    A = [_normal(i, m, m) for i in range(count)]
    B = [_normal(i, d, d) for i in range(count)]
    X = [_normal(i, m, d) for i in range(count)]

    def stacked(call: Callable[[], list[Tensor]], name: str, limit: float | None) -> Contender:
        return Contender(name, lambda: call, read=torch.stack, limit=limit)

    return (
        f"A X B^T of {count} layers of {m} x {d}",
        "standard normal operands",
        [
            stacked(lambda: hk.ops.grouped_kron_matmul(A, B, X), "hesskern, grouped", None),
            stacked(
                lambda: [hk.ops.kron_matmul(a, b, x) for a, b, x in zip(A, B, X, strict=True)],
                "hesskern, loop",
                _AGREEMENT,
            ),
            stacked(
                lambda: [a @ x @ b.T for a, b, x in zip(A, B, X, strict=True)],
                "torch, loop of A @ X @ B.T",
                _AGREEMENT,
            ),
        ],
    )


if __name__ == "__main__":
    from standalone import main

    main(problems)
