"""One clear error for every check of csrc/checks.h: argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensors import BF16, F16, f32, f64, random
from torch import Tensor

from hesskern import ops

# (id, call, what the message must say): each check of csrc/checks.h, in its order.
X54, V34 = f32(5, 4), f32(3, 4)
NOTHING = torch.zeros(0, dtype=torch.int32)


def covariance(acc: Tensor, x: Tensor, **more: Any) -> Callable[[], Any]:
    return lambda: ops.input_covariance_(acc, x, **more)


def conv(acc: Tensor, x: Tensor, *geometry: Any) -> Callable[[], Any]:
    defaults = ([2, 2], [1, 1], [0, 0], [1, 1], 1)
    return lambda: ops.conv_input_covariance_(acc, x, *geometry, *defaults[len(geometry) :])


def hessian(acc: Tensor, jacobian: Tensor, p: Tensor | None = None) -> Callable[[], Any]:
    return lambda: ops.output_hessian_(acc, jacobian, p)


def correction(**other: Any) -> Callable[[], Any]:
    """Outputs 4, inputs 3, samples 6, root rows 2; with others in the place of some."""
    right = {
        "acc": f32(4, 3),
        "g": f32(6, 2, 4),
        "x": f32(6, 3),
        "U": f32(4, 4),
        "V": f32(3, 3),
    }
    return lambda: ops.eigen_correction_(**(right | other))


def conv_correction(**other: Any) -> Callable[[], Any]:
    right = {
        "acc": f32(4, 8),
        "g": f32(2, 1, 4, 3, 3),
        "x": IMAGE,
        "U": f32(4, 4),
        "V": f32(8, 8),
        "kernel_size": [2, 2],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
    }
    return lambda: ops.conv_eigen_correction_(**(right | other))


def kron(*arguments: Tensor) -> Callable[[], Any]:
    return lambda: ops.kron_matmul(*arguments)


def eigen(*arguments: Tensor) -> Callable[[], Any]:
    return lambda: ops.kron_eigen_matmul(*arguments)


def layer(*arguments: Any) -> Callable[[], Any]:
    return lambda: ops.layer_hessian_matmul(*arguments)


def sampled(logits: Tensor, uniform: Tensor, *more: Any) -> Callable[[], Any]:
    return lambda: ops.sampled_cross_entropy_gradient(logits, uniform, *more)


MEMORY = f32(40)
IMAGE = f32(2, 2, 4, 4)
EIGEN = (f32(4, 3), f32(3, 2), f32(5, 2), f32(4, 5))
BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    # accumulators
    "acc half": (
        covariance(random((4, 4), F16), X54),
        ["input_covariance_", "acc", "float32 or float64", "Half"],
    ),
    "acc integer": (
        covariance(torch.zeros(4, 4, dtype=torch.int64), X54),
        ["acc", "float32 or float64", "Long"],
    ),
    "x integer": (covariance(f32(4, 4), X54.long()), ["x must be a floating-point tensor", "Long"]),
    "x complex": (
        covariance(f32(4, 4), X54.to(torch.complex64)),
        ["x must be a floating-point", "ComplexFloat"],
    ),
    "x wider than acc": (
        covariance(f32(4, 4), X54.double()),
        ["x is float64", "acc must be float64", "Float"],
    ),
    "acc overlaps itself": (
        covariance(f32(1, 4).expand(4, 4), X54),
        ["acc", "own memory", "[4, 4]", "strides [0, 1]"],
    ),
    "acc is x": (
        covariance(MEMORY[:16].view(4, 4), MEMORY[8:28].view(5, 4)),
        ["acc must not share memory with x"],
    ),
    "acc on another device": (
        covariance(f32(4, 4).to("meta"), X54),
        ["acc is on meta", "x is on cpu"],
    ),
    "x on another device": (
        covariance(f32(4, 4), X54.to("meta")),
        ["acc is on cpu", "x is on meta"],
    ),
    # input_covariance_
    "x of one axis": (
        covariance(f32(4, 4), f32(4)),
        ["input_covariance_", "x must be [N, d]", "[4]"],
    ),
    "x of three axes": (covariance(f32(4, 4), f32(5, 4, 1)), ["x must be [N, d]", "[5, 4, 1]"]),
    "acc order": (covariance(f32(5, 5), X54), ["acc must be [4, 4]", "x [5, 4]", "got [5, 5]"]),
    "acc not square": (covariance(f32(4, 5), X54), ["acc must be [4, 4]", "got [4, 5]"]),
    "acc of three axes": (covariance(f32(1, 4, 4), X54), ["acc must be [4, 4]", "got [1, 4, 4]"]),
    "acc order with ones": (
        covariance(f32(4, 4), X54, ones=True),
        ["acc must be [5, 5]", "with ones", "got [4, 4]"],
    ),
    # conv_input_covariance_
    "image of two axes": (
        conv(f32(4, 4), X54),
        ["conv_input_covariance_", "x must be [N, C, L] or [N, C, H, W]", "[5, 4]"],
    ),
    "kernel_size length": (conv(f32(8, 8), IMAGE, [2]), ["kernel_size must have 2 entries", "[2]"]),
    "stride length": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1, 1]),
        ["stride must have 2 entries", "[1, 1, 1]"],
    ),
    "padding length": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], []),
        ["padding must have 2 entries", "[]"],
    ),
    "dilation length": (
        conv(f32(8, 8), f32(2, 2, 9), [4], [1], [0], [1, 1]),
        ["dilation must have 1 entries", "[1, 1]"],
    ),
    "kernel_size zero": (conv(f32(8, 8), IMAGE, [2, 0]), ["kernel_size must be", "1", "[2, 0]"]),
    "stride zero": (conv(f32(8, 8), IMAGE, [2, 2], [0, 1]), ["stride must be", "1", "[0, 1]"]),
    "padding negative": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], [0, -1]),
        ["padding must be", "0", "[0, -1]"],
    ),
    "dilation zero": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], [0, 0], [0, 1]),
        ["dilation must be", "1", "[0, 1]"],
    ),
    "dilation overflows": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], [0, 0], [1, 2**62]),
        ["dilation", "2147483647", "4611686018427387904"],
    ),
    "padding overflows": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], [2**62, 0]),
        ["padding", "2147483647", "4611686018427387904"],
    ),
    "groups zero": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], [0, 0], [1, 1], 0),
        ["groups must divide", "channels 2", "got 0"],
    ),
    "groups odd": (
        conv(f32(8, 8), IMAGE, [2, 2], [1, 1], [0, 0], [1, 1], 3),
        ["groups must divide", "channels 2", "got 3"],
    ),
    "kernel too large": (
        conv(f32(50, 50), IMAGE, [5, 5]),
        ["kernel does not fit", "[2, 2, 4, 4]", "[5, 5]"],
    ),
    "conv acc order": (
        conv(f32(9, 9), IMAGE),
        ["acc must be [d, d] or [1, d, d]", "d = 8", "[9, 9]"],
    ),
    "conv acc without groups": (
        conv(f32(4, 4), IMAGE, [2, 2], [1, 1], [0, 0], [1, 1], 2),
        ["[groups, d, d]", "d = 4", "groups = 2", "[4, 4]"],
    ),
    "conv acc groups": (
        conv(f32(3, 4, 4), IMAGE, [2, 2], [1, 1], [0, 0], [1, 1], 2),
        ["groups = 2", "[3, 4, 4]"],
    ),
    "conv acc dtype": (
        conv(random((8, 8), BF16), IMAGE),
        ["conv_input_covariance_", "acc must be float32 or float64", "BFloat16"],
    ),
    "conv x wider": (conv(f32(8, 8), IMAGE.double()), ["x is float64", "acc must be float64"]),
    "conv device": (
        conv(f32(8, 8), IMAGE.to("meta")),
        ["conv_input_covariance_", "acc is on cpu", "x is on meta"],
    ),
    # output_hessian_
    "jacobian of two axes": (
        hessian(f32(4, 4), X54),
        ["output_hessian_", "jacobian must be [N, c, m] or [N, c, m, t]", "[5, 4]"],
    ),
    "hessian acc order": (
        hessian(f32(5, 5), f32(2, 3, 4)),
        ["acc must be [4, 4]", "jacobian [2, 3, 4]", "got [5, 5]"],
    ),
    "hessian acc dtype": (
        hessian(random((4, 4), F16), f32(2, 3, 4)),
        ["acc must be float32 or float64", "Half"],
    ),
    "jacobian integer": (
        hessian(f32(4, 4), f32(2, 3, 4).int()),
        ["jacobian must be a floating-point tensor", "Int"],
    ),
    "jacobian wider": (
        hessian(f32(4, 4), f64(2, 3, 4)),
        ["jacobian is float64", "acc must be float64"],
    ),
    "probabilities shape": (
        hessian(f32(4, 4), f32(2, 3, 4), f32(3, 2)),
        ["probabilities must be [N, c] = [2, 3]", "[3, 2]"],
    ),
    "probabilities axes": (
        hessian(f32(4, 4), f32(2, 3, 4), f32(2, 3, 1)),
        ["probabilities must be [N, c]", "[2, 3, 1]"],
    ),
    "probabilities integer": (
        hessian(f32(4, 4), f32(2, 3, 4), f32(2, 3).long()),
        ["probabilities must be a floating-point tensor", "Long"],
    ),
    "probabilities on another device": (
        hessian(f32(4, 4), f32(2, 3, 4), f32(2, 3).to("meta")),
        ["acc is on cpu", "probabilities is on meta"],
    ),
    "probabilities are acc": (
        hessian(MEMORY[:16].view(4, 4), f32(2, 3, 4), MEMORY[:6].view(2, 3)),
        ["acc must not share memory with probabilities"],
    ),
    "jacobian is acc": (
        hessian(MEMORY[:16].view(4, 4), MEMORY[:24].view(2, 3, 4)),
        ["acc must not share memory with jacobian"],
    ),
    # eigen_correction_
    "correction x axes": (
        correction(x=f32(6)),
        ["eigen_correction_: x must be [N, d] or [N, d, t], got [6]"],
    ),
    "correction g axes": (
        correction(g=f32(6, 2, 4, 1)),
        ["g must be [N, r, m] for x [6, 3], got [6, 2, 4, 1]"],
    ),
    "correction g axes with positions": (
        correction(x=f32(6, 3, 5)),
        ["g must be [N, r, m, t] for x [6, 3, 5], got [6, 2, 4]"],
    ),
    "correction positions": (
        correction(g=f32(6, 2, 4, 7), x=f32(6, 3, 5)),
        ["x has 5 positions but g has 7"],
    ),
    "correction samples": (correction(x=f32(5, 3)), ["x has 5 samples but g has 6"]),
    "correction acc": (
        correction(acc=f32(3, 4)),
        ["acc must be [m, d] = [4, 3] for g [6, 2, 4] and x [6, 3], got [3, 4]"],
    ),
    "correction acc with ones": (
        correction(ones=True),
        ["acc must be [m, d] = [4, 4]", "with ones, got [4, 3]"],
    ),
    "correction acc dtype": (
        correction(acc=random((4, 3), BF16)),
        ["eigen_correction_: acc must be float32 or float64, got BFloat16"],
    ),
    "correction acc overlaps itself": (
        correction(acc=f32(1, 3).expand(4, 3)),
        ["acc must have its own memory for every element"],
    ),
    "correction g wider": (
        correction(g=f64(6, 2, 4)),
        ["g is float64, so acc must be float64, got Float"],
    ),
    "correction x wider": (correction(x=f64(6, 3)), ["x is float64, so acc must be float64"]),
    "correction g integer": (
        correction(g=f32(6, 2, 4).long()),
        ["g must be a floating-point tensor, got Long"],
    ),
    "correction U axes": (
        correction(U=f32(4)),
        ["U must be [m, m] or [groups, m / groups, m / groups], got [4]"],
    ),
    "correction U order": (
        correction(U=f32(3, 3)),
        ["U must be [k, k] or [1, k, k] with k = 4 and groups = 1, got [3, 3]"],
    ),
    "correction V order": (
        correction(V=f32(3, 4)),
        ["V must be [k, k] or [1, k, k] with k = 3 and groups = 1, got [3, 4]"],
    ),
    "correction groups of x": (
        correction(U=f32(2, 2, 2)),
        ["U's number of groups must divide the number of inputs 3, got 2"],
    ),
    "correction groups of g": (
        correction(U=f32(3, 1, 1), x=f32(6, 9)),
        ["groups must divide the number of outputs 4, got 3"],
    ),
    "correction V without groups": (
        correction(U=f32(2, 2, 2), x=f32(6, 6)),
        ["V must be [groups, k, k] with k = 3 and groups = 2, got [3, 3]"],
    ),
    "correction U dtype": (correction(U=f64(4, 4)), ["U is Double but acc is Float"]),
    "correction V dtype": (correction(V=f32(3, 3).half()), ["V is Half but acc is Float"]),
    "correction V is acc": (
        correction(acc=MEMORY[:12].view(4, 3), V=MEMORY[6:15].view(3, 3)),
        ["acc must not share memory with V"],
    ),
    "correction device": (
        correction(V=f32(3, 3).to("meta")),
        ["eigen_correction_: acc is on cpu but V is on meta"],
    ),
    # conv_eigen_correction_
    "conv correction x axes": (
        conv_correction(x=X54),
        ["conv_eigen_correction_: x must be [N, C, L] or [N, C, H, W], got [5, 4]"],
    ),
    "conv correction stride": (
        conv_correction(stride=[1]),
        ["conv_eigen_correction_: stride must have 2 entries", "[1]"],
    ),
    "conv correction g": (
        conv_correction(g=f32(2, 1, 4, 4, 3)),
        ["g must be [N, r, m, Ho, Wo] with 3 x 3 positions for x [2, 2, 4, 4]", "[2, 1, 4, 4, 3]"],
    ),
    "conv correction g axes": (
        conv_correction(g=f32(2, 1, 4, 9)),
        ["g must be [N, r, m, Ho, Wo] with 3 x 3 positions"],
    ),
    "conv correction acc": (
        conv_correction(acc=f32(4, 2)),
        ["acc must be [m, d] = [4, 8]", "got [4, 2]"],
    ),
    "conv correction groups": (
        conv_correction(groups=2, acc=f32(4, 4)),
        ["U must be [groups, k, k] with k = 2 and groups = 2, got [4, 4]"],
    ),
    "conv correction device": (
        conv_correction(U=f32(4, 4).to("meta")),
        ["conv_eigen_correction_: acc is on cpu but U is on meta"],
    ),
    # mirror_
    "mirror vector": (
        lambda: ops.mirror_(f32(4)),
        ["mirror_", "acc must be [d, d] or [g, d, d]", "[4]"],
    ),
    "mirror not square": (lambda: ops.mirror_(f32(4, 5)), ["acc must be [d, d]", "[4, 5]"]),
    "mirror four axes": (
        lambda: ops.mirror_(f32(1, 1, 4, 4)),
        ["acc must be [d, d]", "[1, 1, 4, 4]"],
    ),
    "mirror dtype": (
        lambda: ops.mirror_(random((4, 4), BF16)),
        ["acc must be float32 or float64", "BFloat16"],
    ),
    # kron_matmul
    "A axes": (kron(f32(3), f32(4, 5), f32(3, 5)), ["kron_matmul", "A must be [m', m]", "[3]"]),
    "B axes": (kron(f32(2, 3), f32(1, 4, 5), f32(3, 5)), ["B must be [d', d]", "[1, 4, 5]"]),
    "X axes": (kron(f32(2, 3), f32(4, 5), f32(5)), ["X must be [m, d] or [k, m, d]", "[5]"]),
    "X against A": (
        kron(f32(2, 3), f32(4, 5), f32(2, 5)),
        ["X must end in [m, d] = [3, 5]", "[2, 3]", "[4, 5]", "got [2, 5]"],
    ),
    "X against B": (
        kron(f32(2, 3), f32(4, 5), f32(6, 3, 4)),
        ["X must end in [m, d] = [3, 5]", "got [6, 3, 4]"],
    ),
    "X integer": (
        kron(*(f32(2, 2).long() for _ in range(3))),
        ["X must be a floating-point tensor", "Long"],
    ),
    "A dtype": (kron(f64(2, 3), f32(4, 5), f32(3, 5)), ["A is Double", "X is Float"]),
    "B dtype": (kron(f32(2, 3), f64(4, 5), f32(3, 5)), ["B is Double", "X is Float"]),
    "kron device": (
        kron(f32(2, 3), f32(4, 5), f32(3, 5).to("meta")),
        ["kron_matmul", "A is on cpu", "X is on meta"],
    ),
    # grouped_kron_matmul
    "A missing": (
        lambda: ops.grouped_kron_matmul([f32(2, 2)], [f32(2, 2)] * 2, [f32(2, 2)] * 2),
        ["grouped_kron_matmul", "A has 1 entries", "X has 2"],
    ),
    "B missing": (
        lambda: ops.grouped_kron_matmul([f32(2, 2)] * 2, [f32(2, 2)], [f32(2, 2)] * 2),
        ["B has 1 entries", "X has 2"],
    ),
    "X missing": (
        lambda: ops.grouped_kron_matmul([f32(2, 2)], [f32(2, 2)], []),
        ["A has 1 entries", "X has 0"],
    ),
    "second layer": (
        lambda: ops.grouped_kron_matmul([f32(2, 2)] * 2, [f32(2, 2)] * 2, [f32(2, 2), f32(3, 2)]),
        ["grouped_kron_matmul[1]", "X must end in", "got [3, 2]"],
    ),
    "grouped device": (
        lambda: ops.grouped_kron_matmul([f32(2, 2)], [f32(2, 2).to("meta")], [f32(2, 2)]),
        ["grouped_kron_matmul[0]", "A is on cpu", "B is on meta"],
    ),
    # kron_eigen_matmul
    "U axes": (eigen(f32(4), *EIGEN[1:]), ["kron_eigen_matmul", "U must be [m, r]", "[4]"]),
    "V axes": (eigen(*EIGEN[:2], f32(5), EIGEN[3]), ["V must be [d, q]", "[5]"]),
    "S shape": (
        eigen(EIGEN[0], f32(2, 3), *EIGEN[2:]),
        ["S must be [r, q] = [3, 2]", "got [2, 3]"],
    ),
    "eigen X axes": (
        eigen(*EIGEN[:3], f32(1, 1, 4, 5)),
        ["X must be [m, d] or [k, m, d]", "[1, 1, 4, 5]"],
    ),
    "eigen X shape": (
        eigen(*EIGEN[:3], f32(5, 4)),
        ["X must end in [m, d] = [4, 5]", "got [5, 4]"],
    ),
    "eigen X integer": (
        eigen(*EIGEN[:3], f32(4, 5).int()),
        ["X must be a floating-point tensor", "Int"],
    ),
    "U dtype": (eigen(EIGEN[0].double(), *EIGEN[1:]), ["U is Double", "X is Float"]),
    "S dtype": (eigen(EIGEN[0], EIGEN[1].half(), *EIGEN[2:]), ["S is Half", "X is Float"]),
    "V dtype": (eigen(*EIGEN[:2], EIGEN[2].double(), EIGEN[3]), ["V is Double", "X is Float"]),
    "eigen device": (
        eigen(EIGEN[0], EIGEN[1].to("meta"), *EIGEN[2:]),
        ["kron_eigen_matmul", "U is on cpu", "S is on meta"],
    ),
    "U missing": (
        lambda: ops.grouped_kron_eigen_matmul([], *([t] for t in EIGEN[1:])),
        ["grouped_kron_eigen_matmul", "U has 0 entries", "X has 1"],
    ),
    "S missing": (
        lambda: ops.grouped_kron_eigen_matmul([EIGEN[0]], [], [EIGEN[2]], [EIGEN[3]]),
        ["S has 0 entries", "X has 1"],
    ),
    "V missing": (
        lambda: ops.grouped_kron_eigen_matmul([EIGEN[0]], [EIGEN[1]], [], [EIGEN[3]]),
        ["V has 0 entries", "X has 1"],
    ),
    "eigen second layer": (
        lambda: ops.grouped_kron_eigen_matmul(*([t, t] for t in EIGEN[:3]), [EIGEN[3], f32(5, 4)]),
        ["grouped_kron_eigen_matmul[1]", "X must end in"],
    ),
    # layer_hessian_matmul
    "layer x axes": (
        layer(f32(5), f32(5, 2, 3), V34),
        ["layer_hessian_matmul", "x must be [N, d] or [N, d, t]", "[5]"],
    ),
    "s axes": (
        layer(X54, f32(5, 2, 3, 1), V34),
        ["s must be [N, c, m] for x [5, 4]", "[5, 2, 3, 1]"],
    ),
    "s axes with positions": (
        layer(f32(5, 4, 6), f32(5, 2, 3), V34),
        ["s must be [N, c, m, t] for x [5, 4, 6]", "[5, 2, 3]"],
    ),
    "samples": (layer(X54, f32(6, 2, 3), V34), ["x has 5 samples", "s has 6"]),
    "positions": (layer(f32(5, 4, 6), f32(5, 2, 3, 7), V34), ["x has 6 positions", "s has 7"]),
    "V axes of one": (layer(X54, f32(5, 2, 3), f32(12)), ["V must be [m, d] or [k, m, d]", "[12]"]),
    "V shape": (
        layer(X54, f32(5, 2, 3), f32(4, 3)),
        ["V must end in [m, d] = [3, 4]", "got [4, 3]"],
    ),
    "layer x half": (
        layer(X54.half(), f32(5, 2, 3).half(), V34.half()),
        ["x must be float32 or float64", "Half"],
    ),
    "s dtype": (layer(X54, f64(5, 2, 3), V34), ["x is Float", "s is Double"]),
    "packed size": (
        layer(X54, f32(5, 2, 3), V34, 1.0, NOTHING.new_zeros(24)),
        [
            "layer_hessian_matmul: packed must be what pack_layer_inputs gives for x [5, 4]",
            "[0], got [24]",
        ],
    ),
    "packed axes": (
        layer(X54, f32(5, 2, 3), V34, 1.0, NOTHING.view(0, 4)),
        ["packed must be what pack_layer_inputs gives", "got [0, 4]"],
    ),
    "packed dtype": (
        layer(X54, f32(5, 2, 3), V34, 1.0, NOTHING.float()),
        ["packed must be int32, got Float"],
    ),
    "V of float64": (layer(X54, f32(5, 2, 3), V34.double()), ["x is Float", "V is Double"]),
    # pack_layer_inputs
    "inputs axes": (
        lambda: ops.pack_layer_inputs(f32(5), 3),
        ["pack_layer_inputs: x must be [N, d] or [N, d, t], got [5]"],
    ),
    "inputs half": (
        lambda: ops.pack_layer_inputs(X54.half(), 3),
        ["pack_layer_inputs: x must be float32 or float64", "Half"],
    ),
    "inputs columns": (
        lambda: ops.pack_layer_inputs(X54, -1),
        ["columns must not be negative, got -1"],
    ),
    # sampled_cross_entropy_gradient
    "sampled logits": (
        sampled(f32(5), f64(5)),
        ["sampled_cross_entropy_gradient: logits must be [N, c] or [N, c, t], got [5]"],
    ),
    "sampled dtype": (
        sampled(X54.int(), f64(5)),
        ["logits must be float32, float64, bfloat16 or float16, got Int"],
    ),
    "sampled uniform": (
        sampled(f32(5, 4, 2), f64(5)),
        ["uniform must be [N t] = [10] for logits [5, 4, 2], got [5]"],
    ),
    "sampled uniform dtype": (
        sampled(X54, f32(5)),
        ["uniform must be float64, got Float"],
    ),
    "sampled uniform device": (
        sampled(X54, f64(5).to("meta")),
        ["sampled_cross_entropy_gradient: logits is on cpu but uniform is on meta"],
    ),
    "sampled targets": (
        sampled(X54, f64(5), torch.zeros(5, 1).long()),
        ["targets must be [N] for logits [5, 4], got [5, 1]"],
    ),
    "sampled targets with positions": (
        sampled(f32(5, 4, 2), f64(10), torch.zeros(5).long()),
        ["targets must be [N, t] for logits [5, 4, 2], got [5]"],
    ),
    "sampled targets dtype": (
        sampled(X54, f64(5), torch.zeros(5).int()),
        ["targets must be int64, got Int"],
    ),
    "sampled targets device": (
        sampled(X54, f64(5), torch.zeros(5).long().to("meta")),
        ["logits is on cpu but targets is on meta"],
    ),
    "sampled terms": (
        sampled(X54, f64(5), None, -100, torch.ones(4).long()),
        ["terms must be [N] = [5], got [4]"],
    ),
    "sampled terms dtype": (
        sampled(X54, f64(5), None, -100, torch.ones(5)),
        ["terms must be int64, got Float"],
    ),
    "sampled terms device": (
        sampled(X54, f64(5), None, -100, torch.ones(5).long().to("meta")),
        ["logits is on cpu but terms is on meta"],
    ),
    # to_eigenbasis, from_eigenbasis: U [4, 3], V [5, 2], X [4, 5], Y [3, 2]
    "basis U axes": (
        lambda: ops.to_eigenbasis(f32(1, 4, 3), f32(5, 2), f32(4, 5)),
        ["to_eigenbasis: U must be [m, r], got [1, 4, 3]"],
    ),
    "basis V axes": (
        lambda: ops.from_eigenbasis(f32(4, 3), f32(5), f32(3, 2)),
        ["from_eigenbasis: V must be [d, q], got [5]"],
    ),
    "X axes in a basis": (
        lambda: ops.to_eigenbasis(f32(4, 3), f32(5, 2), f32(4)),
        ["to_eigenbasis: X must be [m, d] or [k, m, d], got [4]"],
    ),
    "Y axes": (
        lambda: ops.from_eigenbasis(f32(4, 3), f32(5, 2), f32(1, 1, 3, 2)),
        ["from_eigenbasis: Y must be [r, q] or [k, r, q], got [1, 1, 3, 2]"],
    ),
    "X sizes in a basis": (
        lambda: ops.to_eigenbasis(f32(4, 3), f32(5, 2), f32(6, 3, 2)),
        ["X must end in [m, d] = [4, 5] for U [4, 3] and V [5, 2], got [6, 3, 2]"],
    ),
    "Y sizes": (
        lambda: ops.from_eigenbasis(f32(4, 3), f32(5, 2), f32(4, 5)),
        ["Y must end in [r, q] = [3, 2] for U [4, 3] and V [5, 2], got [4, 5]"],
    ),
    "basis U dtype": (
        lambda: ops.to_eigenbasis(f64(4, 3), f32(5, 2), f32(4, 5)),
        ["to_eigenbasis: U is torch.float64 but X is torch.float32"],
    ),
    "basis V dtype": (
        lambda: ops.from_eigenbasis(f32(4, 3), f64(5, 2), f32(3, 2)),
        ["from_eigenbasis: V is torch.float64 but Y is torch.float32"],
    ),
    "basis of integers": (
        lambda: ops.to_eigenbasis(*(f32(2, 2).long() for _ in range(3))),
        ["to_eigenbasis: X must be a floating-point tensor, got torch.int64"],
    ),
    "basis device": (
        lambda: ops.to_eigenbasis(f32(4, 3), f32(5, 2).to("meta"), f32(4, 5)),
        ["to_eigenbasis: U is on cpu but V is on meta"],
    ),
    "Y device": (
        lambda: ops.from_eigenbasis(f32(4, 3), f32(5, 2), f32(3, 2).to("meta")),
        ["from_eigenbasis: U is on cpu but Y is on meta"],
    ),
    "layer device": (
        layer(X54, f32(5, 2, 3), V34.to("meta")),
        ["layer_hessian_matmul", "x is on cpu", "V is on meta"],
    ),
    "packed device": (
        layer(X54, f32(5, 2, 3), V34, 1.0, NOTHING.to("meta")),
        ["layer_hessian_matmul", "x is on cpu", "packed is on meta"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, parts = BAD[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011, every part is matched below
        call()
    message = str(caught.value).splitlines()[0]
    for part in parts:
        assert part in message, f"{part!r} is missing from {message!r}"


def test_bad_input_changes_nothing() -> None:
    acc = f32(4, 4)
    before = acc.clone()
    for call in (
        covariance(acc, f32(5, 3)),
        conv(acc, IMAGE),
        hessian(acc, f32(2, 3, 4), f32(3, 3)),
        covariance(acc, X54.double()),
    ):
        with pytest.raises(ValueError, match=r"acc must be|probabilities must be"):
            call()
    assert torch.equal(acc, before)
