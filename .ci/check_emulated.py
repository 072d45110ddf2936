"""Whether the checks on the CPU ran every CUDA kernel that is compiled, each instantiation.

    python .ci/check_emulated.py PROGRAM FILE

FILE holds the addresses of the kernels that ran, as the program writes them with --kernels.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"^([0-9a-f]+) [tTwW] void hesskern::cuda::\S*?(\w+_kernel<.*)$")


def main() -> None:
    program, file = sys.argv[1:]
    ran = {int(line, 16) for line in Path(file).read_text().split()}
    symbols = subprocess.run(["nm", "-C", program], capture_output=True, text=True, check=True)
    kernels = {
        int(match[1], 16): match[2].replace("(anonymous namespace)::", "")
        for line in symbols.stdout.splitlines()
        if (match := KERNEL.match(line.replace("(anonymous namespace)", "anonymous")))
    }
    if not kernels:
        sys.exit(f"{program} shows no kernels")
    missed = [name for address, name in kernels.items() if address not in ran]
    for name in missed:
        print(f"not run: {name}")
    if missed:
        sys.exit(f"{len(missed)} of {len(kernels)} kernels were not run")
    print(f"all {len(kernels)} kernels were run")


if __name__ == "__main__":
    main()
