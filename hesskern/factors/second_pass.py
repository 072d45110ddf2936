"""What EKFAC's second pass begins with: layers, reasons, and eigenvectors of their factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hesskern.choices import Bias, Precision
from hesskern.factors.eigenbases import Bases, eigenbases
from hesskern.factors.result import Factors, LayerFactors
from hesskern.graph.evidence import Evidence
from hesskern.operators.corrected import CorrectedOperator
from hesskern.parallel.ranks import Ranks
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec, own_parameters, select_layers, weight_of
from hesskern.passes.roots import accumulator_dtype

__all__ = ["SecondPass", "contents"]


@dataclass
class SecondPass:
    """What the second pass begins with.

    Attributes:
        specs: the layers.
        made: why the factors lack others.
        skipped: the same with layers that are not taken.
        settings: of the factors.
        factors: by layer; empty where the eigenvectors are there already.
        bases: the eigenvectors, if they are there already.
    """

    specs: dict[str, LayerSpec]
    made: dict[str, str]
    skipped: dict[str, str]
    settings: dict[str, Any]
    factors: dict[str, LayerFactors] = field(default_factory=dict)
    bases: dict[str, Bases] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        factors: Any,
        layers: str | Iterable[str] | None,
        own: bool,
        bias: Bias | None,
    ) -> SecondPass:
        """What factors give, which were made here for these layers or are ``own``.

        Raises:
            TypeError, ValueError: they are none, or those of other layers.
        """
        specs = _specs(model, factors, None if own else layers, bias)
        skipped = {**_without_factors(model, factors, specs, layers), **factors.skipped}
        chosen = {name: factors[name] for name in specs}
        return cls(specs, dict(factors.skipped), skipped, dict(factors.settings), chosen)

    @classmethod
    def of_part(cls, kept: Mapping[str, Any], model: nn.Module) -> SecondPass:
        """What :meth:`part` has kept."""
        known, _ = select_layers(model, None, kept["settings"].get("bias", "none"))
        specs = {
            name: replace(known[name], required=required)
            for name, required in kept["layers"].items()
        }
        bases = {name: Bases(*sides) for name, sides in kept["bases"].items()}
        return cls(specs, kept["made"], kept["skipped"], kept["settings"], bases=bases)

    def part(
        self, operators: Mapping[str, CorrectedOperator], evidence: Evidence
    ) -> dict[str, Any]:
        """All of it, with the eigenvectors and what the first pass has found, for a checkpoint."""
        return {
            "evidence": evidence.state(),
            "layers": {name: spec.required for name, spec in self.specs.items()},
            "made": self.made,
            "skipped": self.skipped,
            "settings": self.settings,
            "bases": {name: layer.eigenbases[:2] for name, layer in operators.items()},
        }

    def operators(
        self, model: nn.Module, precision: Precision, ranks: Ranks | None = None
    ) -> dict[str, CorrectedOperator]:
        """Every layer's operator with S = 0; empties the factors.

        Args:
            model: of the factors.
            precision: of the decompositions.
            ranks: that share them out; all call this with the same factors.
        """
        modules, device = dict(model.named_modules()), model_device(model)
        devices, dtypes = {}, {}
        for name in self.specs:
            module, attribute = weight_of(modules, name)
            weight = own_parameters(module).get(attribute)
            devices[name] = device if weight is None else weight.device
            if weight is not None:
                dtypes[name] = accumulator_dtype(weight.dtype)
            elif self.bases is None:
                dtypes[name] = self.factors[name].output_hessian.dtype
            else:
                dtypes[name] = self.bases[name].left[0].dtype
        if self.bases is None:
            bases = eigenbases(self.factors, precision, devices, dtypes, ranks)
        else:
            bases = self.bases
        found = {}
        for name in list(bases):
            layer, target = bases.pop(name), devices[name]
            values = torch.zeros(self.specs[name].shape, dtype=dtypes[name], device=target)
            found[name] = CorrectedOperator.of_bases(
                [u.to(target) for u in layer.left],
                [v.to(target) for v in layer.right],
                values,
                transposed=self.specs[name].transposed,
                name=name,
            )
        return found


def contents(factors: Any) -> Any:
    """What of factors a result depends on; whatever is none is refused later."""
    if not isinstance(factors, Factors):
        return None
    layers = {
        name: (layer.spec, layer.output_hessian, layer.input_covariance)
        for name, layer in factors.items()
    }
    return layers, factors.settings, factors.skipped


def _without_factors(
    model: nn.Module,
    factors: Factors,
    specs: dict[str, LayerSpec],
    layers: str | Iterable[str] | None,
) -> dict[str, str]:
    """Reasons for layers that nobody left out and the factors lack."""
    if layers is not None:
        return {}
    known, unknown = select_layers(model, None, factors.settings.get("bias", "none"))
    missing = {name: _absent(name, factors) for name in known if name not in specs}
    return {**unknown, **missing}


def _absent(name: str, factors: Factors) -> str:
    """Why factors lack a layer of the model."""
    if name in factors.large:
        return "has the diagonal of E[M] alone among the factors, which gives no eigenvectors"
    return "is not among the factors"


def _specs(
    model: nn.Module, factors: Any, layers: str | Iterable[str] | None, bias: Bias | None
) -> dict[str, LayerSpec]:
    """The layers that the factors are for, as the model has them.

    Raises:
        TypeError: ``factors`` are none.
        ValueError: there are none of any layer, they are a part or those of other layers, or made
            with another ``bias``.
    """
    if not isinstance(factors, Factors):
        raise TypeError(
            f"factors must be Factors, as kronecker_factors gives, got {type(factors).__name__}"
        )
    if factors.part is not None:
        raise ValueError(f"factors: {factors.part.refusal('factors', 'load_factors')}")
    if not factors:
        large = f"; those of {', '.join(factors.large)} have no eigenvectors" * bool(factors.large)
        raise ValueError(f"factors must hold at least one layer's E[M] and E[x x^T]{large}")
    own = factors.settings.get("bias", "none")
    if bias is not None and bias != own:
        raise ValueError(f"bias is {bias!r}, but the factors were made with bias={own!r}")
    known, _ = select_layers(model, None, own)
    for name, layer in factors.items():
        if name not in known:
            raise ValueError(
                f"factors must be those of this model, which has no layer {name!r}; its layers are "
                f"{', '.join(known)}"
            )
        if known[name] != layer.spec:
            raise ValueError(
                f"factors must be those of this model: layer {name!r} is {_geometry(layer.spec)} "
                f"in them, {_geometry(known[name])} in the model"
            )
    if layers is None:
        return {name: known[name] for name in known if name in factors}
    picked, _ = select_layers(model, layers, own)
    for name, spec in picked.items():
        if spec.required and name not in factors:
            reason = factors.skipped.get(name)
            if name in factors.large:
                reason = _absent(name, factors)
            raise ValueError(
                f"layers: there are no factors of {name!r}" + (f": it {reason}" if reason else "")
            )
    found = {name: spec for name, spec in picked.items() if name in factors}
    if not found:
        raise ValueError(f"layers: there are factors of none; there are {', '.join(factors)}")
    return found


def _geometry(spec: LayerSpec) -> str:
    """A layer's geometry in words."""
    m, d = spec.shape
    text = f"{spec.kind} (m, d) = ({m}, {d})"
    if spec.kind == "conv":
        text += (
            f" with kernel {spec.kernel_size}, stride {spec.stride}, padding {spec.padding}, "
            f"dilation {spec.dilation}, groups {spec.groups}"
        )
    return text + (" and a bias" if spec.joint else "") + (", transposed" * spec.transposed)
