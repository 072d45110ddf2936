"""Which layers of a model have curvature here, and their geometry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["LayerSpec", "pad_input", "select_layers"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer's geometry, independent of the module itself.

    Attributes:
        name: key in ``model.named_modules()``.
        kind: "linear" or "conv".
        outputs: m.
        inputs: d, the columns of the weight: C k k / groups for a convolution, with ``joint`` one
            more for the bias.
        joint: whether the bias is one more input, constantly one.
        groups: groups of a convolution, 1 otherwise.
        kernel_size, stride, dilation: per spatial axis; empty for linear layers.
        padding: zero padding per spatial axis.
        required: whether the layer was asked for by name, so that it may not be skipped.
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

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the weight as a matrix."""
        return self.outputs, self.inputs

    @property
    def weight_inputs(self) -> int:
        """d without the bias."""
        return self.inputs - int(self.joint)

    @property
    def spatial_axes(self) -> int:
        return len(self.kernel_size)


def select_layers(
    model: nn.Module, layers: Iterable[str] | None, bias: str
) -> tuple[dict[str, LayerSpec], dict[str, str]]:
    """The layers to work on, and why others with parameters are not among them.

    Args:
        model: any module.
        layers: names from ``model.named_modules()``, or None for every supported layer.
        bias: "none" (weights only) or "joint" (append 1 to x where the layer has a bias).

    Returns:
        specifications by name, in the model's order, and reasons by name for skipped modules.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` not an iterable of names.
        ValueError: a name is unknown, ``bias`` is unknown, nothing is left, or the model couples
            the samples of a batch.
        NotImplementedError: a layer that was asked for is of an unsupported kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if bias not in ("none", "joint"):
        raise ValueError(f"bias must be 'none' or 'joint', got {bias!r}")
    if isinstance(layers, str):
        layers = [layers]
    if layers is not None and not isinstance(layers, Iterable):
        raise TypeError(f"layers must be names of modules or None, got {type(layers).__name__}")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model must not couple the samples of a batch, but {name!r} is a batch norm "
                "without running statistics, which normalizes by the batch's own in eval mode too"
            )
    chosen = None if layers is None else list(layers)
    if chosen is not None:
        for name in chosen:
            if name not in modules:
                known = [n for n, module in modules.items() if _unsupported(module) is None]
                raise ValueError(
                    f"layers: the model has no module named {name!r}; its supported layers are "
                    f"{', '.join(known) or 'none'}"
                )
            reason = _unsupported(modules[name])
            if reason is not None:
                raise NotImplementedError(f"layers: {name!r} {reason}")
    specs: dict[str, LayerSpec] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        reason = _unsupported(module)
        if reason is not None:
            if next(module.parameters(recurse=False), None) is not None:
                skipped[name] = reason
        elif chosen is None or name in chosen:
            spec = _specify(name, module, bias == "joint")
            specs[name] = replace(spec, required=chosen is not None)
    if not specs:
        raise ValueError(
            "model has no supported layer (Linear, Conv1d, Conv2d)"
            if chosen is None
            else "layers is empty; name at least one layer or pass None for all"
        )
    return specs, skipped


_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)


def _unsupported(module: nn.Module) -> str | None:
    if isinstance(module, (nn.LazyLinear, nn.LazyConv1d, nn.LazyConv2d)):
        return "is lazy and not initialized; run one forward pass first"
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        if getattr(module.forward, "__func__", None) not in _FORWARDS:
            return f"is a {type(module).__name__} with a forward() of its own"
        return None
    return f"is a {type(module).__name__}; supported are Linear, Conv1d and Conv2d"


def _specify(name: str, module: nn.Module, joint: bool) -> LayerSpec:
    joint = joint and module.bias is not None
    if isinstance(module, nn.Linear):
        return LayerSpec(
            name, "linear", module.out_features, module.in_features + int(joint), joint
        )
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    taps = 1
    for size in module.kernel_size:
        taps *= size
    # Anything but symmetric zero padding is applied to the captured input beforehand.
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


def pad_input(module: nn.Module, x: Tensor) -> Tensor:
    """x [N, C, ...] with the padding that ``LayerSpec.padding`` does not express."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x
    amounts = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros":
        return F.pad(x, amounts)
    return F.pad(x, amounts, mode=module.padding_mode)
