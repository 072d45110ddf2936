"""(E + damping)^-1 of every layer: whether E is the model's, what the damping is, the product."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.factors.result import Factors, LayerFactors
from hesskern.operators.damping import check_damping, resolved
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec, select_layers

__all__ = [
    "Curvature",
    "check_operators",
    "chosen",
    "curvature_of",
    "damping_of",
    "other_model",
]


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
    specs, skipped = chosen(E, model, layers, partial(_matching, E))
    operators = {name: _operator(name, E[name]) for name in specs}
    sizes = {name: operator.shape[0] for name, operator in operators.items()}
    numbers = damping_of(damping, sizes, lambda name: operators[name].trace())
    check_operators(operators, numbers, model)
    return Curvature(specs, operators, numbers, skipped)


def check_operators(
    operators: Mapping[str, EigenbasisOperator], numbers: Mapping[str, float], model: nn.Module
) -> None:
    """Raises ValueError for operators on another device than the model, or singular ones."""
    device = model_device(model)
    for name, operator in operators.items():
        if operator.device != device:
            raise ValueError(
                f"E: layer {name!r} is on {operator.device}, the model on {device}; move one"
            )
        operator.require_positive(numbers[name], "influence", name)


def chosen(
    E: Collection[str],
    model: nn.Module,
    layers: str | Iterable[str] | None,
    matching: Callable[[str, tuple[LayerSpec, LayerSpec]], LayerSpec],
) -> tuple[dict[str, LayerSpec], dict[str, str]]:
    """The layers that count, and why others do not.

    Args:
        E: names of its layers.
        model, layers: as in :func:`curvature_of`.
        matching: gives a layer with or without its bias, whichever E has, or refuses it.
    """
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
            specs[name] = matching(name, (spec, joint.get(name, spec)))
        elif spec.required:
            raise ValueError(f"layers: {name!r} is not in E, which has {', '.join(E)}")
        else:
            skipped[name] = "is not in E"
    if not specs:
        raise ValueError(f"layers: none of {', '.join(known)} is in E, which has {', '.join(E)}")
    return specs, skipped


def _matching(E: Mapping[str, Any], name: str, specs: tuple[LayerSpec, LayerSpec]) -> LayerSpec:
    """The layer with or without its bias, whichever E has."""
    operator = _operator(name, E[name])
    # What E says of the layer's geometry, where it does: strides and padding are in no shape.
    given = getattr(E[name], "spec", None) or getattr(E, "specs", {}).get(name)
    for spec in specs:
        same = (operator.layer_shape, operator.groups) == (spec.shape, spec.groups)
        if same and given in (None, spec):
            return spec
    raise other_model(name, _geometry(operator.layer_shape, operator.groups, given), specs[0])


def other_model(name: str, there: str | LayerSpec, here: LayerSpec) -> ValueError:
    """The error of a layer that has another geometry in E, in words or not."""
    if isinstance(there, LayerSpec):
        there = _geometry(there.shape, there.groups, there)
    return ValueError(
        f"E: layer {name!r} has {there} there, {_geometry(here.shape, here.groups, here)} in the "
        "model: E belongs to another model"
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


def damping_of(
    damping: Any, sizes: Mapping[str, int], trace: Callable[[str], float]
) -> dict[str, float]:
    """What is added to each layer's eigenvalues.

    Args:
        damping: "mean", a number, or numbers by layer.
        sizes: number of eigenvalues by layer.
        trace: their sum, by a layer's name; asked for where "mean" is.

    Raises:
        TypeError, ValueError: it is none of these, negative or not finite, or lacks a layer.
    """
    if isinstance(damping, Mapping):
        other = [name for name in damping if name not in sizes]
        missing = [name for name in sizes if name not in damping]
        if other or missing:
            text = f"lacks {', '.join(missing)}" if missing else f"names {', '.join(other)}, too"
            raise ValueError(
                f"damping must have a number for each of {', '.join(sizes)}; it {text}"
            )
    else:
        check_damping(damping, None)
        damping = dict.fromkeys(sizes, damping)
    found = {}
    for name, size in sizes.items():
        mean = isinstance(damping[name], str) and damping[name] == "mean"
        found[name] = resolved(damping[name], trace(name) if mean else 0.0, size, name)
    return found
