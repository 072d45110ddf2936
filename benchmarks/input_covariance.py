"""input_covariance_ against acc += x.T @ x and addmm_ over a grid of shapes and dtypes.

    python benchmarks/input_covariance.py [--json FILE] [--repeats 5] [--only TEXT]

Ratios are medians over rounds of the better of torch's two forms over hesskern's time. Every call
adds to an accumulator, as over the batches of a pass: a billionth of what it begins with, so that
results agree however often each is called.
"""

from __future__ import annotations

import torch
from grids import compare, normal, options, spread, write
from torch import Tensor

from hesskern import ops

ROWS = (1, 8, 32, 64, 512, 4096, 60_000)
# Orders about the widths of a tile, then layers' widths.
ORDERS = (
    *(1, 2, 3, 4, 8, 16, 24, 32, 33, 48, 64, 65),
    *(100, 128, 200, 256, 300, 512, 784, 1024, 2048, 4096),
)
# Products that take more than this many multiply-adds add nothing but minutes.
_LIMIT = 2e11
_ALPHA = 1e-9


def main() -> None:
    arguments = options(__doc__.splitlines()[0]).parse_args()
    groups, extra = [], []
    print(f"{'shape':24} {'hesskern ms':>16} {'acc += x.T @ x':>16} {'addmm_':>16}  ratio  GFLOP/s")
    for dtype in (torch.float32, torch.bfloat16):
        for n in ROWS:
            for d in ORDERS:
                name = f"{str(dtype)[6:]}-{n}x{d}"
                if n * d * d > _LIMIT or arguments.only not in name:
                    continue
                x = normal(n, d).to(dtype)
                wide = x.float()
                sums = [wide.T @ wide for _ in range(3)]

                def ours(acc: Tensor = sums[0], x: Tensor = x) -> Tensor:
                    return ops.input_covariance_(acc, x, _ALPHA)

                def product(acc: Tensor = sums[1], x: Tensor = x) -> Tensor:
                    wide = x.float()
                    return acc.add_(wide.T @ wide, alpha=_ALPHA)

                def update(acc: Tensor = sums[2], x: Tensor = x) -> Tensor:
                    wide = x.float()
                    return acc.addmm_(wide.T, wide, alpha=_ALPHA)

                calls = {"hesskern": ours, "acc += x.T @ x": product, "addmm_": update}
                group = compare(name, calls, arguments.repeats)
                ratio = min(row.ratio or 0.0 for row in group.rows[1:])
                rate = n * d * (d + 1) / (group.rows[0].median or 1.0) * 1e-9
                print(
                    f"{name:24} {' '.join(f'{spread(row):>16}' for row in group.rows)}"
                    f"  {ratio:5.2f}  {rate:7.1f}",
                    flush=True,
                )
                groups.append(group)
                extra.append({"ratio": ratio, "gflops": rate})
    write(arguments.json, groups, extra)


if __name__ == "__main__":
    main()
