"""Where the time of exact Kronecker factors goes: torch's profiler over one pass.

python benchmarks/profile_factors.py [mlp | lenet5 | cnn]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hesskern.apps.bench import cases
from hesskern.apps.bench.contenders import hesskern_factors
from hesskern.apps.bench.settings import Settings


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cnn"
    call = hesskern_factors(getattr(cases, name)(Settings()), "exact")
    call()
    with torch.profiler.profile() as profile:
        call()
    averages = profile.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48))


if __name__ == "__main__":
    main()
