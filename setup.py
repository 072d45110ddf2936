"""Build of the C++/CUDA extension; everything declarative is in pyproject.toml.

Environment:
    HESSKERN_CUDA         auto (default) | 0 | 1: build the CUDA kernels. ``auto`` builds them when
                          the installed torch is a CUDA build and nvcc is found; no GPU is needed.
    TORCH_CUDA_ARCH_LIST  CUDA architectures, e.g. "8.0;9.0"; default: those torch was built for.
    CUDA_HOME             CUDA toolkit; default: the one that nvcc on PATH belongs to.
    MAX_JOBS              files compiled at once; default: one per core.
    HESSKERN_SANITIZE     1: AddressSanitizer and UndefinedBehaviorSanitizer (for the tests).
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
# Named, as torch before 2.12 would add C++17.
STANDARD = "-std=c++20"
HELP = (
    "hesskern builds against the torch that is already installed. Install torch (2.10 or newer), "
    "setuptools and ninja, then run: pip install --no-build-isolation ."
)


def installed_torch():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"{HELP}\n(import torch failed: {error})") from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise SystemExit(f"hesskern needs torch 2.10 or newer; found {torch.__version__}")
    return torch


def switch(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").lower() or default
    if value not in choices:
        raise SystemExit(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def cuda_home() -> str | None:
    """The CUDA toolkit's folder, or None without nvcc.

    nvcc on PATH may be a wrapper outside its toolkit, so nvcc is asked where it stands.
    """
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if given:
        return given if shutil.which("nvcc", path=str(Path(given) / "bin")) else None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    # The dry run prints "#$ TOP=/the/toolkit/bin/.." among the commands it would run.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return str(Path(top[1].strip() if top else Path(nvcc).parent.parent).resolve())


def toolkit_version(toolkit: str) -> str | None:
    """The release that the toolkit's nvcc names, e.g. "13.0"; None if it names none."""
    nvcc = shutil.which("nvcc", path=str(Path(toolkit) / "bin"))
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    return release[1] if release else None


def cuda_wanted(torch_cuda: str | None, toolkit: str | None) -> bool:
    """Whether the CUDA kernels are built; never asks for a GPU, builders have none."""
    choice = switch("HESSKERN_CUDA", "auto", ("auto", "0", "1"))
    if choice == "1" and torch_cuda is None:
        raise SystemExit("HESSKERN_CUDA=1 needs a CUDA build of torch; found a build without CUDA")
    if choice == "1" and toolkit is None:
        raise SystemExit("HESSKERN_CUDA=1 needs nvcc on PATH or below CUDA_HOME; found none")
    if choice == "0" or torch_cuda is None or toolkit is None:
        return False
    found = toolkit_version(toolkit)
    if found is not None and found.split(".")[0] != torch_cuda.split(".")[0]:
        raise SystemExit(
            f"torch was built with CUDA {torch_cuda} but nvcc in {toolkit} is CUDA {found}; point "
            f"CUDA_HOME to a toolkit of CUDA {torch_cuda.split('.')[0]}, or set HESSKERN_CUDA=0"
        )
    return True


def cuda_architectures(torch_flags: str) -> str:
    """TORCH_CUDA_ARCH_LIST, else the architectures in torch's own flags ("sm_80 compute_90").

    Of the latter those from 8.0 on: the kernels use tensor-core products that came with them.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    # The last digit is the minor version: sm_80 is 8.0, sm_120 is 12.0, sm_90a is 9.0a.
    found = re.findall(r"\b(sm|compute)_(\d+)(\d[a-z]?)\b", torch_flags)
    if not found:
        raise SystemExit(
            f"torch names no CUDA architectures ({torch_flags!r}); set TORCH_CUDA_ARCH_LIST"
        )
    fit = [(kind, a, b) for kind, a, b in found if int(a) >= 8]
    if not fit:
        raise SystemExit(
            f"hesskern's CUDA kernels need architecture 8.0 or newer, torch is built for "
            f"{torch_flags!r}; set HESSKERN_CUDA=0 to build without them"
        )
    return ";".join(f"{a}.{b}{'+PTX' if kind == 'compute' else ''}" for kind, a, b in fit)


def for_hopper(flags: list[str]) -> list[str]:
    """nvcc's architecture flags with code for 9.0 built as sm_90a, and the macro that says so.

    The kernels for compute capability 9.0 use instructions of sm_90a, which runs on 9.0 alone, as
    sm_90 does; PTX stays compute_90, which later cards can run.
    """
    plain, own = "-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90a,code=sm_90a"
    flags = list(dict.fromkeys(own if flag == plain else flag for flag in flags))
    return [*flags, "-DHESSKERN_SM90A"] if own in flags else flags


def compiler_flags(platform: str, torch_root: Path, sanitize: bool) -> tuple[list[str], list[str]]:
    """Compiler and linker flags of the C++ sources.

    OpenMP is compiled in but its runtime is not linked: the symbols resolve to torch's own copy,
    so that there is one thread pool and torch.set_num_threads holds.
    """
    if platform == "win32":
        raise SystemExit("hesskern is built with GCC or Clang, which torch for Windows is not")
    # Nothing but the module's entry point leaves the library.
    compile_flags = [STANDARD, "-O3", "-g0", "-Wall", "-fvisibility=hidden"]
    link_flags: list[str] = []
    if platform == "darwin":
        # Apple's Clang has OpenMP without header and runtime; torch's wheels may bring both.
        if (torch_root / "include" / "omp.h").exists():
            compile_flags += ["-Xpreprocessor", "-fopenmp"]
            link_flags += [f"-L{torch_root / 'lib'}", "-lomp"]
    else:
        compile_flags.append("-fopenmp")
    if sanitize:
        sanitizers = "-fsanitize=address,undefined"
        # vptr checks need the type information of torch's classes, which torch does not export;
        # Python's own flags have -fwrapv, under which an overflow counts as defined.
        compile_flags += [sanitizers, "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
        compile_flags += ["-fno-wrapv", "-fno-omit-frame-pointer", "-g1", "-O1"]
        link_flags.append(sanitizers)
    return compile_flags, link_flags


def extension(torch):
    toolkit = cuda_home()
    with_cuda = cuda_wanted(torch.version.cuda, toolkit)
    if toolkit:
        # Before the import: cpp_extension looks for the toolkit once, then.
        os.environ["CUDA_HOME"] = toolkit
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    torch_root = Path(torch.__file__).parent
    sanitize = switch("HESSKERN_SANITIZE", "0", ("0", "1")) == "1"
    cxx, link = compiler_flags(sys.platform, torch_root, sanitize)
    options = {"cxx": cxx}
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").rglob("*.cpp")]
    if with_cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(torch._C._cuda_getArchFlags() or "")
        sources += [p for p in (ROOT / "csrc" / "cuda").rglob("*") if p.suffix in (".cpp", ".cu")]
        from torch.utils.cpp_extension import _get_cuda_arch_flags

        # Given flags with an architecture, torch adds none of its own.
        architectures = for_hopper(_get_cuda_arch_flags())
        options["nvcc"] = [STANDARD, "-O3", "--Werror", "all-warnings", *architectures]
        cxx += [flag for flag in architectures if flag.startswith("-D")]
        if sys.platform.startswith("linux"):
            options["nvcc"].append("-Xcompiler=-fvisibility=hidden")
            # A bare toolkit lacks the libraries' headers (cuBLAS); torch's wheels depend on them.
            for include in sorted(torch_root.parent.glob("nvidia/*/include")):
                cxx += ["-idirafter", str(include)]
    make = CUDAExtension if with_cuda else CppExtension
    return make(
        "hesskern._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        extra_compile_args=options,
        extra_link_args=link,
        include_dirs=[str(ROOT / "csrc")],
    ), with_cuda


def config_header(torch, with_cuda: bool) -> str:
    """What csrc/ops.cpp reports in build_info()."""
    script = ROOT / "hesskern" / "ops" / "source_digest.py"
    digest = runpy.run_path(str(script))["source_digest"](ROOT / "csrc")
    macros = {
        "HESSKERN_SOURCES": digest,
        "HESSKERN_CUDA_VERSION": torch.version.cuda if with_cuda else "",
        "HESSKERN_CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else "",
    }
    return "".join(f'#define {name} "{value}"\n' for name, value in macros.items())


def build_command(header: str):
    from torch.utils.cpp_extension import BuildExtension

    class build_ext(BuildExtension):
        def run(self) -> None:
            if self.inplace or self.editable_mode:
                # pip would take a temporary folder and compile everything each time.
                self.build_temp = str(ROOT / "build" / "inplace")
            # A file that only ops.cpp includes, not macros on every command line, so that ninja
            # compiles what changed; written only when it changes, for the same reason.
            config = Path(self.build_temp) / "config" / "build_config.h"
            if not config.exists() or config.read_text() != header:
                config.parent.mkdir(parents=True, exist_ok=True)
                config.write_text(header)
            for module in self.extensions:
                module.include_dirs.append(str(config.parent.resolve()))
            super().run()

    return build_ext


def main() -> None:
    # torch calls ninja by name; pip installs it beside python, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join(
        [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    )
    torch = installed_torch()
    module, with_cuda = extension(torch)
    setup(
        # Not in pyproject.toml: setuptools before 77 refuses the form that later ones ask for.
        license="MIT",
        ext_modules=[module],
        cmdclass={"build_ext": build_command(config_header(torch, with_cuda))},
    )


if __name__ == "__main__":
    main()
