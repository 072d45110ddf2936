"""EKFAC's corrections against torch and against the multiplications alone, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/eigen_correction.py

Times are the thread's own, the least of repeated calls: a machine that others use as well changes
them little. The floor is the count of multiplications at the rate of a large ``a @ b``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hesskern import ops
from hesskern.ops import reference

# Samples, root rows, positions (None: no axis for them), outputs, inputs.
LAYERS = (
    (8, 1, 128, 768, 256),
    (8, 1, 128, 256, 256),
    (8, 1, 128, 256, 1024),
    (8, 1, 128, 2000, 256),
    (8192, 1, None, 200, 784),
    (8192, 9, None, 200, 200),
)
# Samples, channels, pixels per side, kernel size, padding, outputs, stride.
CONVOLUTIONS = (
    (512, 1, 28, 5, 2, 6, 1),
    (512, 6, 14, 5, 0, 16, 1),
    (128, 16, 32, 3, 1, 16, 1),
    (128, 64, 8, 3, 1, 64, 1),
    (128, 128, 4, 3, 1, 128, 1),
)


def least(call: Callable[[], Tensor], seconds: float = 1.0) -> float:
    """Milliseconds."""
    call()
    times = []
    end = time.thread_time() + seconds
    while time.thread_time() < end or len(times) < 3:
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    return 1e3 * min(times)


def basis(order: int) -> Tensor:
    return torch.linalg.qr(torch.randn(order, order)).Q


def work(n: int, r: int, t: int, m: int, d: int) -> int:
    """Multiplications, each rotation before or after the sum over positions."""
    return n * (r * m * m * min(t, d) + d * d * min(t, r * m) + r * t * m * d)


def show(name: str, ours: float, plain: float, floor: float) -> None:
    print(f"{name:32} {ours:8.2f} ms, torch {plain:8.2f} ms, floor {floor:8.2f} ms", flush=True)


def linear(n: int, r: int, t: int | None, m: int, d: int, rate: float) -> None:
    U, V, acc = basis(m), basis(d), torch.zeros(m, d)
    if t is None:
        g, x = torch.randn(n, r, m), torch.randn(n, d)
        plain = least(lambda: (g @ U).square().sum(1).T @ (x @ V).square())
        multiplications = n * (r * m * m + d * d + m * d)
    else:
        g, x = torch.randn(n, r, t, m).mT, torch.randn(n, t, d).mT
        plain = least(lambda: ((g.mT @ U).mT @ (x.mT @ V).unsqueeze(1)).square().sum((0, 1)))
        multiplications = work(n, r, t, m, d)
    ours = least(lambda: ops.eigen_correction_(acc, g, x, U, V))
    show(f"linear {n} {r} {t} {m} {d}", ours, plain, multiplications / rate)


def convolution(
    n: int, c: int, side: int, size: int, padding: int, m: int, stride: int, rate: float
) -> None:
    out, d = (side + 2 * padding - size) // stride + 1, c * size * size
    x, g = torch.randn(n, c, side, side), torch.randn(n, 1, m, out, out)
    U, V, acc = basis(m), basis(d), torch.zeros(m, d)
    window = ((size, size), (stride, stride), (padding, padding), (1, 1))

    def patches() -> Tensor:
        return reference.unfold(x, *window).mT

    def rotated() -> Tensor:
        return torch.bmm((g[:, 0].flatten(2).mT @ U).mT, patches() @ V).square().sum(0)

    def summed() -> Tensor:
        return (U.T @ (torch.bmm(g[:, 0].flatten(2), patches()) @ V)).square().sum(0)

    ours = least(lambda: ops.conv_eigen_correction_(acc, g, x, U, V, *window))
    plain = min(least(rotated), least(summed))
    floor = work(n, 1, out * out, m, d) / rate
    show(f"convolution {n} {c} {side} {size} {m}", ours, plain, floor)


def main() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    rate = 2048 * 1024 * 1024 / least(lambda: a @ b)
    for layer in LAYERS:
        linear(*layer, rate)
    for layer in CONVOLUTIONS:
        convolution(*layer, rate)


if __name__ == "__main__":
    main()
