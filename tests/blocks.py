"""Blocks of small models by every entry point, against torch's Jacobian of the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from dense import gauss_newton, loss_hessian, relative_error
from networks import CE, classes, randn, sample_loss
from torch import Tensor, nn

import hesskern as hk

Data = list[tuple[Any, Tensor]]


class Net(nn.Module):
    """Modules, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The answer where its warnings are not what is looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the Gauss-Newton block|left out", UserWarning)
        return function(*args, **kwargs)


def hessians(*args: Any, **kwargs: Any) -> hk.LayerHessians:
    """``layer_hessians`` where its warnings are not what is looked at."""
    return quietly(hk.layer_hessians, *args, **kwargs)


def check_blocks(
    model: nn.Module, data: Data, layers: set[str], plain: nn.Module | None = None
) -> hk.LayerHessians:
    """Every layer's block by layer_hessians and GaussNewton, against torch's Jacobian.

    Args:
        model: to look at.
        data: batches.
        layers: that must be there.
        plain: the same function where torch cannot differentiate the model as it is.
    """
    found = quietly(hk.layer_hessians, model, data, CE)
    assert set(found) == layers, found.skipped
    G = quietly(hk.GaussNewton, model, data, CE).to_dense()
    slices = quietly(hk.GaussNewton, model, data, CE).slices
    factors = quietly(hk.kronecker_factors, model, data, CE)
    assert set(factors) == layers
    for name, H in found.items():
        expected = gauss_newton(plain or model, data, sample_loss, name)
        if H.transposed:
            m, d = H.layer_shape
            assert expected.shape == (m * d, m * d)
        assert relative_error(H.to_dense(), expected) <= 1e-10
        assert relative_error(G[slices[name], slices[name]], expected) <= 1e-10
        if H.is_exact:
            whole = loss_hessian(plain or model, data, sample_loss, name)
            assert relative_error(H.to_dense(), whole) <= 1e-10
    return found


def said(function: Callable[..., Any], model: nn.Module, data: Data, layer: str) -> str:
    """Why a layer is left out, or why all are."""
    try:
        return quietly(function, model, data, CE).skipped[layer]
    except ValueError as error:
        return str(error)


def check_refused(model: nn.Module, data: Data, layer: str, reason: str) -> None:
    """The layer is left out with the reason, and refused when it is asked for by name."""
    for function in (hk.kronecker_factors, hk.layer_hessians, hk.GaussNewton):
        assert reason in said(function, model, data, layer)
        with pytest.raises(ValueError, match=f"'{layer}'"):
            function(model, data, CE, layers=[layer])


def batches(*sizes: int, shape: tuple[int, ...] = (4,)) -> Data:
    return [
        (randn(n, *shape, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate(sizes, start=1)
    ]
