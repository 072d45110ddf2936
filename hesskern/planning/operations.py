"""Floating-point operations of torch's operators and this package's, by their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from hesskern.graph.nodes import product

__all__ = ["count_operations"]

# Of a symmetric eigenproblem [n, n] with its eigenvectors, in multiples of n^3 (Golub and Van Loan,
# Matrix Computations, section 8.3).
_EIGEN = 9


def count_operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Operations of one call; a multiplication and the addition after it count as two.

    Elementwise operations count as none, as they do in torch's own counter.

    Args:
        func: the operator.
        args, kwargs: its arguments.
        out: its result.
    """
    if func.namespace.startswith("hesskern"):
        counted = _OWN.get(func._opname)
        return 0 if counted is None else int(counted(*args, **kwargs))
    if func._opname in ("_linalg_eigh", "linalg_eigh"):
        return _EIGEN * args[0].numel() * int(args[0].shape[-1])
    counter = flop_registry.get(func._overloadpacket)
    return 0 if counter is None else int(counter(*args, **kwargs, out_val=out))


def _input_covariance(acc: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    # Half of a symmetric product.
    d = acc.shape[-1]
    return len(x) * d * (d + 1)


def _conv_input_covariance(
    acc: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *_: Any,
) -> int:
    positions = len(x)
    axes = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    for size, kernel, step, pad, spread in axes:
        positions *= (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
    d = acc.shape[-1]
    return positions * (acc.numel() // (d * d)) * d * (d + 1)


def _output_hessian(acc: Tensor, jacobian: Tensor, *_: Any) -> int:
    m = acc.shape[-1]
    return jacobian.numel() // m * m * (m + 1)


def _eigen_correction(acc: Tensor, g: Tensor, x: Tensor, U: Tensor, V: Tensor, *_: Any) -> int:
    (n, r, m), t = g.shape[:3], product(g.shape[3:])
    d, groups = V.shape[-1], (V.shape[0] if V.dim() == 3 else 1)
    if t == 1:
        return 2 * n * (r * m * m // groups + groups * d * d + m * d)
    # Both rotated before they meet, or their products after.
    before = n * t * (r * m * m // groups + groups * d * d) + n * r * t * m * d
    after = n * r * m * d * (t + d + m // groups)
    return 2 * min(before, after)


def _conv_eigen_correction(acc: Tensor, g: Tensor, x: Tensor, *rest: Any) -> int:
    return _eigen_correction(acc, g, x, *rest)


def _conv_input_gradient(out: Tensor, grad: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * grad.numel() * product(weight.shape[1:])


_OWN: dict[str, Callable[..., int]] = {
    "input_covariance_": _input_covariance,
    "conv_input_covariance_": _conv_input_covariance,
    "output_hessian_": _output_hessian,
    "eigen_correction_": _eigen_correction,
    "conv_eigen_correction_": _conv_eigen_correction,
    "conv_input_gradient_": _conv_input_gradient,
}
