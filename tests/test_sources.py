"""What each folder of csrc may include, and where torch may stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu"))
# A name stands for the files directly in that folder, "" for those in csrc itself.
MAY_INCLUDE = {
    "": {"", "cpu", "cpu/amx"},
    "cpu": {"cpu", "", "cpu/blas"},
    "cpu/amx": {"cpu/amx", "cpu"},
    "cpu/blas": {"cpu/blas", "cpu", "cpu/amx"},
    "cpu/conv": {"cpu/conv", "", "cpu", "cpu/blas"},
    "cpu/eigen_correction": {"cpu/eigen_correction", "", "cpu", "cpu/blas"},
    "cpu/kron": {"cpu/kron", "", "cpu", "cpu/blas"},
    "cpu/layer_hessian": {"cpu/layer_hessian", "", "cpu", "cpu/blas"},
    "cuda": {"cuda", "", "cuda/core", "cuda/block_gram"},
    "cuda/core": {"cuda/core"},
    "cuda/block_gram": {"cuda/block_gram", "cuda/core"},
    "cuda/conv": {"cuda/conv", "", "cuda/core"},
    "cuda/layer_hessian": {"cuda/layer_hessian", "", "cuda/core"},
}
# Made by setup.py; and those of the emulation, in tests/cuda_on_cpu.
ELSEWHERE = re.compile(r"build_config\.h|emulated_\w+\.h")
TORCH = re.compile(r'#include [<"](ATen|c10|torch|pybind11)')


def folder(path: Path) -> str:
    return path.parent.relative_to(CSRC).as_posix().removeprefix(".")


def included(path: Path) -> list[Path]:
    names = re.findall(r'#include "([^"]+)"', path.read_text())
    found = []
    for name in names:
        if ELSEWHERE.fullmatch(name):
            continue
        beside = path.parent / name
        target = beside if beside.exists() else CSRC / name
        assert target.exists(), f"{path.relative_to(CSRC)} includes {name}"
        found.append(target)
    return found


@pytest.mark.parametrize("name", sorted({folder(p) for p in SOURCES}))
def test_arrows(name: str) -> None:
    for source in (p for p in SOURCES if folder(p) == name):
        for target in included(source):
            assert folder(target) in MAY_INCLUDE[name], (
                f"{source.relative_to(CSRC)} includes {target.relative_to(CSRC)}"
            )


def test_kernels_know_no_torch() -> None:
    # A .cu file and its headers compile with nvcc alone, and on the CPU.
    with_torch = {p.relative_to(CSRC).as_posix() for p in SOURCES if TORCH.search(p.read_text())}
    kernels = {name for name in with_torch if name.startswith("cuda/")}
    assert kernels == {name for name in kernels if name.endswith("_binding.cpp")} | {
        "cuda/core/binding.h"
    }
