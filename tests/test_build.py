"""What setup.py decides, and what the loader says of a missing, foreign or stale extension."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hesskern
from hesskern.ops import extension as _extension
from hesskern.ops.source_digest import source_digest

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("HESSKERN_CUDA", "HESSKERN_SANITIZE", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """setup.py's functions, without the environment of whoever runs the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions"))


def make_nvcc(folder: Path, release: str = "13.0", top: Path | None = None) -> Path:
    """A toolkit whose nvcc knows its version and, in a dry run, where it stands."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    says = f"echo '#$ TOP={top}/bin/..' >&2" if top else "true"
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in\n"
        f"  --version) echo 'Cuda compilation tools, release {release}, V{release}.88';;\n"
        f"  --dryrun) {says};;\nesac\n"
    )
    nvcc.chmod(0o755)
    return folder


class TestCudaWanted:
    @pytest.mark.parametrize(
        ("choice", "torch_cuda", "has_toolkit", "expected"),
        [
            (None, "13.0", True, True),
            (None, "13.0", False, False),
            (None, None, True, False),
            ("", "13.0", True, True),
            ("auto", "13.0", True, True),
            ("AUTO", None, False, False),
            ("0", "13.0", True, False),
            ("1", "13.0", True, True),
        ],
    )
    def test_choice(
        self,
        build: SimpleNamespace,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        choice: str | None,
        torch_cuda: str | None,
        has_toolkit: bool,
        expected: bool,
    ) -> None:
        def no_gpu() -> bool:
            raise AssertionError("the build asked for a GPU")

        monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
        if choice is not None:
            monkeypatch.setenv("HESSKERN_CUDA", choice)
        toolkit = str(make_nvcc(tmp_path)) if has_toolkit else None
        assert build.cuda_wanted(torch_cuda, toolkit) is expected

    @pytest.mark.parametrize(
        ("choice", "torch_cuda", "has_toolkit", "message"),
        [
            ("1", None, True, "HESSKERN_CUDA=1 needs a CUDA build of torch"),
            ("1", "13.0", False, "HESSKERN_CUDA=1 needs nvcc on PATH or below CUDA_HOME"),
            ("yes", "13.0", True, "HESSKERN_CUDA must be one of auto, 0, 1; got 'yes'"),
            ("auto", "12.8", True, "built with CUDA 12.8 but nvcc in .* is CUDA 13.0"),
            ("1", "12.8", True, "set HESSKERN_CUDA=0"),
        ],
    )
    def test_errors(
        self,
        build: SimpleNamespace,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        choice: str,
        torch_cuda: str | None,
        has_toolkit: bool,
        message: str,
    ) -> None:
        monkeypatch.setenv("HESSKERN_CUDA", choice)
        toolkit = str(make_nvcc(tmp_path)) if has_toolkit else None
        with pytest.raises(SystemExit, match=message):
            build.cuda_wanted(torch_cuda, toolkit)

    def test_switched_off_it_looks_at_no_toolkit(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HESSKERN_CUDA", "0")
        assert build.cuda_wanted("12.8", str(make_nvcc(tmp_path))) is False


class TestToolkit:
    def test_nvcc_beside_its_toolkit(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", f"{make_nvcc(tmp_path) / 'bin'}{os.pathsep}/usr/bin:/bin")
        assert build.cuda_home() == str(tmp_path)

    def test_nvcc_is_a_wrapper_outside_its_toolkit(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        toolkit = tmp_path / "cuda-13.0"
        wrapper = make_nvcc(tmp_path / "local", top=toolkit)
        monkeypatch.setenv("PATH", f"{wrapper / 'bin'}{os.pathsep}/usr/bin:/bin")
        assert build.cuda_home() == str(toolkit)

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_variable_goes_before_path(
        self,
        build: SimpleNamespace,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        variable: str,
    ) -> None:
        monkeypatch.setenv("PATH", f"{make_nvcc(tmp_path / 'a') / 'bin'}{os.pathsep}/usr/bin:/bin")
        monkeypatch.setenv(variable, str(make_nvcc(tmp_path / "b")))
        assert build.cuda_home() == str(tmp_path / "b")
        monkeypatch.setenv(variable, str(tmp_path / "without nvcc"))
        assert build.cuda_home() is None

    def test_version(self, build: SimpleNamespace, tmp_path: Path) -> None:
        assert build.toolkit_version(str(make_nvcc(tmp_path, release="12.8"))) == "12.8"


class TestArchitectures:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ("sm_80", "8.0"),
            ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "8.0;8.6;9.0;10.0;12.0"),
            ("sm_90a compute_120", "9.0a;12.0+PTX"),
        ],
    )
    def test_torch_s_own(self, build: SimpleNamespace, flags: str, expected: str) -> None:
        assert build.cuda_architectures(flags) == expected

    def test_variable_goes_first(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        assert build.cuda_architectures("sm_75") == "8.0;9.0+PTX"

    def test_too_old(self, build: SimpleNamespace) -> None:
        with pytest.raises(SystemExit, match=r"8\.0 or newer, torch is built for 'sm_61 sm_75'"):
            build.cuda_architectures("sm_61 sm_75")

    def test_none(self, build: SimpleNamespace) -> None:
        with pytest.raises(SystemExit, match="set TORCH_CUDA_ARCH_LIST"):
            build.cuda_architectures("")


def gencode(architecture: str, code: str) -> str:
    return f"-gencode=arch={architecture},code={code}"


class TestHopper:
    """9.0 is built as sm_90a; what later cards need stays."""

    @pytest.mark.parametrize(
        ("given", "expected", "macro"),
        [
            ([("compute_80", "sm_80")], [("compute_80", "sm_80")], False),
            ([("compute_90", "sm_90")], [("compute_90a", "sm_90a")], True),
            (
                [("compute_80", "sm_80"), ("compute_90", "compute_90"), ("compute_90", "sm_90")],
                [("compute_80", "sm_80"), ("compute_90", "compute_90"), ("compute_90a", "sm_90a")],
                True,
            ),
            (
                [("compute_90", "sm_90"), ("compute_90a", "sm_90a")],
                [("compute_90a", "sm_90a")],
                True,
            ),
            # PTX alone for 9.0: the driver makes sm_90 of it.
            ([("compute_90", "compute_90")], [("compute_90", "compute_90")], False),
        ],
        ids=["8.0", "9.0", "8.0;9.0+PTX", "9.0;9.0a", "PTX alone"],
    )
    def test_list(
        self,
        build: SimpleNamespace,
        given: list[tuple[str, str]],
        expected: list[tuple[str, str]],
        macro: bool,
    ) -> None:
        flags = build.for_hopper([gencode(*pair) for pair in given])
        wanted = [gencode(*pair) for pair in expected]
        assert flags == wanted + (["-DHESSKERN_SM90A"] if macro else [])

    @pytest.mark.parametrize("architectures", ["9.0", "8.0;9.0+PTX", "Hopper", "9.0a 8.6"])
    def test_torchs_own_flags(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, architectures: str
    ) -> None:
        from torch.utils.cpp_extension import _get_cuda_arch_flags

        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        flags = build.for_hopper(_get_cuda_arch_flags())
        assert gencode("compute_90a", "sm_90a") in flags
        assert gencode("compute_90", "sm_90") not in flags
        assert (gencode("compute_90", "compute_90") in flags) == (
            "PTX" in architectures or architectures == "Hopper"
        )
        # torch takes these for all architectures, and adds none.
        assert _get_cuda_arch_flags(flags) == []


class TestFlags:
    @pytest.mark.parametrize("platform", ["linux", "darwin"])
    def test_binary_is_portable(
        self, build: SimpleNamespace, tmp_path: Path, platform: str
    ) -> None:
        compile_flags, link_flags = build.compiler_flags(platform, tmp_path, sanitize=False)
        flags = " ".join(compile_flags + link_flags)
        assert "-march" not in flags
        assert "-mtune" not in flags
        assert "/arch" not in flags
        assert "sanitize" not in flags

    def test_openmp_comes_from_torch(self, build: SimpleNamespace, tmp_path: Path) -> None:
        # A runtime of our own would be a second thread pool that torch.set_num_threads misses.
        assert build.compiler_flags("linux", tmp_path, False)[1] == []
        assert build.compiler_flags("darwin", tmp_path, False)[1] == []
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "omp.h").touch()
        link_flags = build.compiler_flags("darwin", tmp_path, False)[1]
        assert link_flags == [f"-L{tmp_path / 'lib'}", "-lomp"]

    def test_sanitizers(self, build: SimpleNamespace, tmp_path: Path) -> None:
        compile_flags, link_flags = build.compiler_flags("linux", tmp_path, sanitize=True)
        assert "-fsanitize=address,undefined" in compile_flags
        assert "-fno-sanitize-recover=undefined" in compile_flags
        assert link_flags == ["-fsanitize=address,undefined"]

    def test_windows(self, build: SimpleNamespace, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="GCC or Clang"):
            build.compiler_flags("win32", tmp_path, sanitize=False)


# Prints the extension that setup.py would build with a CUDA torch, on a machine without a GPU.
EXTENSION = """
import runpy, sys, torch
torch.version.cuda, arch_flags = sys.argv[1] or None, sys.argv[2]
torch.cuda._is_compiled = lambda: True
torch._C._cuda_getDeviceCount = lambda: 0
torch._C._cuda_getArchFlags = lambda: arch_flags
setup = runpy.run_path("setup.py", run_name="setup_functions")
module, with_cuda = setup["extension"](torch)
from torch.utils import cpp_extension
nvcc = module.extra_compile_args.get("nvcc", [])
print(with_cuda, cpp_extension.CUDA_HOME, *module.sources, *nvcc)
print(setup["config_header"](torch, with_cuda))
"""


class TestExtension:
    def describe(self, toolkit: Path, torch_cuda: str, **environment: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        clean["PATH"] = f"{toolkit / 'bin'}{os.pathsep}/usr/bin:/bin"
        run = subprocess.run(
            [sys.executable, "-c", EXTENSION, torch_cuda, "sm_80 sm_90"],
            cwd=ROOT, env=clean | environment, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout

    def test_with_cuda(self, tmp_path: Path) -> None:
        said = self.describe(make_nvcc(tmp_path), "13.0")
        assert said.startswith(f"True {tmp_path} ")
        for path in (ROOT / "csrc").rglob("*"):
            if path.suffix in (".cpp", ".cu"):
                assert path.relative_to(ROOT).as_posix() in said
        assert "--Werror all-warnings" in said
        assert '#define HESSKERN_CUDA_VERSION "13.0"' in said
        assert '#define HESSKERN_CUDA_ARCHITECTURES "8.0;9.0"' in said

    def test_switched_off(self, tmp_path: Path) -> None:
        said = self.describe(make_nvcc(tmp_path), "13.0", HESSKERN_CUDA="0")
        assert said.startswith("False ")
        assert "csrc/cpu/mirror.cpp" in said
        assert "csrc/cuda" not in said
        assert '#define HESSKERN_CUDA_VERSION ""' in said


class TestTorch:
    def test_missing(self, tmp_path: Path) -> None:
        # What an isolated build sees: it must stop and say what to type, not fetch a torch.
        (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "setup.py", "egg_info", "--egg-base", str(tmp_path)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 1
        assert "pip install --no-build-isolation ." in run.stderr
        assert "Traceback" not in run.stderr
        assert not list(tmp_path.glob("*.egg-info"))

    @pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
    def test_too_old(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, version: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))  # type: ignore[arg-type]
        with pytest.raises(SystemExit, match=rf"needs torch 2\.10 or newer; found {version[:3]}"):
            build.installed_torch()

    @pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git12"])
    def test_new_enough(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, version: str
    ) -> None:
        fake = SimpleNamespace(__version__=version)
        monkeypatch.setitem(sys.modules, "torch", fake)  # type: ignore[arg-type]
        assert build.installed_torch() is fake

    def test_build_requirements_name_no_torch(self) -> None:
        system = (
            (ROOT / "pyproject.toml").read_text().split("[build-system]")[1].split("[project]")[0]
        )
        requires = next(line for line in system.splitlines() if line.startswith("requires"))
        assert "setuptools" in requires
        assert "torch" not in requires

    def test_the_licence_is_named_in_a_form_that_every_setuptools_reads(
        self, tmp_path: Path
    ) -> None:
        project = (ROOT / "pyproject.toml").read_text().split("[project]")[1].split("\n[")[0]
        keys = {line.split("=")[0].strip() for line in project.splitlines() if "=" in line}
        assert not keys & {"license", "license-files"}
        command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "HESSKERN_CUDA": "0"})
        (information,) = tmp_path.glob("*/PKG-INFO")
        assert "\nLicense: MIT\n" in information.read_text()
        assert "\nLicense-File: LICENSE\n" in information.read_text()


class TestLoader:
    def use(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        info = _extension.build_info() | changes
        fake = SimpleNamespace(build_info=lambda: info)
        monkeypatch.setitem(sys.modules, "hesskern._C", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(hesskern, "_C", fake)

    def test_this_build_loads(self) -> None:
        module = _extension.load()
        assert module.build_info()["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
        assert module.num_threads() == torch.get_num_threads()

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "hesskern._C", None)  # type: ignore[arg-type]
        monkeypatch.delattr(hesskern, "_C", raising=False)
        with pytest.raises(ImportError, match=r"(?s)could not be loaded.*--no-build-isolation \."):
            _extension.load()

    def test_built_for_another_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, torch="2.9.1")
        with pytest.raises(ImportError, match=r"(?s)built for torch 2\.9 but torch .*Build it"):
            _extension.load()

    def test_local_version_and_patch_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        major, minor = torch.__version__.split(".")[:2]
        self.use(monkeypatch, torch=f"{major}.{minor}.99+cu130")
        _extension.load()

    def test_older_than_its_sources(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, sources="0" * 16)
        with pytest.raises(ImportError, match=r"(?s)older than the sources.*setup\.py build_ext"):
            _extension.load()


class TestDigest:
    def test_sources_only(self, tmp_path: Path) -> None:
        (tmp_path / "cuda").mkdir()
        (tmp_path / "ops.cpp").write_text("int a;")
        first = source_digest(tmp_path)
        (tmp_path / "notes.txt").write_text("not compiled")
        assert source_digest(tmp_path) == first
        (tmp_path / "cuda" / "kernel.cu").write_text("int b;")
        second = source_digest(tmp_path)
        assert second != first
        (tmp_path / "cuda" / "kernel.cu").rename(tmp_path / "cuda" / "other.cu")
        assert source_digest(tmp_path) not in (first, second)
