"""Checks what ``python -m build`` left: contents of the sdist and the wheel, and that it imports.

Usage: check_package.py DIST. Everything is installed into a temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORT = """
import hesskern, sys, torch
from hesskern import ops
assert hesskern.__file__.startswith(sys.argv[1]), hesskern.__file__
acc = ops.mirror_(ops.input_covariance_(torch.zeros(2, 2), torch.tensor([[1.0, 2.0]])))
assert acc.tolist() == [[1.0, 2.0], [2.0, 4.0]], acc
print("wheel imports and computes:", hesskern.build_info())
"""


def only(dist: Path, pattern: str) -> Path:
    found = sorted(dist.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one {pattern} in {dist}, found {[p.name for p in found]}")
    return found[0]


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [p for folder in ("csrc", "hesskern", "tests") for p in (ROOT / folder).rglob("*")]
    wanted = {
        p.relative_to(ROOT).as_posix()
        for p in tracked
        if p.is_file() and p.suffix not in (".pyc", ".so", ".begun")
    }
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "Makefile", "constraints.txt"}
    if missing := sorted(wanted - names):
        raise SystemExit(f"{path.name} lacks {missing}")
    if built := sorted(name for name in names if name.endswith((".so", ".pyc"))):
        raise SystemExit(f"{path.name} contains build products: {built}")


def check_wheel(path: Path) -> None:
    names = zipfile.ZipFile(path).namelist()
    outside = [n for n in names if not n.startswith(("hesskern/", "hesskern-"))]
    if outside:
        raise SystemExit(f"{path.name} installs outside its package: {outside}")
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hesskern").rglob("*.py")}
    if missing := sorted((sources | {"hesskern/py.typed"}) - set(names)):
        raise SystemExit(f"{path.name} lacks {missing}")
    if not any(n.startswith("hesskern/_C.") for n in names):
        raise SystemExit(f"{path.name} has no compiled extension")
    if not any("LICENSE" in n for n in names):
        raise SystemExit(f"{path.name} has no license")


def check_import(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as site, tempfile.TemporaryDirectory() as empty:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--target", site, str(wheel)], check=True)
        code = f"import sys; sys.path.insert(0, sys.argv[1]){IMPORT}"
        subprocess.run(
            [sys.executable, "-c", code, str(Path(site).resolve())], check=True, cwd=empty
        )


def main() -> None:
    dist = Path(sys.argv[1])
    sdist, wheel = only(dist, "*.tar.gz"), only(dist, "*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
    check_import(wheel)
    print(f"{sdist.name} and {wheel.name} are complete")


if __name__ == "__main__":
    main()
