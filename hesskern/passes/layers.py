"""Which layers of a model have curvature here, and their geometry."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hesskern.choices import Bias, check_choice
from hesskern.ops.reference import unfold
from hesskern.passes.layer_names import given_names, is_pattern, matching

__all__ = [
    "LayerSpec",
    "bias_of",
    "calls_itself",
    "is_norm_or_embedding",
    "large_layers",
    "layers_of_parameters",
    "left_out",
    "limit_outputs",
    "own_parameters",
    "parameter_of",
    "refuse_missing",
    "select_layers",
    "shared_weights",
    "tied_module",
    "unfolded",
    "weight_of",
]


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Of attention.
_APPENDED = ("bias_k", "bias_v")
_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _InstanceNorm)


@dataclass(frozen=True)
class LayerSpec:
    """One layer's geometry, independent of the module itself.

    Attributes:
        name: of the module whose ``weight`` this is, as in ``model.named_modules()``; of other
            parameters their own name, without "_weight" at its end.
        kind: "linear" or "conv".
        outputs: m.
        inputs: d, the columns of the weight: C k k / groups for a convolution, with ``joint`` one
            more for the bias.
        joint: whether the bias is one more input, constantly one.
        groups: groups of a convolution, 1 otherwise.
        kernel_size, stride, dilation: per spatial axis; empty for linear layers.
        padding: zero padding per spatial axis.
        required: whether the layer was asked for by name, so that it may not be skipped.
        transposed: whether the weight is kept as [d, m], as in the Conv1D of transformers.
        expert: which matrix of a parameter [E, m, d] the weight is; None where it is all of it.
    """

    name: str
    kind: str
    outputs: int
    inputs: int
    joint: bool = False
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    required: bool = field(default=False, compare=False)
    transposed: bool = False
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the weight as a matrix."""
        return self.outputs, self.inputs

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The same as the weight is kept, in the order of flat vectors: (d, m) if transposed."""
        return (self.inputs, self.outputs) if self.transposed else self.shape

    @property
    def weight_inputs(self) -> int:
        """d without the bias."""
        return self.inputs - int(self.joint)


def unfolded(spec: LayerSpec, image: Tensor) -> Tensor:
    """[d, t] columns of one use's mean input [d], [t, d] or [C, (H,) W]."""
    if spec.kind == "linear":
        return image.reshape(-1, image.shape[-1]).T
    return unfold(image[None], spec.kernel_size, spec.stride, spec.padding, spec.dilation)[0]


def select_layers(
    model: nn.Module, layers: str | Iterable[str] | None, bias: Bias
) -> tuple[dict[str, LayerSpec], dict[str, str]]:
    """The layers to work on, and why others with parameters are not among them.

    Besides Linear, Conv1d and Conv2d these are the projections of ``nn.MultiheadAttention``, and
    matrices that modules of other packages hold: whether those act as linear layers do is seen when
    the model runs.

    Args:
        model: any module.
        layers: a name of a layer or a pattern (``"*.mlp.*"``, as in :mod:`fnmatch`), or several;
            None for every supported layer. Layers that a pattern alone matches are left out with
            a reason where they have no block; those named themselves are refused.
        bias: "none" (weights only) or "joint" (append 1 to x where the layer has a bias).

    Returns:
        specifications by name, in the model's order, and reasons by name for skipped modules.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` not an iterable of names.
        ValueError: a name is unknown, a pattern matches nothing, ``bias`` is unknown, nothing is
            left, or the model couples the samples of a batch.
        NotImplementedError: a layer that was asked for is of an unsupported kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("bias", bias, Bias)
    chosen = None if layers is None else given_names(layers)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model must not couple the samples of a batch, but {name!r} is a batch norm "
                "without running statistics, which normalizes by the batch's own in eval mode too"
            )
    known: dict[str, LayerSpec] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        holds = any(p is not None for p in own_parameters(module).values())
        # The weight of a parametrized layer is none of its own.
        if not holds and not isinstance(module, _LAYERS):
            continue
        specs, reason = _specify(name, module, bias == "joint")
        known.update((spec.name, spec) for spec in specs)
        owner = name.partition(".parametrizations.")[0]
        if owner != name and owner in known:
            reason = f"makes the weight of {owner!r}, whose block is that of the weight as it acts"
        if reason is not None and holds:
            skipped[name] = reason
        elif isinstance(module, nn.MultiheadAttention):
            for own in _APPENDED:
                if own_parameters(module).get(own) is not None:
                    skipped[f"{name}.{own}" if name else own] = (
                        "is a row that is appended for every sample, which multiplies no input"
                    )
    if chosen is None:
        if not known:
            raise ValueError(_nothing(modules, skipped))
        return known, skipped
    matched: set[str] = set()
    for name in chosen:
        if name in known:
            continue
        if name not in modules and is_pattern(name, known):
            matched.update(matching(name, known, skipped))
            continue
        if name not in modules:
            raise ValueError(
                f"layers: the model has no module named {name!r}; its supported layers are "
                f"{', '.join(known) or 'none'}"
            )
        parts = [other for other in known if other.startswith(f"{name}." if name else "")]
        reason = skipped.get(
            name, f"is a {type(modules[name]).__name__}; supported are Linear, Conv1d and Conv2d"
        )
        hint = f" (its layers: {', '.join(parts)})" if parts else ""
        raise NotImplementedError(f"layers: {name!r} {reason}{hint}")
    picked = {
        n: replace(s, required=n in chosen) for n, s in known.items() if n in chosen or n in matched
    }
    return picked, skipped


def refuse_missing(specs: Mapping[str, LayerSpec], reasons: Mapping[str, str]) -> None:
    """Raises ValueError where a layer that was asked for by its own name has been left out."""
    for name, reason in reasons.items():
        if name in specs and specs[name].required:
            raise ValueError(f"layers: {name!r} {reason}")


def _nothing(modules: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> str:
    """What a model without supported layers holds instead."""
    met = Counter(type(modules[name]).__name__ for name in skipped)
    found = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in met.items())
    complex_ones = any("complex" in reason for reason in skipped.values())
    return (
        "model has no supported layer (Linear, Conv1d, Conv2d) and no projections of "
        f"MultiheadAttention; its parameters are in {found or 'no module at all'}"
        + (" (complex weights are not supported)" if complex_ones else "")
    )


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters, by name; None where it has none of a name."""
    # As a plain dict: that of scripted modules is none.
    return dict(module._parameters.items())


def weight_of(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The module that holds a layer's weight, and the attribute's name."""
    module = modules.get(name)
    # A parametrized weight is not asked for: in training mode that may change its buffers.
    if module is not None and (isinstance(module, _LAYERS) or "weight" in own_parameters(module)):
        return module, "weight"
    owner, _, own = name.rpartition(".")
    if owner not in modules:
        # An expert's number behind the name of a parameter.
        owner, _, own = owner.rpartition(".")
    holder = modules[owner]
    return holder, own if own in own_parameters(holder) else f"{own}_weight"


def parameter_of(model: nn.Module, layer: str) -> str:
    """Name in ``model.named_parameters()`` of a layer's weight.

    Raises:
        ValueError: the weight is no parameter, but computed from others.
    """
    module, attribute = weight_of(dict(model.named_modules()), layer)
    weight = own_parameters(module).get(attribute)
    for name, parameter in model.named_parameters():
        if parameter is weight:
            return name
    raise ValueError(f"layer {layer!r} has no weight parameter: its weight is computed from others")


def layers_of_parameters(model: nn.Module) -> dict[str, list[LayerSpec]]:
    """By parameter's name the layers whose weight it is: several of those that share it, and the
    experts of one parameter."""
    try:
        known, _ = select_layers(model, None, "none")
    except ValueError:
        # There is none, or none that this package goes through.
        return {}
    modules = dict(model.named_modules())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[LayerSpec]] = {}
    for spec in known.values():
        module, attribute = weight_of(modules, spec.name)
        name = names.get(id(own_parameters(module).get(attribute)))
        if name is not None:
            found.setdefault(name, []).append(spec)
    return found


def bias_of(modules: Mapping[str, nn.Module], spec: LayerSpec) -> Tensor | None:
    """The parameter that is a layer's bias; None where it has none of its own."""
    module, attribute = weight_of(modules, spec.name)
    name = f"{attribute.removesuffix('weight')}bias"
    return own_parameters(module).get(name)


def shared_weights(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Layers whose weight an earlier one of them has as well, with that layer."""
    modules = dict(model.named_modules())
    owners: dict[tuple[int, str], str] = {}
    shared = {}
    for name in names:
        module, attribute = weight_of(modules, name)
        weight = own_parameters(module).get(attribute)
        key = _key(weight, name)
        if weight is not None and owners.setdefault(key, name) != name:
            shared[name] = owners[key]
    return shared


def tied_module(modules: Mapping[str, nn.Module], layer: str) -> str:
    """Another module that holds a layer's weight, an embedding if there is one; else the layer."""
    module, attribute = weight_of(modules, layer)
    weight = own_parameters(module).get(attribute)
    others = [
        name
        for name, other in modules.items()
        if other is not module
        and weight is not None
        and any(own is weight for own in own_parameters(other).values())
    ]
    others.sort(key=lambda name: not isinstance(modules[name], _EMBEDDINGS))
    return others[0] if others else layer


def large_layers(specs: Mapping[str, LayerSpec], max_outputs: Any) -> dict[str, LayerSpec]:
    """The layers with more outputs than that.

    Raises:
        TypeError, ValueError: ``max_outputs`` is no positive integer.
    """
    if isinstance(max_outputs, bool) or not isinstance(max_outputs, int):
        raise TypeError(f"max_outputs must be an integer, got {type(max_outputs).__name__}")
    if max_outputs < 1:
        raise ValueError(f"max_outputs must be at least 1, got {max_outputs}")
    return {name: spec for name, spec in specs.items() if spec.outputs > max_outputs}


def limit_outputs(
    specs: Mapping[str, LayerSpec], max_outputs: Any
) -> tuple[dict[str, LayerSpec], dict[str, str]]:
    """The layers with so few outputs that [m, m] can be kept, and why the others are left out.

    Raises:
        TypeError, ValueError: ``max_outputs`` is no positive integer.
        ValueError: one of the others was asked for by name, or no layer is left.
    """
    large = large_layers(specs, max_outputs)
    reasons = {
        name: (
            f"has {spec.outputs:,} outputs, and an output Hessian of {spec.outputs**2:,} entries; "
            f"max_outputs={spec.outputs} would include it (now {max_outputs})"
        )
        for name, spec in large.items()
    }
    refuse_missing(specs, reasons)
    kept = {name: spec for name, spec in specs.items() if name not in reasons}
    if not kept:
        text = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
        raise ValueError(f"no layer is left: {text}")
    return kept, reasons


def left_out(
    model: nn.Module,
    skipped: Mapping[str, str],
    covered: Collection[LayerSpec],
    stacklevel: int | None,
) -> dict[str, str]:
    """What a result lacks: every module that holds parameters, with the reason.

    Args:
        model: of the result.
        skipped: reasons by layer or module.
        covered: the layers that the result has.
        stacklevel: as in ``warnings.warn``, counted from the caller, of a warning that names linear
            layers and convolutions; None for none.

    Returns:
        reasons by layer, and by module where all the matrices that a module holds are left out.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    skipped = _one_for_all(skipped, modules)
    complete = dict(skipped)
    present = {id(weight_of(modules, spec.name)[0]) for spec in covered}
    for name, reason in skipped.items():
        if name not in modules and name.rpartition(".")[2] not in _APPENDED:
            holder = weight_of(modules, name)[0]
            if id(holder) not in present:
                complete.setdefault(names[id(holder)], f"has {name!r}, which {reason}")
    missed = [name for name in complete if _is_linear(modules.get(name), name, complete)]
    if stacklevel is not None and missed:
        text = "; ".join(f"{name!r} {complete[name]}" for name in missed)
        warnings.warn(
            f"left out: {text}. What is returned covers {_share(model, modules, covered):.1%} of "
            "the model's parameters.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    return complete


def _key(weight: Tensor | None, name: str) -> tuple[int, str]:
    """Tells a layer's weight from others, and the experts of one parameter."""
    fused = weight is not None and weight.dim() == 3 and name.rpartition(".")[2].isdecimal()
    return id(weight), name.rpartition(".")[2] if fused else ""


def _one_for_all(skipped: Mapping[str, str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The reasons, with one under the parameter's name where all experts of it have the same."""
    by_parameter: dict[str, list[str]] = {}
    for name in skipped:
        parameter, _, number = name.rpartition(".")
        if name not in modules and number.isdecimal() and parameter not in modules:
            by_parameter.setdefault(parameter, []).append(name)
    found = dict(skipped)
    for parameter, names in by_parameter.items():
        weight = own_parameters(weight_of(modules, names[0])[0])[parameter.rpartition(".")[2]]
        if weight is not None and len(weight) == len(names) and len({*map(found.get, names)}) == 1:
            reason = found[names[0]]
            found = {
                (parameter if name == names[0] else name): text
                for name, text in found.items()
                if name == names[0] or name not in names
            }
            found[parameter] = reason
    return found


def _share(
    model: nn.Module, modules: Mapping[str, nn.Module], covered: Collection[LayerSpec]
) -> float:
    """Part of the model's parameters that layers cover."""
    total = sum(parameter.numel() for parameter in model.parameters())
    weights: dict[tuple[int, str], int] = {}
    for spec in covered:
        module, attribute = weight_of(modules, spec.name)
        weight = own_parameters(module).get(attribute)
        key = (id(module), "") if weight is None else _key(weight, spec.name)
        weights[key] = spec.outputs * spec.inputs
    return sum(weights.values()) / max(total, 1)


def _is_linear(module: nn.Module | None, name: str, skipped: Mapping[str, str]) -> bool:
    """Whether a user would expect a layer of this name to be covered."""
    if module is None:
        # The projections of attention, and matrices that other modules hold.
        return name.endswith("_proj")
    if isinstance(module, nn.MultiheadAttention):
        # Its projections are named themselves.
        return not any(other != name and other.startswith(f"{name}.") for other in skipped)
    return (
        isinstance(module, (*_LAYERS, nn.MultiheadAttention)) or type(module).__name__ == "Conv1D"
    )


def calls_itself(module: nn.Module) -> bool:
    """Whether calling the module is one linear map by its weight, and nothing else."""
    return getattr(module.forward, "__func__", None) in (
        nn.Linear.forward,
        nn.Conv1d.forward,
        nn.Conv2d.forward,
    )


def _specify(name: str, module: nn.Module, joint: bool) -> tuple[list[LayerSpec], str | None]:
    """A module's own layers, and why it has none."""
    if isinstance(module, (nn.LazyLinear, nn.LazyConv1d, nn.LazyConv2d)):
        return [], "is lazy and not initialized; run one forward pass first"
    if isinstance(module, nn.MultiheadAttention):
        return _attention(name, module, joint)
    plain = isinstance(module, _LAYERS)
    if plain and type(module).__module__.startswith("torch.ao."):
        return [], f"is a {type(module).__name__}; quantized layers are not supported"
    if plain:
        own = own_parameters(module).get("weight")
        held = [own] if own is not None else list(module.parameters())
        reason = next(filter(None, (_unusable(p) for p in held)), None)
        if reason or not held:
            return [], reason or "has no weight parameter"
        more = (
            [] if type(module).__module__.startswith("torch.") else _matrices(name, module, joint)
        )
        return [_of_module(name, module, joint), *(s for s in more if s.name != name)], None
    reason = _without_products(module)
    if reason is not None:
        return [], reason
    if type(module).__module__.startswith("torch.nn."):
        return [], (
            f"is a {type(module).__name__}; supported are Linear, Conv1d and Conv2d, and the "
            "projections of MultiheadAttention"
        )
    specs = _matrices(name, module, joint)
    if specs:
        return specs, None
    if any(p is not None and p.is_complex() for p in own_parameters(module).values()):
        return [], "has complex weights, in which a loss has no Hessian of this form"
    shapes = {
        name: list(parameter.shape)
        for name, parameter in own_parameters(module).items()
        if parameter is not None
    }
    if shapes and all(len(shape) < 2 for shape in shapes.values()):
        return [], (
            f"is a {type(module).__name__}, whose own parameters are vectors "
            f"({', '.join(shapes)}): they multiply no inputs as a matrix does"
        )
    if shapes:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        return [], (
            f"is a {type(module).__name__}, which holds no matrix but {text}; supported are "
            "Linear, Conv1d and Conv2d, and modules that multiply with a matrix of their own"
        )
    return [], (
        f"is a {type(module).__name__}; supported are Linear, Conv1d and Conv2d, and modules that "
        "multiply with a matrix of their own"
    )


def is_norm_or_embedding(module: nn.Module) -> bool:
    """Whether a module of torch looks rows up, or scales entries."""
    return isinstance(module, (*_EMBEDDINGS, *_NORMS))


def _without_products(module: nn.Module) -> str | None:
    """Why modules that look rows up, or scale entries, have no Kronecker factors."""
    kind = type(module).__name__
    if isinstance(module, _EMBEDDINGS):
        return (
            f"is {'an' if kind[0] in 'AEIOU' else 'a'} {kind}: it looks rows of its weight up, "
            "which is no product of the weight and an input"
        )
    if isinstance(module, _NORMS):
        return (
            f"is a {kind}: its weight scales entries one by one, so its block is no Kronecker "
            "product"
        )
    return None


def _matrices(name: str, module: nn.Module, joint: bool) -> list[LayerSpec]:
    """The matrices that a module of another package holds."""
    specs = []
    for own, parameter in own_parameters(module).items():
        if parameter is None or _unusable(parameter) is not None:
            continue
        if parameter.dim() == 2:
            specs.append(_of_matrix(name, module, own, parameter, joint))
        elif parameter.dim() == 3 and min(parameter.shape) > 1:
            specs += _of_experts(name, module, own, parameter)
    return specs


def _of_experts(name: str, module: nn.Module, own: str, parameter: Tensor) -> list[LayerSpec]:
    """The matrices of a parameter [E, m, d], or [E, d, m] where the module says so."""
    transposed = getattr(module, "is_transposed", False) is True
    first, second = parameter.shape[1:]
    m, d = (second, first) if transposed else (first, second)
    key = f"{name}.{own}" if name else own
    return [
        LayerSpec(f"{key}.{expert}", "linear", m, d, transposed=transposed, expert=expert)
        for expert in range(len(parameter))
    ]


def _unusable(weight: Any) -> str | None:
    """Why there is no Hessian in a weight."""
    if not isinstance(weight, Tensor):
        return "has no weight tensor"
    if weight.is_complex():
        return "has complex weights, in which a loss has no Hessian of this form"
    if not weight.is_floating_point():
        return f"has weights of {weight.dtype}, which is not differentiable"
    return None


def _of_matrix(name: str, module: nn.Module, own: str, parameter: Tensor, joint: bool) -> LayerSpec:
    """A matrix that a module of another package multiplies with."""
    key = f"{name}.{own}" if name else own
    if own == "weight":
        key = name
    elif own.endswith("_weight"):
        key = key.removesuffix("_weight")
    transposed = type(module).__name__ == "Conv1D"
    first, second = parameter.shape
    m, d = (second, first) if transposed else (first, second)
    bias = own_parameters(module).get(f"{own.removesuffix('weight')}bias")
    joint = joint and own.endswith("weight") and bias is not None and bias.shape == (m,)
    return LayerSpec(key, "linear", m, d + int(joint), joint, transposed=transposed)


def _attention(
    name: str, module: nn.MultiheadAttention, joint: bool
) -> tuple[list[LayerSpec], str | None]:
    """The input projections; the output projection is a module of its own."""
    specs = []
    for own in ("in_proj", "q_proj", "k_proj", "v_proj"):
        weight = own_parameters(module).get(f"{own}_weight")
        if weight is None:
            continue
        reason = _unusable(weight)
        if reason:
            return [], reason
        with_bias = joint and own == "in_proj" and module.in_proj_bias is not None
        m, d = weight.shape
        key = f"{name}.{own}" if name else own
        specs.append(LayerSpec(key, "linear", m, d + int(with_bias), with_bias))
    if joint and module.in_proj_bias is not None and module.in_proj_weight is None:
        return [], "keeps the biases of three projections in one parameter"
    return specs, None


def _of_module(name: str, module: nn.Module, joint: bool) -> LayerSpec:
    joint = joint and module.bias is not None
    if isinstance(module, nn.Linear):
        weight = own_parameters(module).get("weight")
        m, d = (module.out_features, module.in_features) if weight is None else weight.shape
        return LayerSpec(name, "linear", m, d + int(joint), joint)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    taps = 1
    for size in module.kernel_size:
        taps *= size
    # Anything but symmetric zero padding shows in the input that the convolution itself is given.
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return LayerSpec(
        name,
        "conv",
        module.out_channels,
        module.in_channels // module.groups * taps + int(joint),
        joint,
        module.groups,
        tuple(module.kernel_size),
        tuple(module.stride),
        (0,) * len(module.kernel_size) if not plain else _sizes(module.padding),
        tuple(module.dilation),
    )


def _sizes(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
