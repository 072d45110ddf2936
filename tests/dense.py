"""Dense references, independent of the package: torch's own derivatives, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

SampleLoss = Callable[[Tensor, Any], Tensor]
"""Loss of one sample: outputs [1, ...] and its target(s) [1, ...] to a scalar."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖_F / ‖expected‖_F; of a zero reference the absolute error."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(expected.double().norm()) or 1.0
    return float((actual.double() - expected.double()).norm()) / scale


def run(model: nn.Module, inputs: Any, overrides: dict[str, Tensor] | None = None) -> Tensor:
    """Outputs [N, ...] in eval mode, parameters replaced by name; tied ones all together."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    training = [module.training for module in model.modules()]
    model.eval()
    outputs = functional_call(model, overrides or {}, args, kwargs)
    for module, mode in zip(model.modules(), training, strict=True):
        module.training = mode
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def _weight(model: nn.Module, layer: str, joint: bool) -> Tensor:
    """[m, d] weight, or [m, d + 1] with the bias as the last column."""
    weight = model.get_parameter(parameter_name(model, layer)).detach().flatten(1)
    if not joint:
        return weight.clone()
    return torch.cat([weight, model.get_submodule(layer).bias.detach()[:, None]], 1)


def parameter_name(model: nn.Module, layer: str) -> str:
    """Of a layer's weight: that of a module, or a parameter without "_weight" at its end."""
    names = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{layer}." if layer else ""
    return next(name for name in (f"{prefix}weight", f"{layer}_weight", layer) if name in names)


def _overrides(model: nn.Module, layer: str, matrix: Tensor, joint: bool) -> dict[str, Tensor]:
    prefix, name = f"{layer}." if layer else "", parameter_name(model, layer)
    shape = model.get_parameter(name).shape
    if not joint:
        return {name: matrix.reshape(shape)}
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

    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
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


def rows_hessian(
    model: nn.Module,
    data: Iterable[Any],
    rows: Sequence[Tensor],
    layer: str,
    *,
    joint: bool = False,
    weights: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """[P, P] (weighted) mean of J^T q q^T J in a layer's weight, q a sample's given rows.

    Args:
        rows: per batch [r, N, outputs per sample].
    """
    batches = list(data)
    weights = weights or [None] * len(batches)
    parts = []
    for (inputs, _), row, weight in zip(batches, rows, weights, strict=True):
        jacobian, _ = jacobians(model, inputs, layer, joint=joint)
        share = jacobian.new_ones(len(jacobian)) if weight is None else weight
        products = torch.einsum("rnc,ncp->rnp", row, jacobian)
        parts.append(torch.einsum("rnp,rnq,n->pq", products, products, share))
    return sum(parts) / _total(weights, [len(targets) for _, targets in batches])


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """[d, t] columns that a layer's weight sees of one sample's input [d], [t, d] or [C, (H,) W].

    Cut out one position at a time; d counts the channels of all groups.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    axes = x.dim() - 1
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if module.padding == "valid":
        padding = [(0, 0)] * axes
    elif module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [(p, p) for p in module.padding]
    flat = [amount for pair in reversed(padding) for amount in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = torch.nn.functional.pad(x[None], flat, mode=mode)[0]
    sizes = [
        (x.shape[i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(axes)
    ]
    columns = []
    for position in torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, axes):
        cut = x
        for i, p in enumerate(position.tolist()):
            first = p * stride[i]
            index = torch.arange(kernel[i]) * dilation[i] + first
            cut = cut.index_select(i + 1, index)
        columns.append(cut.flatten())
    return torch.stack(columns, 1)


def _root_rows(z: list[Tensor], outputs: Tensor) -> list[Tensor]:
    """Per use [outputs per sample, m, t] Jacobian of one sample's outputs in a layer's outputs."""
    rows: list[list[Tensor]] = [[] for _ in z]
    for element in outputs.flatten():
        grads = torch.autograd.grad(
            element, z, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for use, grad in zip(rows, grads, strict=True):
            use.append(grad)
    return [torch.stack(use) for use in rows]


def layer_factors(
    model: nn.Module,
    data: Iterable[Any],
    loss: SampleLoss,
    layer: str,
    *,
    joint: bool = False,
    weights: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Both Kronecker factors and the mean input of a layer, by a loop over single samples.

    Returns:
        ``input_covariance`` [d, d] or [g, d, d] summed over positions and uses, ``output_hessian``
        [m, m] averaged over them, ``input_mean`` [g d (+ 1), t] and ``positions``.
    """
    module = model.get_submodule(layer)
    batches = list(data)
    weights = weights or [None] * len(batches)
    groups = getattr(module, "groups", 1)
    covariance = hessian = mean = torch.zeros(()).double()
    total = 0.0
    for (inputs, targets), weight in zip(batches, weights, strict=True):
        for n in range(len(targets)):
            share = 1.0 if weight is None else float(weight[n])
            uses: list[tuple[Tensor, Tensor]] = []

            def hook(_: nn.Module, args: Any, z: Tensor, uses: Any = uses) -> Tensor:
                z = z.detach().requires_grad_() if not z.requires_grad else z
                uses.append((args[0].detach(), z))
                return z.clone()

            # A weight's uses are those of all modules that hold it.
            handles = [
                other.register_forward_hook(hook)
                for other in model.modules()
                if getattr(other, "weight", None) is module.weight
            ]
            outputs = run(model, _sample(inputs, n))
            for handle in handles:
                handle.remove()
            curvature = output_curvature(loss, outputs, targets[n : n + 1])[0]
            jacobians_of_uses = _root_rows([z for _, z in uses], outputs)
            x = torch.cat([patches(module, x[0]) for x, _ in uses], 1)
            g = torch.cat(
                [
                    (
                        j[:, 0].flatten(2)
                        if not isinstance(module, nn.Linear)
                        else j[:, 0].reshape(len(j), -1, j.shape[-1]).transpose(1, 2)
                    )
                    for j in jacobians_of_uses
                ],
                2,
            )
            positions = x.shape[1]
            parts = x.reshape(groups, -1, positions)
            if joint:
                parts = torch.cat([parts, parts.new_ones(groups, 1, positions)], 1)
            covariance = covariance + share * parts @ parts.transpose(1, 2)
            hessian = hessian + share * torch.einsum("cit,cb,bjt->ij", g, curvature, g) / positions
            mean = mean + share * (torch.cat([x, x.new_ones(1, positions)]) if joint else x)
            total += share
    return {
        "input_covariance": (covariance if groups > 1 else covariance[0]) / total,
        "output_hessian": hessian / total,
        "input_mean": mean / total,
    }


def _sample(inputs: Any, n: int) -> Any:
    if isinstance(inputs, dict):
        return {key: value[n : n + 1] for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(value[n : n + 1] for value in inputs)
    return inputs[n : n + 1]
