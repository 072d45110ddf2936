"""Compiles every .cu file with nvcc alone and shows what its kernels take.

    python .ci/compile_cuda.py --output FOLDER ARCHITECTURE...

Warnings are errors, and so are spills: a kernel whose registers overflow into local memory, but for
the few bytes named below.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
# Bytes of spills that are borne, by the beginning of a kernel's name: a few registers, saved while
# a slab of rows is multiplied. Shapes without them were slower on an H200: 238 us instead of 205
# for 128 columns, 687 instead of 625 for 256.
BORNE = {
    "block_gram_kernel<BlockShape<4, 4, 5>": 8,
    "block_gram_kernel<BlockShape<7, 12, 5>": 8,
    "block_gram_kernel<BlockShape<8, 12, 6>": 64,
    "block_halves_kernel<BlockShape<8, 12, 6>": 8,
}
# What ptxas says where registers stay as they were at launch, or products wait for each other.
IGNORED = re.compile(r"setmaxnreg.*ignored|wgmma.*serializ|serializ.*wgmma", re.IGNORECASE)
# What a file with warpgroup products includes.
WARPGROUP = re.compile(r'#include "(\S*core/)?wgmma\.h"')
SHARED = re.compile(r"(\d+) bytes smem")


def compile_one(source: Path, output: Path, architectures: list[str]) -> str:
    """Messages of nvcc; raises with them if it fails."""
    command = ["nvcc", "-std=c++20", "-O3", "--Werror", "all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v", "-I", str(ROOT / "csrc")]
    for architecture in architectures:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    if "90a" in architectures:
        command.append("-DHESSKERN_SM90A")
    compiled = output / "-".join(source.relative_to(ROOT / "csrc" / "cuda").with_suffix(".o").parts)
    command += ["-c", str(source), "-o", str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.relative_to(ROOT)}:\n{done.stdout}{done.stderr}")
    warpgroups = "90a" in architectures and WARPGROUP.search(source.read_text())
    if warpgroups and shutil.which("cuobjdump"):
        check_warpgroups(source, compiled)
    ignored = [line for line in done.stderr.splitlines() if IGNORED.search(line)]
    if ignored:
        raise SystemExit(f"{source.relative_to(ROOT)}:\n" + "\n".join(ignored))
    return done.stderr


def check_warpgroups(source: Path, compiled: Path) -> None:
    """The kernels with warpgroup products for 9.0 became such instructions (HGMMA)."""
    command = ["cuobjdump", "-sass", "-arch", "sm_90a", str(compiled)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "HGMMA" not in shown:
        raise SystemExit(f"{source.relative_to(ROOT)}: no HGMMA among the instructions for sm_90a")


def kernels(messages: str) -> list[tuple[str, str, int, int, int]]:
    """Name, architecture, registers, static shared memory and spilled bytes of every kernel."""
    found, name, spills = [], ("", ""), 0
    for line in messages.splitlines():
        if entry := ENTRY.search(line):
            name = (entry[1], entry[2])
        elif frame := FRAME.search(line):
            spills = int(frame[2]) + int(frame[3])
        elif used := USED.search(line):
            shared = SHARED.search(line)
            found.append((*name, int(used[1]), int(shared[1]) if shared else 0, spills))
    return found


def readable(names: list[str]) -> list[str]:
    """C++ names without the namespaces, where c++filt is found."""
    try:
        text = "\n".join(names)
        shown = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return [
        re.sub(r"\(anonymous namespace\)::|hesskern::cuda::|^void ", "", line)
        for line in shown.stdout.splitlines()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the object files")
    parser.add_argument("architectures", nargs="+", help="e.g. 80 90a")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    if not sources:
        raise SystemExit("csrc/cuda holds no .cu file")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        messages = list(
            pool.map(
                lambda s: compile_one(s, arguments.output, arguments.architectures),
                sources,
            )
        )
    spilled = 0
    print("registers  shared  spilled  architecture  kernel")
    for source, said in zip(sources, messages, strict=True):
        rows = kernels(said)
        print(f"-- {source.name}: {len(rows)} kernels")
        shown = readable([row[0] for row in rows])
        for (_, architecture, registers, shared, spills), name in zip(rows, shown, strict=True):
            kernel = name.split("(")[0]
            print(f"{registers:9}  {shared:6}  {spills:7}  {architecture:12}  {kernel[:150]}")
            borne = max((b for start, b in BORNE.items() if kernel.startswith(start)), default=0)
            spilled += spills > borne
    if spilled:
        sys.exit(f"{spilled} kernels spill registers")


if __name__ == "__main__":
    main()
