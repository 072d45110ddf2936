"""(E + damping)^-1 of every layer: whether E is the model's, what the damping is, the product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.factors.result import Factors, LayerFactors
from hesskern.operators.damping import check_damping, resolved
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec, select_layers

__all__ = ["Curvature", "curvature_of"]


@dataclass(frozen=True)
class Curvature:
    """The layers that count, and their damped curvature.

    Attributes:
        specs: layers by name, in the model's order.
        operators: E by layer; empty for the identity.
        damping: what is added to the eigenvalues, by layer.
        skipped: other layers, with the reason.
    """

    specs: dict[str, LayerSpec]
    operators: dict[str, EigenbasisOperator]
    damping: dict[str, float]
    skipped: dict[str, str]

    def solve(self, name: str, gradients: Tensor) -> Tensor:
        """(E + damping)^-1 of a layer times gradients [q, g, m/g, d]."""
        if not self.operators:
            return gradients
        E, damping = self.operators[name], self.damping[name]
        left, right, _ = E.eigenbases
        inverse = [1 / (s + damping) for s in E.settled]
        blocks = [block.contiguous() for block in gradients.to(E.dtype).unbind(1)]
        solved = ops.grouped_kron_eigen_matmul(left, inverse, right, blocks)
        return torch.stack(solved, 1).to(gradients.dtype)


def curvature_of(
    E: Any, model: nn.Module, layers: str | Iterable[str] | None, damping: Any
) -> Curvature:
    """E and the damping as the layers of a model take them.

    Args:
        E: operators or factors by layer; None for the identity.
        model: of E.
        layers: names or patterns of those that count; None for all of E, or of the model.
        damping: "mean", a number, or numbers by layer.

    Raises:
        TypeError: E is no mapping, or holds something else than operators with an eigenbasis and
            factors; ``damping`` is none of these.
        ValueError: E is empty or a part alone, has a layer that the model has not, of another shape
            or on another device; ``damping`` is negative or not finite, lacks a layer, or leaves a
            layer's curvature singular.
    """
    if E is None:
        specs, skipped = select_layers(model, layers, "none")
        if not (isinstance(damping, str) and damping == "mean"):
            raise ValueError(f"damping has no meaning without E, got {damping!r}")
        return Curvature(specs, {}, {}, skipped)
    if not isinstance(E, Mapping):
        raise TypeError(
            "E must be a mapping from layers to operators or factors (hk.ekfac, "
            f"hk.kronecker_factors), or None; got {type(E).__name__}"
        )
    if (part := getattr(E, "part", None)) is not None:
        load = "load_factors" if isinstance(E, Factors) else "load_ekfac"
        raise ValueError(f"E: {part.refusal('a curvature', load)}")
    if not E:
        raise ValueError("E is empty: it has no layer to go through")
    specs, skipped = _chosen(E, model, layers)
    operators = {name: _operator(name, E[name]) for name in specs}
    device = model_device(model)
    for name, operator in operators.items():
        if operator.device != device:
            raise ValueError(
                f"E: layer {name!r} is on {operator.device}, the model on {device}; move one"
            )
    numbers = _damping(damping, operators)
    for name, operator in operators.items():
        operator.require_positive(numbers[name], "influence", name)
    return Curvature(specs, operators, numbers, skipped)


def _chosen(
    E: Mapping[str, Any], model: nn.Module, layers: str | Iterable[str] | None
) -> tuple[dict[str, LayerSpec], dict[str, str]]:
    known, skipped = select_layers(model, layers, "none")
    joint, _ = select_layers(model, layers, "joint")
    names = E if layers is None else [name for name in E if name in known]
    for name in names:
        if name not in known:
            raise ValueError(
                f"E has a layer {name!r}, which the model has not (it has {', '.join(known)}): E "
                "belongs to another model"
            )
    specs = {}
    for name, spec in known.items():
        if name in E:
            # Some have no block with a bias.
            specs[name] = _matching(name, E, (spec, joint.get(name, spec)))
        elif spec.required:
            raise ValueError(f"layers: {name!r} is not in E, which has {', '.join(E)}")
        else:
            skipped[name] = "is not in E"
    if not specs:
        raise ValueError(f"layers: none of {', '.join(known)} is in E, which has {', '.join(E)}")
    return specs, skipped


def _matching(name: str, E: Mapping[str, Any], specs: tuple[LayerSpec, ...]) -> LayerSpec:
    """The layer with or without its bias, whichever E has."""
    operator = _operator(name, E[name])
    # What E says of the layer's geometry, where it does: strides and padding are in no shape.
    given = getattr(E[name], "spec", None) or getattr(E, "specs", {}).get(name)
    for spec in specs:
        same = (operator.layer_shape, operator.groups) == (spec.shape, spec.groups)
        if same and given in (None, spec):
            return spec
    spec = specs[0]
    raise ValueError(
        f"E: layer {name!r} has {_geometry(operator.layer_shape, operator.groups, given)} there, "
        f"{_geometry(spec.shape, spec.groups, spec)} in the model: E belongs to another model"
    )


def _geometry(shape: tuple[int, int], groups: int, spec: LayerSpec | None) -> str:
    text = f"[m, d] = {list(shape)}"
    text += f" and {groups} groups" if groups > 1 else ""
    text += " with a bias" if spec is not None and spec.joint else ""
    if spec is not None and spec.kind == "conv":
        fields = ("kernel_size", "stride", "padding", "dilation")
        text += "".join(f", {field} {getattr(spec, field)}" for field in fields)
    return text


def _operator(name: str, value: Any) -> EigenbasisOperator:
    if isinstance(value, LayerFactors):
        return value.operator()
    if not isinstance(value, EigenbasisOperator):
        raise TypeError(
            f"E[{name!r}] must have a Kronecker eigenbasis (as layers of hk.ekfac have, and "
            f"KroneckerOperator) or be a layer's factors, got {type(value).__name__}"
        )
    return value


def _damping(damping: Any, operators: Mapping[str, EigenbasisOperator]) -> dict[str, float]:
    if isinstance(damping, Mapping):
        other = [name for name in damping if name not in operators]
        missing = [name for name in operators if name not in damping]
        if other or missing:
            text = f"lacks {', '.join(missing)}" if missing else f"names {', '.join(other)}, too"
            raise ValueError(
                f"damping must have a number for each of {', '.join(operators)}; it {text}"
            )
    else:
        check_damping(damping, None)
        damping = dict.fromkeys(operators, damping)
    found = {}
    for name, E in operators.items():
        trace = E.trace() if damping[name] == "mean" else 0.0
        found[name] = resolved(damping[name], trace, E.shape[0], name)
    return found
