"""Bytes that operators take inside, which no tensor outside shows; those of the host's kernels.

Each is what the kernel named beside it takes; some depend on the processor's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesskern.devices import on_host
from hesskern.planning.corrections import conv_correction_bytes, correction_bytes

__all__ = ["workspace_bytes"]

# Bytes of a vector.
_VECTOR = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
# Bytes of a panel's row, its rows, elements that are packed at a time, slabs of such rows at least,
# panels of a block, order up to which threads have sums of their own, rows below which nothing is
# packed, slabs that are summed apart (csrc/cpu/blas/triangle.h, few_rows.h).
_LINE, _PANEL_ROWS, _CHUNK, _SLABS, _BLOCK = 2 * _VECTOR, 128, 2**20, 2, 8
_PRIVATE, _FEW, _LEVEL = 256, 32, 64
# Numbers, and rows at least, that are brought into the accumulator's dtype at a time
# (csrc/cpu/output_hessian.cpp, input_covariance.cpp).
_CONVERTED, _CONVERTED_ROWS = 2**20, 256
# Elements of the signals that a convolution's covariance transforms at a time (csrc/cpu/conv/
# paths.h), and what it takes of tables beside them.
_SIGNALS, _TABLES = 2**21, 2**19
# Channels that oneDNN's convolutions keep together: a vector of float32.
_CHANNELS = max(8, _VECTOR // 4)


def workspace_bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes of one call; 0 on a device, whose libraries have a workspace of their own.

    Args:
        func: the operator.
        args, kwargs: its arguments.
    """
    found = _TAKEN.get(func._opname)
    if found is None or not isinstance(args[0], Tensor) or not on_host(args[0]):
        return 0
    return found(*args, **kwargs)


def _eigenpairs(matrix: Tensor, *_: Any, **__: Any) -> int:
    n, size = matrix.shape[-1], matrix.element_size()
    # LAPACK's syevd: 1 + 6 n + 2 n^2 numbers and 3 + 5 n integers, for one matrix after another.
    return size * (1 + 6 * n + 2 * n * n) + 4 * (3 + 5 * n)


def _gram(rows: int, d: int, size: int) -> int:
    """Of a sum of rows [rows, d] by their outer products."""
    if rows <= _FEW or not d:
        return 0
    width = max(1, _LINE // size)
    panels = -(-d // width)
    slab = panels * _PANEL_ROWS * width
    threads = max(1, min(rows * d * (d + 32) // 2**20, torch.get_num_threads()))
    if d > _PRIVATE or rows < 8 * threads or 2 * rows < d:
        slabs = min(max(_SLABS, _CHUNK // slab), _LEVEL, -(-rows // _PANEL_ROWS))
        return size * (slab * slabs + threads * (_BLOCK * width) ** 2)
    # Many slabs are summed apart, and those sums by themselves.
    levels = 2 if (rows // threads + _PANEL_ROWS) // _PANEL_ROWS > _LEVEL else 1
    units = levels * panels * (panels + 1) // 2
    return size * threads * (units * width * width + slab)


def _input_covariance(acc: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    (n, d), size = x.shape, acc.element_size()
    if x.dtype == acc.dtype or not x.numel():
        return _gram(n, acc.shape[-1], size)
    rows = min(n, max(_CONVERTED_ROWS, _CONVERTED // d))
    return rows * d * size + _gram(rows, acc.shape[-1], size)


def _output_hessian(acc: Tensor, jacobian: Tensor, *_: Any, **__: Any) -> int:
    m, n, size = acc.shape[-1], len(jacobian), acc.element_size()
    laid_out, same = _laid_out(jacobian), jacobian.dtype == acc.dtype
    if (same and laid_out) or not jacobian.numel():
        return _gram(jacobian.numel() // max(1, m), m, size)
    each = jacobian.numel() // n
    numbers = each * min(n, max(1, _CONVERTED // each))
    # In another dtype, and then in another order.
    copies = (not same) + (not laid_out)
    return copies * numbers * size + _gram(numbers // m, m, size)


def _laid_out(jacobian: Tensor) -> bool:
    """Whether a kernel takes [N, c, m(, t)] as it lies in memory."""
    if jacobian.shape[2] == 1 or jacobian.stride(2) == 1:
        return True
    if jacobian.dim() == 3:
        return False
    t = jacobian.shape[3]
    return (t == 1 or jacobian.stride(3) == 1) and jacobian.stride(2) == t


def _conv_input_covariance(acc: Tensor, x: Tensor, kernel_size: list[int], *_: Any) -> int:
    if all(size == 1 for size in kernel_size):
        return _gram(x.numel() // x.shape[1], acc.shape[-1], acc.element_size())
    given = x.numel() * acc.element_size()
    return min(acc.element_size() * _SIGNALS, given * 3 // 2 + min(_TABLES, 2 * given))


def _packed(*tensors: Tensor | None) -> int:
    """Of copies of those that are not contiguous."""
    return sum(
        t.numel() * t.element_size() for t in tensors if t is not None and not t.is_contiguous()
    )


def _conv_input_gradient(out: Tensor, grad: Tensor, weight: Tensor, *_: Any) -> int:
    return _packed(grad) + weight.numel() * weight.element_size()


def _max_pool_input_gradient(
    out: Tensor,
    grad: Tensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    factor: Tensor | None = None,
    relu: Tensor | None = None,
) -> int:
    return _packed(out, grad, indices, factor, relu)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *_: Any,
) -> int:
    if transposed or x.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return 0
    positions, axes = len(x), range(x.dim() - 2)
    for i in axes:
        reach = dilation[i] * (weight.shape[2 + i] - 1)
        positions *= (x.shape[2 + i] + 2 * padding[i] - reach - 1) // stride[i] + 1
    # The result with its channels together, before it is put in torch's order.
    return positions * -(-weight.shape[0] // _CHANNELS) * _CHANNELS * x.element_size()


_TAKEN: dict[str, Callable[..., int]] = {
    "_linalg_eigh": _eigenpairs,
    "linalg_eigh": _eigenpairs,
    "input_covariance_": _input_covariance,
    "output_hessian_": _output_hessian,
    "conv_eigen_correction_": conv_correction_bytes,
    "conv_input_covariance_": _conv_input_covariance,
    "conv_input_gradient_": _conv_input_gradient,
    "max_pool_input_gradient_": _max_pool_input_gradient,
    "convolution": _convolution,
    "eigen_correction_": correction_bytes,
}
