"""What two runs must share so that one goes on where the other stopped, bit by bit."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from hesskern.digests import BYTECODE, marked_digest, module_facts, tensor_digest
from hesskern.ops.extension import build_info
from hesskern.version import __version__

__all__ = ["described", "differences", "environment", "model_facts", "other_model", "unread"]


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


def other_model(
    found: Iterable[list[Any]], own: Iterable[list[Any]], blind: bool = False
) -> str | None:
    """How a model differs from that of a file; None where it is the same.

    Args:
        found: facts of the file's model.
        own: of this one.
        blind: whether bytecode does not count, as it is another Python's.
    """
    before, now = ({name: rest for name, *rest in facts} for facts in (found, own))
    for name in before.keys() | now.keys():
        if name not in before or name not in now:
            there = "the file's" if name in before else "this"
            return f"of {there} model alone is {name!r}"
    for name, (shape, dtype, bits) in now.items():
        if before[name][1] != dtype or not _alike(before[name][0], shape, blind):
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
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": str(device),
        "default dtype": str(torch.get_default_dtype()),
        "autocast": _autocast(device),
        "float32 precision": matmul_precision(),
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = cudnn_settings()
    return found


def matmul_precision() -> str:
    """Of float32 products; torch has no single word for it where backends were set apart."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        backends: Any = torch.backends
        own = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
        return f"{own[0]} {own[1]}"


def cudnn_settings() -> list[Any]:
    """Its version, switches and precisions; torch gives no single one where they differ."""
    cudnn: Any = torch.backends.cudnn
    precisions = [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
    return [cudnn.version(), cudnn.benchmark, cudnn.deterministic, *precisions]


def _autocast(device: torch.device) -> str | None:
    """The dtype that autocast computes in; None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type))


def unread(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of what differs by another Python's bytecode, of which nobody knows whether it does."""
    names = [name for name in own if found.get(name) != own[name]]
    return [name for name in names if _alike(found.get(name), own[name], True)]


def _alike(there: Any, here: Any, blind: bool) -> bool:
    if there == here or not blind:
        return bool(there == here)
    if not isinstance(there, str) or not isinstance(here, str):
        return False
    return BYTECODE in there + here and there.split(" ")[0] == here.split(" ")[0]


def differences(
    found: Mapping[str, Any], own: Mapping[str, Any], besides: Iterable[str] = ()
) -> str:
    """``threads is 2 there and 1 here; ...``, or nothing; of other names than ``besides``."""
    names = [n for n in {**own, **found} if found.get(n) != own.get(n) and n not in besides]
    return "; ".join(f"{n} is {found.get(n)!r} there and {own.get(n)!r} here" for n in names)


def described(value: Any) -> Any:
    """A setting as JSON has it: plain ones and lists of such as they are, else type and digest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) is list and all(isinstance(part, (bool, int, float, str)) for part in value):
        return value
    return f"{type(value).__qualname__} {marked_digest(value)}"
