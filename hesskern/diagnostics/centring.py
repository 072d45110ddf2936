"""The same function with centred activations: what a layer's inputs owe to their mean."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.factors.compute import kronecker_factors

__all__ = ["centre_inputs"]


class _Shift(nn.Module):
    """x - mean, with a constant mean [d]."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


def centre_inputs(model: nn.Sequential, data: Iterable[Any], loss: Any = None) -> nn.Sequential:
    """A copy of a network whose Linear layers see centred inputs and that computes the same.

    W x + b = W (x - E[x]) + (b + W E[x]): the mean moves from the inputs into the bias. Function,
    loss and output Hessians stay, while E[x x^T] loses E[x] E[x]^T. What of a layer-wise Hessian's
    structure comes from the mean input is gone.

    Args:
        model: a sequential network; Linear layers with inputs [N, d] and a bias are centred.
        data: re-iterable of (inputs, targets); E[x] is the mean over it.
        loss: None for cross-entropy.

    Raises:
        TypeError: ``model`` is not sequential.
        ValueError: there is no Linear layer with a bias.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model must be a torch.nn.Sequential, got {type(model).__name__}")
    names = [
        name
        for name, module in model.named_children()
        if isinstance(module, nn.Linear) and module.bias is not None
    ]
    if not names:
        raise ValueError("model has no Linear layer with a bias to centre the inputs of")
    factors = kronecker_factors(model, data, loss or nn.CrossEntropyLoss(), names)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in model.named_children():
        module = copy.deepcopy(module)
        if name in factors and factors[name].input_mean.dim() == 1:
            assert isinstance(module, nn.Linear)
            mean = factors[name].input_mean.to(module.weight)
            with torch.no_grad():
                module.bias.add_(module.weight @ mean)
            modules[f"centre_{name}"] = _Shift(mean)
        modules[name] = module
    return nn.Sequential(modules).train(model.training)
