"""Plain sequential networks as data, so that a certificate's file is enough to run them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["describe", "rebuild"]

# Class -> constructor arguments that can be read back as attributes.
_KNOWN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Identity: (),
    nn.ReLU: (),
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    ),
}
_NAMES = {kind.__name__: kind for kind in _KNOWN}

Description = list[list[Any]]


def describe(model: nn.Module) -> Description | None:
    """``[[name, class, arguments], ...]`` of an ``nn.Sequential`` of known modules, else None."""
    if type(model) is not nn.Sequential:
        return None
    entries: Description = []
    for name, module in model.named_children():
        names = _KNOWN.get(type(module))
        if names is None:
            return None
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return None
        arguments = {key: _plain(getattr(module, key)) for key in names}
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            arguments["bias"] = module.bias is not None
        entries.append([name, type(module).__name__, arguments])
    return entries


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def rebuild(description: Sequence[Sequence[Any]]) -> nn.Sequential:
    """The network of a description, with weights of no meaning.

    Raises:
        ValueError: the description is damaged or names an unknown class.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    try:
        for name, kind, arguments in description:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
            modules[name] = _NAMES[kind](**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"architecture is damaged or unknown ({error!r})") from error
    return nn.Sequential(modules)
