"""A layer's gradient as one matrix: where it lies in the parameters, and why it does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.passes.layers import (
    LayerSpec,
    bias_of,
    own_parameters,
    shared_weights,
    weight_of,
)

__all__ = ["LayerGradient", "layer_gradients"]


@dataclass(frozen=True)
class LayerGradient:
    """Where the gradient of one layer's block lies.

    Attributes:
        spec: the layer.
        weight: the parameter that holds its weight.
        bias: [m] the parameter that is its bias, where that is trained and belongs to the block.
    """

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None

    @property
    def columns(self) -> int:
        """d of the matrix: inputs, and one more for a bias."""
        return self.spec.weight_inputs + int(self.bias is not None)

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """[m, d] the gradient, output first, a bias's as the last column; None where there is none.

        A bias without gradient beside a weight that has one counts as zero.

        Args:
            dtype: of the result, which may be a view of the gradient.

        Raises:
            TypeError: the gradient is sparse.
        """
        grad = self._of_weight()
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise TypeError(
                f"gradients must be dense, got one of layout {grad.layout} for the weight of layer "
                f"{self.spec.name!r}"
            )
        matrix = (grad.T if self.spec.transposed else grad.flatten(1)).to(dtype)
        if self.bias is None:
            return matrix
        own = self.bias.grad
        column = matrix.new_zeros(len(matrix)) if own is None else own.to(dtype)
        return torch.cat([matrix, column.unsqueeze(1)], 1)

    def write(self, matrix: Tensor) -> None:
        """Puts [m, d] in place of the gradient that :meth:`read` has given."""
        grad = self._of_weight()
        assert grad is not None
        own = matrix[:, : self.spec.weight_inputs]
        grad.copy_(own.T if self.spec.transposed else own.reshape(grad.shape))
        if self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(matrix[:, -1])

    def rate(self, rates: Mapping[int, Any]) -> Any:
        """Learning rate of the layer, of a weight and a bias with their own the higher.

        Not of either its own: their parts of <V, K^-1 V> may be negative by themselves.

        Args:
            rates: by the ids of parameters; what the optimizer has let go of takes no step.
        """
        weight = rates.get(id(self.weight), 0.0)
        bias = weight if self.bias is None else rates.get(id(self.bias), 0.0)
        # A rate may be a tensor on a device; one of both is not waited for.
        return weight if bias is weight else max(weight, bias)

    def _of_weight(self) -> Tensor | None:
        grad = self.weight.grad
        if grad is not None and self.spec.expert is not None:
            return grad[self.spec.expert]
        return grad


def layer_gradients(
    model: nn.Module, specs: Mapping[str, LayerSpec], trained: Collection[int]
) -> tuple[dict[str, LayerGradient], dict[str, str]]:
    """The layers whose gradient can be had as a matrix, and why it cannot of the others.

    Args:
        model: of the layers.
        specs: the layers, by name.
        trained: ids of the optimizer's parameters.
    """
    modules = dict(model.named_modules())
    shared = shared_weights(model, specs)
    found: dict[str, LayerGradient] = {}
    reasons: dict[str, str] = {}
    for name, spec in specs.items():
        module, attribute = weight_of(modules, name)
        weight = own_parameters(module).get(attribute)
        if weight is None:
            reasons[name] = "has a weight that is computed from other parameters"
        elif not weight.requires_grad:
            reasons[name] = "is frozen: its weight does not require gradients"
        elif id(weight) not in trained:
            reasons[name] = "has a weight that is not among the optimizer's parameters"
        elif name in shared:
            reasons[name] = f"has the weight of {shared[name]!r}, whose factors count both"
        else:
            bias = bias_of(modules, spec) if spec.joint else None
            if bias is not None and not (bias.requires_grad and id(bias) in trained):
                bias = None
            found[name] = LayerGradient(spec, weight, bias)
    return found, reasons
