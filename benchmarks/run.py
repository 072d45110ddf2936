"""The same as ``hesskern bench``, for a checkout: ``python benchmarks/run.py [SUITE...]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hesskern.apps.bench.command import bench

if __name__ == "__main__":
    bench(prog_name="python benchmarks/run.py")
