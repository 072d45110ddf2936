"""Nine rows of gradients through a convolution, against torch's backward, row by row.

The rows are zero at the same places, as they are behind ReLU (density .5) and 2 x 2 max pooling
behind ReLU (.23).

    python benchmarks/conv_input_gradient.py [PROBLEM]... [--json FILE]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import hesskern  # noqa: F401  (registers the operators)
from hesskern.apps.bench.contenders import Built, Contender, Problem, relative_difference
from hesskern.apps.bench.settings import Settings
from hesskern.progress import Progress

_ROWS = 9
_AGREEMENT = 1e-4
# Input channels, output channels, pixels per side, samples, density.
_SHAPES = (
    (64, 64, 32, 4, 0.23),
    (64, 128, 16, 6, 0.5),
    (128, 128, 16, 6, 0.23),
    (128, 256, 8, 12, 0.5),
    (256, 256, 8, 12, 0.23),
    (64, 64, 32, 4, 1.0),
    (6, 16, 14, 100, 0.23),
)


def problems() -> list[Problem]:
    """3 x 3 convolutions with padding 1."""
    return [
        Problem(
            "kernels",
            f"conv_input_gradient-{c}-{m}-{side}px-{density:g}",
            partial(_build, (c, m, side, samples, density)),
            relative_difference,
        )
        for c, m, side, samples, density in _SHAPES
    ]


def _build(
    shape: tuple[int, int, int, int, float], settings: Settings, progress: Progress
) -> Built:
    c, m, side, samples, density = shape
    samples = max(samples // 4, 1) if settings.quick else samples
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(samples, side, side, 1, m, generator=generator) < density
    grad = torch.randn(samples, side, side, _ROWS, m, generator=generator) * kept
    weight = torch.randn(m, c, 3, 3, generator=generator)
    rows = [grad[:, :, :, i].permute(0, 3, 1, 2).contiguous() for i in range(_ROWS)]
    x = torch.randn(samples, c, side, side, generator=generator)
    out = torch.empty(samples, side, side, _ROWS, c)
    window = ([1, 1], [1, 1], [1, 1])

    def ours() -> Tensor:
        torch.ops.hesskern_internal.conv_input_gradient_(out, grad, weight, *window, 1)
        return out

    def theirs() -> list[Tensor]:
        return [
            torch.ops.aten.convolution_backward(
                row, x, weight, None, *window, False, [0, 0], 1, [True, False, False]
            )[0]
            for row in rows
        ]

    work = 2.0 * _ROWS * samples * side * side * m * c * 9
    return (
        f"{_ROWS} rows through a convolution 3 x 3, {c} to {m} channels, "
        f"[{samples}, {side}, {side}], density {density:g}",
        f"{work / 1e9:.3g} GFLOP, {work * density / 1e9:.3g} where not zero",
        [
            Contender("hesskern", lambda: ours, read=lambda result: result),
            Contender(
                "torch, a loop over rows",
                lambda: theirs,
                read=lambda result: torch.stack([row.permute(0, 2, 3, 1) for row in result], 3),
                limit=_AGREEMENT,
            ),
        ],
    )


if __name__ == "__main__":
    from standalone import main

    main(problems)
