"""``python -m kills --count 200 --seed 0``; ``--way ekfac`` for one alone."""

from __future__ import annotations

import argparse
import sys

from kills.runner import run
from kills.ways import WAYS


def main() -> int:
    parser = argparse.ArgumentParser(prog="kills", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills, each way")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--way", choices=list(WAYS), action="append", help="which; all of them")
    options = parser.parse_args()
    return 0 if run(options.count, options.seed, options.way or list(WAYS), sys.stdout) else 1


if __name__ == "__main__":
    sys.exit(main())
