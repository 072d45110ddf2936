"""Loads the compiled operators, or says how to build them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hesskern.ops.source_digest import source_digest

__all__ = ["build_info", "load"]

_BUILD = (
    "Build it against the installed torch with\n"
    "    pip install --no-build-isolation .\n"
    "or, in a checkout that you edit,\n"
    "    python setup.py build_ext --inplace"
)


def load() -> ModuleType:
    """The extension module ``hesskern._C``; importing it registers ``torch.ops.hesskern``.

    Raises:
        ImportError: the extension is missing, was built for another torch, or is older than the
            C++ sources of the checkout it stands in; the message says how to build it.
    """
    try:
        _C = import_module("hesskern._C")
    except ImportError as error:
        raise ImportError(
            f"hesskern's compiled operators could not be loaded ({error}). {_BUILD}"
        ) from error
    info = _C.build_info()
    built, running = _release(info["torch"]), _release(torch.__version__)
    if built != running:
        raise ImportError(
            f"hesskern's compiled operators were built for torch {built} but torch {running} is "
            f"installed. {_BUILD}"
        )
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    if (csrc / "ops.cpp").exists() and source_digest(csrc) != info["sources"]:
        raise ImportError(
            f"hesskern's compiled operators are older than the sources in {csrc}. {_BUILD}"
        )
    return _C


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


_C = load()


def build_info() -> dict[str, Any]:
    """How the extension was built: torch, CUDA, architectures, compiler; and the SIMD level."""
    return dict(_C.build_info())
