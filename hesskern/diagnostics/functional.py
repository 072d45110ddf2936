"""The part of a layer's Hessian that its Gauss-Newton block leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from hesskern.diagnostics.metrics import DecouplingError, decoupling_error
from hesskern.operators.autograd import AutogradHessian
from hesskern.operators.layer_hessian import layer_hessians
from hesskern.passes.layers import parameter_of

__all__ = ["functional_share"]


def functional_share(
    model: nn.Module,
    data: Iterable[Any],
    loss: Any,
    layer: str,
    *,
    probes: int = 16,
    seed: int = 0,
    dense_below: int = 2048,
    memory_budget: int | None = None,
) -> DecouplingError:
    """Relative size of the functional term F = H - E[M (x) x x^T] in a layer's Hessian H.

    F is the mean of the loss gradient times the outputs' second derivative in the weights. It is
    zero behind a layer of piecewise linear operations, and not for tanh, GELU and their like.
    H comes from double backward passes (:class:`hesskern.AutogradHessian`).

    Args:
        model, data, loss: as in :func:`hesskern.layer_hessians`; data is re-iterable.
        layer: name of a layer.
        probes, seed, dense_below: see :func:`hesskern.decoupling_error`.
        memory_budget: bytes of samples kept, as in :func:`hesskern.layer_hessians`.

    Returns:
        ‖F‖ / ‖H‖ in the spectral and the Frobenius norm.

    Raises:
        ValueError: as in :func:`hesskern.layer_hessians`, or H is zero.
    """
    with warnings.catch_warnings():
        # That the block is not the Hessian is the point here.
        warnings.simplefilter("ignore", UserWarning)
        block = layer_hessians(model, data, loss, [layer], memory_budget=memory_budget)[layer]
    whole = AutogradHessian(model, data, loss, params=[parameter_of(model, layer)])
    return decoupling_error(whole, block, probes=probes, seed=seed, dense_below=dense_below)
