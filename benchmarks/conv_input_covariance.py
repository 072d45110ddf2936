"""conv_input_covariance_: each of its ways, and the one it picks, against unfold + GEMM.

    python benchmarks/conv_input_covariance.py [--json FILE] [--repeats 5] [--only TEXT] [--valid]

The opponent is the fastest of four forms a user would write: F.unfold and one GEMM per sample into
an accumulator, F.unfold and a batched GEMM summed over samples, F.unfold transposed and one GEMM,
and for 1 x 1 kernels no unfold at all. "over" is the median over rounds of its time over
hesskern's; "choice" is the time of the fastest way over that of the one picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from grids import compare, normal, options, spread, write
from torch import Tensor

from hesskern import ops

PATHS = ("patches", "bands", "lags", "spectral")
# Takes 1 x 1 kernels with at most that many channels per group.
_POINTWISE, _POINTWISE_CHANNELS = "pointwise", 16
SHOWN = (*PATHS, _POINTWISE)
# Samples, channels, pixels per side, kernel size, stride, groups.
TARGETS = ((64, 64, 32, 3, 1, 1), (32, 64, 28, 5, 1, 1))
_UNFOLDED_BYTES = 2**30
_ORDER = 4608
# Ways that would take minutes at a point are left out there.
_MULTIPLY_ADDS = 4e10

by_path = torch.ops.hesskern_internal.conv_input_covariance_by_

Point = tuple[int, int, int, int, int, int]


def grid() -> Iterator[Point]:
    """C 1..512, k 1..7, stride 1..2, 7..224 pixels, samples as memory allows, and layers with
    groups."""
    yield from TARGETS
    for side in (7, 14, 28, 56, 112, 224):
        for channels in (1, 3, 6, 16, 64, 256, 512):
            for kernel in (1, 3, 5, 7):
                for stride in (1, 2):
                    if channels * kernel**2 > _ORDER or kernel > side:
                        continue
                    positions = (side // stride) ** 2
                    per_sample = 4 * channels * kernel**2 * positions
                    work = (channels * kernel**2) ** 2 * positions
                    samples = int(
                        min(64, _UNFOLDED_BYTES // 2 // per_sample, _MULTIPLY_ADDS // work)
                    )
                    if samples >= 1:
                        yield samples, channels, side, kernel, stride, 1
                    if samples > 1:
                        yield 1, channels, side, kernel, stride, 1
    yield from ((32, 64, 28, 3, 1, 64), (32, 128, 14, 3, 1, 32), (32, 128, 28, 5, 2, 128))


def forms(
    x: Tensor, kernel: int, padding: int, stride: int, groups: int
) -> dict[str, Callable[[], Tensor]]:
    """What a user would write; [g, d, d]."""
    d = x.shape[1] // groups * kernel**2

    def unfolded() -> Tensor:
        u = F.unfold(x, kernel, padding=padding, stride=stride)
        return u.unflatten(1, (groups, d))

    def loop() -> Tensor:
        acc = torch.zeros(groups, d, d)
        for sample in unfolded():
            acc.baddbmm_(sample, sample.mT)
        return acc

    def batched() -> Tensor:
        u = unfolded()
        return torch.matmul(u, u.mT).sum(0)

    def transposed() -> Tensor:
        u = unfolded().permute(1, 2, 0, 3).reshape(groups, d, -1)
        return u @ u.mT

    def no_unfold() -> Tensor:
        u = x[..., ::stride, ::stride].unflatten(1, (groups, d)).flatten(3)
        u = u.permute(1, 2, 0, 3).reshape(groups, d, -1)
        return u @ u.mT

    found: dict[str, Callable[[], Tensor]] = {"loop": loop, "transposed": transposed}
    if 4 * len(x) * groups * d * d <= _UNFOLDED_BYTES:
        found["batched"] = batched
    if kernel == 1:
        found["no unfold"] = no_unfold
    return found


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--valid", action="store_true", help="no padding instead of half a kernel")
    arguments = parser.parse_args()
    groups, extra = [], []
    print(
        f"{'point':34} {'hesskern ms':>16} {'unfold + GEMM':>16}   over"
        + "".join(f" {path:>16}" for path in SHOWN)
        + "  choice"
    )
    for point in grid():
        samples, channels, side, kernel, stride, count = point
        name = f"N{samples}-C{channels}-{side}px-k{kernel}-s{stride}-g{count}"
        if arguments.only not in name:
            continue
        x = normal(samples, channels, side, side)
        d = channels // count * kernel**2
        padding = 0 if arguments.valid else kernel // 2
        window = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1])
        acc = torch.zeros(count, d, d)

        def ours(x: Tensor = x, acc: Tensor = acc, window=window, count: int = count) -> Tensor:
            return ops.conv_input_covariance_(acc.zero_(), x, *window, count)

        def one(path: str, x: Tensor = x, acc: Tensor = acc, window=window, count: int = count):
            by_path(acc.zero_(), x, *window, count, 1.0, path)
            return acc

        calls = {"hesskern": ours}
        fits = kernel == 1 and channels // count <= _POINTWISE_CHANNELS
        paths = (*PATHS, _POINTWISE) if fits else PATHS
        calls |= {path: lambda path=path, one=one: one(path) for path in paths}
        opponents = forms(x, kernel, padding, stride, count)
        group = compare(name, calls | opponents, arguments.repeats)
        rows = {row.name: row for row in group.rows}
        opponent = min((rows[key] for key in opponents), key=lambda row: row.median or 0.0)
        best = min(rows[path].ratio or 0.0 for path in paths)
        over = opponent.ratio or 0.0
        print(
            f"{name:34} {spread(rows['hesskern']):>16} {spread(opponent):>16} {over:6.2f}"
            + "".join(f" {spread(rows[path]) if path in rows else '-':>16}" for path in SHOWN)
            + f"  {best:6.2f}",
            flush=True,
        )
        groups.append(group)
        extra.append({"over": over, "choice": best, "opponent": opponent.name})
    write(arguments.json, groups, extra)
    if extra:
        over = sorted(float(point["over"]) for point in extra)
        choice = sorted(float(point["choice"]) for point in extra)
        print(
            f"{len(extra)} points; over unfold + GEMM: least {over[0]:.2f}, median "
            f"{over[len(over) // 2]:.2f}; fastest way over the one picked: least {choice[0]:.2f}, "
            f"median {choice[len(choice) // 2]:.2f}"
        )


if __name__ == "__main__":
    main()
