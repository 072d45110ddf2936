"""Checks a build with CUDA on a machine that need not have a GPU: versions and registrations."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import hesskern

info = hesskern.build_info()
assert info["cuda"] == torch.version.cuda, info
assert info["cuda_architectures"], info

cuda = Path(hesskern.__file__).parents[1] / "csrc" / "cuda"
registered = [
    name
    for binding in cuda.rglob("*_binding.cpp")
    for name in re.findall(r'm\.impl\("(\w+)"', binding.read_text())
]
contract = (Path(hesskern.__file__).parents[1] / "csrc" / "ops.cpp").read_text()
public = contract[: contract.index("TORCH_LIBRARY(hesskern_internal")]
operators = re.findall(r'"(\w+)\(Tensor', public)
assert sorted(registered) == sorted(operators), (registered, operators)
for name in registered:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hesskern::{name}", "CUDA"), name
print("CUDA build imports:", info, "; CUDA kernels:", ", ".join(registered))
