"""Facts about the machine and the software that a figure depends on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from hesskern.ops.extension import build_info
from hesskern.version import __version__

__all__ = ["PEERS", "facts", "installed_version"]

PEERS = (
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "hessian-eigenthings",
    "pyhessian",
    "transformers",
    "kronfluence",
    "bergson",
    "asdfghjkl",
)


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Model, family, cores and caches in one line."""
    try:
        text = subprocess.run(
            ["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    shown = {name.strip(): value.strip() for name, value in fields.items()}
    parts = [shown.get("Model name", platform.machine())]
    for key, label in (
        ("CPU family", "family"),
        ("Model", "model"),
        ("CPU(s)", "CPUs"),
        ("L2 cache", "L2"),
        ("L3 cache", "L3"),
    ):
        if key in shown:
            parts.append(f"{label} {shown[key]}")
    return ", ".join(parts)


def _blas() -> str:
    for line in torch.__config__.show().splitlines():
        if "Math Kernel Library Version" in line or "OpenBLAS" in line:
            return line.strip(" -").split(" for ")[0]
    return "MKL" if torch.backends.mkl.is_available() else "unknown"


def facts(threads: int) -> dict[str, Any]:
    """CPU, load, threads, versions, BLAS, and how the kernels were built.

    The load average is that of the last minute: called before a run, it says how quiet the machine
    was.
    """
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": _blas(),
        "hesskern": __version__,
        "build": {key: str(value) for key, value in build_info().items()},
        "peers": {name: installed_version(name) for name in PEERS},
    }
