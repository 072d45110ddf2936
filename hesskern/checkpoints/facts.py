"""What two runs must share so that one goes on where the other stopped, bit by bit."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from hesskern.digests import digest, module_facts, tensor_digest
from hesskern.ops.extension import build_info
from hesskern.version import __version__

__all__ = ["described", "differences", "environment", "model_facts", "other_model"]


def model_facts(model: nn.Module) -> list[list[Any]]:
    """[name, shape, dtype, digest] of every parameter and buffer; reads all of them once.

    Behind these comes [name, type, words, ""] of every module, as what has no weights, such as an
    activation, makes another model, too.
    """
    named = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    seen: dict[int, str] = {}
    found = []
    for name, tensor in named:
        key = id(tensor)
        if key not in seen:
            seen[key] = tensor_digest(tensor)
        found.append([name, list(tensor.shape), str(tensor.dtype), seen[key]])
    found += [
        [f"module {name}" if name else "the model", *facts, ""]
        for name, facts in module_facts(model).items()
    ]
    return found


def other_model(found: Iterable[list[Any]], own: Iterable[list[Any]]) -> str | None:
    """How a model differs from that of a file; None where it is the same."""
    before, now = ({name: rest for name, *rest in facts} for facts in (found, own))
    for name in before.keys() | now.keys():
        if name not in before or name not in now:
            there = "the file's" if name in before else "this"
            return f"of {there} model alone is {name!r}"
    for name, (shape, dtype, bits) in now.items():
        if before[name][:2] != [shape, dtype]:
            there, here = (
                f"{one} {other}".strip() for one, other in (before[name][:2], (shape, dtype))
            )
            return f"{name!r} is {there} there and {here} here"
        if before[name][2] != bits:
            return f"{name!r} has other values"
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """What rounding depends on besides the numbers themselves.

    Args:
        device: of the model.
    """
    build = build_info()
    found: dict[str, Any] = {
        "hesskern": __version__,
        "operators": build["sources"],
        "simd": build.get("simd"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": str(device),
        "default dtype": str(torch.get_default_dtype()),
        "autocast": _autocast(device),
        "float32 precision": torch.get_float32_matmul_precision(),
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = [
            torch.backends.cudnn.version(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
        ]
    return found


def _autocast(device: torch.device) -> str | None:
    """The dtype that autocast computes in; None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type))


def differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """``threads is 2 there and 1 here; ...``, or nothing."""
    names = [name for name in {**own, **found} if found.get(name) != own.get(name)]
    return "; ".join(f"{n} is {found.get(n)!r} there and {own.get(n)!r} here" for n in names)


def described(value: Any) -> Any:
    """A setting as JSON has it: plain ones and lists of such as they are, else type and digest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) is list and all(isinstance(part, (bool, int, float, str)) for part in value):
        return value
    return f"{type(value).__qualname__} {digest(value)}"
