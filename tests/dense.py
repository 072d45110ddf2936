"""Dense references, independent of the package: torch's own derivatives, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

SampleLoss = Callable[[Tensor, Any], Tensor]
"""Loss of one sample: outputs [1, ...] and its target(s) [1, ...] to a scalar."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖_F / ‖expected‖_F; of a zero reference the absolute error."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(expected.double().norm()) or 1.0
    return float((actual.double() - expected.double()).norm()) / scale


def run(model: nn.Module, inputs: Any, overrides: dict[str, Tensor] | None = None) -> Tensor:
    """Outputs [N, ...] in eval mode, parameters replaced by name; tied ones only where named."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    training = [module.training for module in model.modules()]
    model.eval()
    outputs = functional_call(model, overrides or {}, args, kwargs, tie_weights=False)
    for module, mode in zip(model.modules(), training, strict=True):
        module.training = mode
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def _weight(model: nn.Module, layer: str, joint: bool) -> Tensor:
    """[m, d] weight, or [m, d + 1] with the bias as the last column."""
    module = model.get_submodule(layer)
    weight = module.weight.detach().flatten(1)
    return torch.cat([weight, module.bias.detach()[:, None]], 1) if joint else weight.clone()


def _overrides(model: nn.Module, layer: str, matrix: Tensor, joint: bool) -> dict[str, Tensor]:
    prefix = f"{layer}." if layer else ""
    shape = model.get_submodule(layer).weight.shape
    if not joint:
        return {f"{prefix}weight": matrix.reshape(shape)}
    return {f"{prefix}weight": matrix[:, :-1].reshape(shape), f"{prefix}bias": matrix[:, -1]}


def _total(weights: Sequence[Tensor | None], counts: Sequence[int]) -> float:
    return sum(
        float(count if weight is None else weight.sum())
        for weight, count in zip(weights, counts, strict=True)
    )


def loss_hessian(
    model: nn.Module,
    data: Iterable[Any],
    loss: SampleLoss,
    layer: str,
    *,
    joint: bool = False,
    weights: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """[P, P] Hessian of the (weighted) mean loss in a layer's weight, by double backward."""
    batches = list(data)
    weights = weights or [None] * len(batches)
    matrix = _weight(model, layer, joint)

    def mean_loss(flat: Tensor) -> Tensor:
        overrides = _overrides(model, layer, flat.reshape(matrix.shape), joint)
        total = flat.new_zeros(())
        for (inputs, targets), weight in zip(batches, weights, strict=True):
            outputs = run(model, inputs, overrides)
            for n in range(len(outputs)):
                share = 1.0 if weight is None else weight[n]
                total = total + share * loss(outputs[n : n + 1], targets[n : n + 1])
        return total / _total(weights, [len(targets) for _, targets in batches])

    return torch.autograd.functional.hessian(mean_loss, matrix.flatten())


def jacobians(
    model: nn.Module, inputs: Any, layer: str, *, joint: bool = False
) -> tuple[Tensor, Tensor]:
    """[N, outputs per sample, P] Jacobian in the layer's weight, and the outputs [N, ...]."""
    matrix = _weight(model, layer, joint)

    def outputs(flat: Tensor) -> Tensor:
        return run(model, inputs, _overrides(model, layer, flat.reshape(matrix.shape), joint))

    value = outputs(matrix.flatten()).detach()
    jacobian = torch.autograd.functional.jacobian(outputs, matrix.flatten())
    return jacobian.reshape(len(value), -1, matrix.numel()), value


def output_curvature(loss: SampleLoss, outputs: Tensor, targets: Any) -> Tensor:
    """[N, c, c] Hessian of every sample's loss in its own (flattened) outputs."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda f, n=n: loss(f.reshape(outputs[n : n + 1].shape), targets[n : n + 1]),
                outputs[n].detach().flatten(),
            )
            for n in range(len(outputs))
        ]
    )


def gauss_newton(
    model: nn.Module,
    data: Iterable[Any],
    loss: SampleLoss,
    layer: str,
    *,
    joint: bool = False,
    weights: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """[P, P] (weighted) mean of J^T A J in a layer's weight."""
    batches = list(data)
    weights = weights or [None] * len(batches)
    parts = []
    for (inputs, targets), weight in zip(batches, weights, strict=True):
        jacobian, outputs = jacobians(model, inputs, layer, joint=joint)
        curvature = output_curvature(loss, outputs, targets)
        share = jacobian.new_ones(len(outputs)) if weight is None else weight
        parts.append(torch.einsum("ncp,ncb,nbq,n->pq", jacobian, curvature, jacobian, share))
    return sum(parts) / _total(weights, [len(targets) for _, targets in batches])
