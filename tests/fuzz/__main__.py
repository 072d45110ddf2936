"""``python -m fuzz --count 1000 --seed 0``; ``--count 1 --seed S`` replays one model."""

from __future__ import annotations

import argparse
import sys

from fuzz.runner import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="models")
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the next has +1")
    parser.add_argument("--show", type=int, default=20, help="failures printed in full")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--thorough", action="store_true", help="all that is built on factors")
    parser.add_argument("--device", default="cpu", help="one that is held against the CPU")
    options = parser.parse_args()
    failed = run(
        options.seed,
        options.count,
        sys.stdout,
        options.show,
        options.jobs,
        options.thorough,
        options.device,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
