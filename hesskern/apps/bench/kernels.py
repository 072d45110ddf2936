"""Suite ``kernels``: each operator against torch on the shapes its target is stated for.

Scripts in the checkout's ``benchmarks/`` that look at one kernel over a grid join this suite: one
that defines ``problems() -> list[Problem]`` is read, and its problems follow the ones here.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hesskern import ops
from hesskern.apps.bench.contenders import (
    Build,
    Built,
    Call,
    Contender,
    Problem,
    relative_difference,
)
from hesskern.apps.bench.settings import Settings
from hesskern.ops import reference
from hesskern.progress import Progress

__all__ = ["problems"]

_AGREEMENT = 1e-4
_SCRIPTS = Path(__file__).resolve().parents[3] / "benchmarks"

# Samples, channels, pixels per side, kernel size.
_CONVOLUTIONS = ((64, 64, 32, 3), (32, 64, 28, 5), (128, 3, 32, 3), (64, 6, 14, 5))
# Samples, features.
_LINEAR = ((8192, 200), (16384, 512), (8192, 2048))
# Samples, classes, outputs.
_OUTPUTS = ((8192, 10, 200), (2048, 10, 512))
# Samples, classes, outputs, inputs: the layers of F-200^2.
_LAYERS = ((60_000, 9, 200, 784), (60_000, 9, 200, 200), (60_000, 9, 10, 200))
# Samples, root rows, positions, outputs, inputs: layers of a small GPT-2 and its head, and of a
# network for images without positions.
_CORRECTIONS = (
    (8, 1, 128, 768, 256),
    (8, 1, 128, 256, 1024),
    (8, 1, 128, 2000, 256),
    (8192, 1, None, 200, 784),
    (8192, 9, None, 200, 200),
)
# Samples, channels, pixels per side, kernel size, padding, outputs: LeNet5's second convolution,
# the first and the last stage of a narrow ResNet18.
_CONV_CORRECTIONS = ((512, 6, 14, 5, 0, 16), (128, 16, 32, 3, 1, 16), (128, 128, 4, 3, 1, 128))


def problems() -> list[Problem]:
    """The problems of this module, and those of scripts that define ``problems``."""
    own: list[tuple[str, Build]] = [
        *(
            (f"conv_input_covariance-{'x'.join(map(str, c))}", partial(_convolution, c))
            for c in _CONVOLUTIONS
        ),
        *((f"input_covariance-{d}", partial(_linear, n, d)) for n, d in _LINEAR),
        *((f"output_hessian-{m}", partial(_output, n, c, m)) for n, c, m in _OUTPUTS),
        *((f"layer_hessian-{s[2]}x{s[3]}", partial(_layer, s)) for s in _LAYERS),
        *(
            (f"eigen_correction-{'x'.join(str(k or 1) for k in s)}", partial(_correction, s))
            for s in _CORRECTIONS
        ),
        *(
            (f"conv_eigen_correction-{'x'.join(map(str, c))}", partial(_conv_correction, c))
            for c in _CONV_CORRECTIONS
        ),
    ]
    found = [Problem("kernels", key, build, relative_difference) for key, build in own]
    for path in sorted(_SCRIPTS.glob("*.py")):
        # Only scripts made for this are run.
        if "def problems(" in path.read_text():
            found += _script(path)
    return found


def _script(path: Path) -> list[Problem]:
    spec = importlib.util.spec_from_file_location(f"hesskern_benchmarks_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.problems())


def _samples(settings: Settings, count: int) -> int:
    return max(count // 32, 2) if settings.quick else count


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def _upper(matrix: Tensor) -> Tensor:
    """What accumulators define: the upper triangle."""
    return matrix.reshape(matrix.shape[-2:]).triu()


def _ready(call: Call) -> Call:
    return call


def _pair(ours: Call, theirs: dict[str, Call]) -> list[Contender]:
    return [
        Contender("hesskern", lambda: ours, read=_upper),
        *(
            Contender(name, partial(_ready, call), read=_upper, limit=_AGREEMENT)
            for name, call in theirs.items()
        ),
    ]


def _convolution(shape: tuple[int, int, int, int], settings: Settings, progress: Progress) -> Built:
    count, channels, side, size = shape
    count = _samples(settings, count)
    x = _normal(count, channels, side, side)
    d = channels * size * size
    window = ((size, size), (1, 1), (size // 2, size // 2), (1, 1))

    def ours() -> Tensor:
        return ops.conv_input_covariance_(torch.zeros(d, d), x, *window)

    def unfolded() -> Tensor:
        patches = reference.unfold(x, *window).transpose(0, 1).reshape(d, -1)
        return patches @ patches.T

    return (
        f"conv_input_covariance_: x [{count}, {channels}, {side}, {side}], kernel {size} x {size}",
        "standard normal inputs, stride 1, padding that keeps the size",
        _pair(ours, {"torch, unfold and one GEMM": unfolded}),
    )


def _linear(samples: int, d: int, settings: Settings, progress: Progress) -> Built:
    count = _samples(settings, samples)
    x = _normal(count, d)
    return (
        f"input_covariance_: x [{count}, {d}]",
        "standard normal inputs",
        _pair(
            lambda: ops.input_covariance_(torch.zeros(d, d), x),
            {"torch, x.T @ x": lambda: x.T @ x},
        ),
    )


def _output(samples: int, c: int, m: int, settings: Settings, progress: Progress) -> Built:
    count = _samples(settings, samples)
    jacobian = _normal(count, c, m)
    probabilities = _normal(count, c).softmax(1)

    def plain() -> Tensor:
        mean = torch.einsum("nc,ncm->nm", probabilities, jacobian)
        rows = (jacobian - mean.unsqueeze(1)) * probabilities.sqrt().unsqueeze(2)
        flat = rows.reshape(-1, m)
        return flat.T @ flat

    return (
        f"output_hessian_: jacobian [{count}, {c}, {m}]",
        "standard normal Jacobians, softmax of normal logits",
        _pair(
            lambda: ops.output_hessian_(torch.zeros(m, m), jacobian, probabilities),
            {"torch, scale, center and one GEMM": plain},
        ),
    )


def _layer(shape: tuple[int, int, int, int], settings: Settings, progress: Progress) -> Built:
    samples, c, m, d = shape
    count = _samples(settings, samples)
    x, s, V = _normal(count, d), _normal(count, c, m), _normal(m, d)

    def plain() -> Tensor:
        dots = torch.bmm(s, (x @ V.T).unsqueeze(2))
        return torch.bmm(s.transpose(1, 2), dots).squeeze(2).T @ x

    def read(product: Tensor) -> Tensor:
        return product

    return (
        f"layer_hessian_matmul: x [{count}, {d}], s [{count}, {c}, {m}], V [{m}, {d}]",
        "standard normal inputs",
        [
            Contender("hesskern", lambda: lambda: ops.layer_hessian_matmul(x, s, V), read=read),
            Contender(
                "torch, two GEMMs and two batched products",
                lambda: plain,
                read=read,
                limit=_AGREEMENT,
            ),
        ],
    )


def _basis(order: int) -> Tensor:
    return torch.linalg.qr(_normal(order, order)).Q


def _whole(total: Tensor) -> Tensor:
    return total


def _correction_pair(ours: Call, theirs: dict[str, Call]) -> list[Contender]:
    return [
        Contender("hesskern", lambda: ours, read=_whole),
        *(
            Contender(name, partial(_ready, call), read=_whole, limit=_AGREEMENT)
            for name, call in theirs.items()
        ),
    ]


def _correction(
    shape: tuple[int, int, int | None, int, int], settings: Settings, progress: Progress
) -> Built:
    samples, r, t, m, d = shape
    count = _samples(settings, samples)
    U, V = _basis(m), _basis(d)
    if t is None:
        g, x = _normal(count, r, m), _normal(count, d)

        def plain() -> Tensor:
            return (g @ U).square().sum(1).T @ (x @ V).square()

        torch_way = "torch, squares of rotated rows and one GEMM"
    else:
        # As a model keeps them: positions before features.
        g, x = _normal(count, r, t, m).mT, _normal(count, t, d).mT

        def plain() -> Tensor:
            inputs = (x.mT @ V).unsqueeze(1)
            return torch.matmul((g.mT @ U).mT, inputs).square().sum((0, 1))

        torch_way = "torch, rotated rows, batched products, squares"
    return (
        f"eigen_correction_: g {list(g.shape)}, x {list(x.shape)}",
        "standard normal rows",
        _correction_pair(
            lambda: ops.eigen_correction_(torch.zeros(m, d), g, x, U, V), {torch_way: plain}
        ),
    )


def _conv_correction(
    shape: tuple[int, int, int, int, int, int], settings: Settings, progress: Progress
) -> Built:
    count, channels, side, size, padding, m = shape
    count = _samples(settings, count)
    d, out = channels * size * size, side + 2 * padding - size + 1
    x, g = _normal(count, channels, side, side), _normal(count, 1, m, out, out)
    U, V = _basis(m), _basis(d)
    window = ((size, size), (1, 1), (padding, padding), (1, 1))

    def ours() -> Tensor:
        return ops.conv_eigen_correction_(torch.zeros(m, d), g, x, U, V, *window)

    def positions_first() -> Tensor:
        patches = reference.unfold(x, *window).mT
        rows = g.flatten(1, 2).flatten(2).mT
        return torch.bmm((rows @ U).mT, patches @ V).square().sum(0)

    def sums_first() -> Tensor:
        patches = reference.unfold(x, *window).mT
        sums = torch.bmm(g.flatten(1, 2).flatten(2), patches)
        return (U.T @ (sums @ V)).square().sum(0)

    return (
        f"conv_eigen_correction_: x {list(x.shape)}, kernel {size} x {size}, {m} outputs",
        "standard normal images and rows, stride 1",
        _correction_pair(
            ours,
            {"torch, patches rotated first": positions_first, "torch, sums first": sums_first},
        ),
    )
