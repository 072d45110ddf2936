"""Whether the CUDA bindings compile, against any torch, one without CUDA too.

    VENV/bin/python .ci/check_bindings.py

The _binding.cpp files otherwise meet a compiler only in a build with a CUDA torch. Every torch has
the headers of c10/cuda but one, which lists how libc10_cuda was configured; torch's own macro
leaves it out. Needs the CUDA toolkit's headers.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]


def check(source: Path, toolkit: str) -> str:
    """The compiler's messages; none if the file compiles without a warning."""
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only"]
    command += ["-Wall", "-Wextra", "-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command += ["-I", str(ROOT / "csrc")]
    for folder in [*include_paths(), str(Path(toolkit) / "include")]:
        command += ["-isystem", folder]
    return subprocess.run([*command, str(source)], capture_output=True, text=True).stderr


def main() -> None:
    toolkit = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")["cuda_home"]()
    if toolkit is None:
        raise SystemExit("no CUDA toolkit: nvcc is neither on PATH nor below CUDA_HOME")
    sources = sorted((ROOT / "csrc" / "cuda").rglob("*_binding.cpp"))
    if not sources:
        raise SystemExit("csrc/cuda holds no _binding.cpp file")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        messages = list(pool.map(lambda source: check(source, toolkit), sources))
    for message in filter(None, messages):
        print(message, file=sys.stderr)
    if failed := [s.name for s, message in zip(sources, messages, strict=True) if message]:
        sys.exit(f"{len(failed)} of {len(sources)} bindings do not compile: {', '.join(failed)}")
    print(f"all {len(sources)} bindings compile")


if __name__ == "__main__":
    main()
