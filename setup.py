"""Build of the C++/CUDA extension; everything declarative is in pyproject.toml.

Environment:
    HESSKERN_CUDA         auto (default) | 0 | 1: build the CUDA kernels. ``auto`` builds them when
                          the installed torch is a CUDA build and nvcc is found; no GPU is needed.
    TORCH_CUDA_ARCH_LIST  CUDA architectures, e.g. "8.0;9.0"; default: those torch was built for.
    HESSKERN_SANITIZE     1: AddressSanitizer and UndefinedBehaviorSanitizer (for the tests).
"""

import os
import re
import runpy
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
BUILD_HELP = (
    "hesskern builds against the torch that is already installed. Install torch (2.10 or newer), "
    "setuptools and ninja, then run: pip install --no-build-isolation ."
)


def cuda_wanted(torch_cuda: str | None, nvcc: str | None) -> bool:
    """Whether the CUDA kernels are built; never asks for a GPU, builders have none."""
    choice = os.environ.get("HESSKERN_CUDA", "auto").lower()
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"HESSKERN_CUDA must be auto, 0 or 1; got {choice!r}")
    if choice == "1":
        if torch_cuda is None:
            raise SystemExit(
                "HESSKERN_CUDA=1 needs a CUDA build of torch; the installed one is CPU"
            )
        if nvcc is None:
            raise SystemExit("HESSKERN_CUDA=1 needs nvcc on PATH or CUDA_HOME set; found neither")
    return choice != "0" and torch_cuda is not None and nvcc is not None


def find_nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return None
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc"
    return str(nvcc) if nvcc.exists() else None


def extension():
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(f"{BUILD_HELP}\n(import torch failed: {error})") from None

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise SystemExit(f"hesskern needs torch 2.10 or newer; found {torch.__version__}")

    with_cuda = cuda_wanted(torch.version.cuda, find_nvcc())
    sources = [
        "csrc/ops.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    architectures = ""
    if with_cuda:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            flags = torch._C._cuda_getArchFlags() or ""
            found = re.findall(r"sm_(\d+)(\d[a-z]?)\b", flags)
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in found)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        sources += sorted(
            str(p.relative_to(ROOT))
            for p in ROOT.glob("csrc/cuda/*")
            if p.suffix in (".cpp", ".cu")
        )

    digest = runpy.run_path(str(ROOT / "hesskern" / "_digest.py"))["source_digest"](ROOT / "csrc")
    macros = [
        ("HESSKERN_SOURCES", f'"{digest}"'),
        ("HESSKERN_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ("HESSKERN_CUDA_VERSION", f'"{torch.version.cuda if with_cuda else ""}"'),
    ]
    cxx = ["/O2", "/openmp"] if sys.platform == "win32" else ["-O3", "-g0", "-Wall"]
    link: list[str] = []
    if sys.platform.startswith("linux"):
        cxx.append("-fopenmp")
        # Nothing but the module's entry point leaves the library.
        cxx.append("-fvisibility=hidden")
    if os.environ.get("HESSKERN_SANITIZE") == "1":
        cxx += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
        link += ["-fsanitize=address,undefined"]
    options = {"cxx": cxx}
    if with_cuda:
        options["nvcc"] = ["-O3", "--Werror", "all-warnings"]
    make = CUDAExtension if with_cuda else CppExtension
    return make(
        "hesskern._C",
        sources,
        define_macros=macros,
        extra_compile_args=options,
        extra_link_args=link,
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")),
    )


def commands():
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension.with_options(use_ninja=True)}


setup(ext_modules=[extension()], cmdclass=commands())
