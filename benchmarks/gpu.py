"""Every operator on a GPU against what a user would write in torch.

    python benchmarks/gpu.py --output FOLDER [--device cuda] [--part 1.0]

Writes gpu.json and gpu.md, anew after every problem. Times are medians of rounds in which all
contenders of a problem take turns, the device synchronized before and after each; "over" is a
contender's time over hesskern's. A contender that fails is named with its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern import build_info, ops
from hesskern.bench.machine import facts

Contenders = dict[str, Callable[[], Any]]
Problem = tuple[str, Contenders]


class Problems:
    """Problems on one device, their sizes times ``part``."""

    def __init__(self, device: torch.device, part: float) -> None:
        self._device, self._part = device, part
        self._generator = torch.Generator(device).manual_seed(0)

    def _size(self, n: int) -> int:
        return max(int(n * self._part), 8)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device, generator=self._generator)

    def __iter__(self) -> Iterator[Problem]:
        yield from self._covariance()
        yield from self._convolution()
        yield from self._output_hessian()
        yield from self._layer_hessian()
        yield from self._kronecker()

    def _covariance(self) -> Iterator[Problem]:
        n = self._size(65536)
        for d in (self._size(512), self._size(2048), self._size(4096)):
            x, acc = self._normal(n, d), torch.zeros(d, d, device=self._device)
            narrow = x.bfloat16()
            yield (
                f"input covariance [{n}, {d}], float32",
                {
                    "hesskern": lambda acc=acc, x=x: ops.input_covariance_(acc.zero_(), x),
                    "torch.mm": lambda x=x: x.T @ x,
                    "TF32 torch.mm": partial(_with_tf32, lambda x=x: x.T @ x),
                    "three TF32 torch.mm": lambda x=x: _split_product(x),
                    "two TF32 torch.mm and a transpose": lambda x=x: _split_product(x, True),
                },
            )
            yield (
                f"input covariance [{n}, {d}], bfloat16",
                {
                    "hesskern": lambda acc=acc, x=narrow: ops.input_covariance_(acc.zero_(), x),
                    "torch.mm in bfloat16": lambda x=narrow: x.T @ x,
                },
            )

    def _convolution(self) -> Iterator[Problem]:
        for n, c, side, k in ((64, 64, 32, 3), (64, 256, 16, 3), (64, 3, 224, 7)):
            n = self._size(n)
            x = self._normal(n, c, side, side)
            d = c * k * k
            acc = torch.zeros(d, d, device=self._device)
            window = ([k, k], [1, 1], [k // 2] * 2, [1, 1])

            def unfolded(x: Tensor = x, k: int = k, d: int = d) -> Tensor:
                u = F.unfold(x, k, padding=k // 2).permute(1, 0, 2).reshape(d, -1)
                return u @ u.T

            yield (
                f"conv input covariance [{n}, {c}, {side}, {side}], {k} x {k}",
                {
                    "hesskern": lambda acc=acc, x=x, window=window: ops.conv_input_covariance_(
                        acc.zero_(), x, *window
                    ),
                    "unfold + torch.mm": unfolded,
                },
            )

    def _output_hessian(self) -> Iterator[Problem]:
        for n, c, m in ((65536, 10, 64), (65536, 10, 200), (16384, 10, 1024), (4096, 100, 512)):
            n = self._size(n)
            g = self._normal(n, c, m)
            p = torch.softmax(self._normal(n, c), 1)
            acc = torch.zeros(m, m, device=self._device)

            def composed(g: Tensor = g, p: Tensor = p, m: int = m) -> Tensor:
                centred = g - (p.unsqueeze(1) @ g)
                rows = (p.sqrt().unsqueeze(2) * centred).reshape(-1, m)
                return rows.T @ rows

            yield (
                f"output Hessian [{n}, {c}, {m}]",
                {
                    "hesskern": lambda acc=acc, g=g, p=p: ops.output_hessian_(acc.zero_(), g, p),
                    "torch": composed,
                    "one read (sum)": lambda g=g: g.sum(),
                },
            )

    def _layer_hessian(self) -> Iterator[Problem]:
        n, d, m, c = self._size(60000), 784, 200, 10
        model = nn.Sequential(
            nn.Linear(d, m), nn.ReLU(), nn.Linear(m, m), nn.ReLU(), nn.Linear(m, c)
        ).to(self._device)
        x = self._normal(n, d)
        targets = torch.randint(c, (n,), device=self._device, generator=self._generator)
        s, V = self._normal(n, c - 1, m) / 10, self._normal(m, d)
        rest = {name: p.detach() for name, p in model.named_parameters() if name != "0.weight"}

        def loss(weight: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, {**rest, "0.weight": weight}, (x,))
            return F.cross_entropy(logits, targets)

        def product(weight: Tensor, vector: Tensor) -> Tensor:
            return torch.func.jvp(torch.func.grad(loss), (weight,), (vector,))[1]

        compiled = torch.compile(product) if self._device.type == "cuda" else product
        weight = model[0].weight.detach()
        ours = partial(ops.layer_hessian_matmul, x, s, V, 1 / n)
        # About what a tolerance of 1e-4 leaves of a trained network's samples.
        few = n * 36 // 100
        pruned = partial(ops.layer_hessian_matmul, x[:few], s[:few], V, 1 / n)
        yield (
            f"layer Hessian, fc1 of F-200^2, {n} samples",
            {
                "hesskern": ours,
                "hesskern, TF32 allowed": partial(_with_tf32, ours),
                "hesskern, 36% of the samples": pruned,
                "jvp of grad, compiled": lambda: compiled(weight, V),
                "jvp of grad, compiled, TF32 allowed": partial(
                    _with_tf32, lambda: compiled(weight, V)
                ),
            },
        )

    def _kronecker(self) -> Iterator[Problem]:
        small = [(16 + 5 * i, 256 - 4 * i) for i in range(48)]
        stages = ((64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3))
        large = [
            shape
            for width, out, count in stages
            for shape in [(width, out), (width, 9 * width), (out, width)] * count
        ]
        for name, shapes in (("48 small layers", small), ("ResNet-50's layers", large)):
            A = [self._normal(m, m) for m, _ in shapes]
            B = [self._normal(d, d) for _, d in shapes]
            X = [self._normal(m, d) for m, d in shapes]
            ours = partial(ops.grouped_kron_matmul, A, B, X)
            yield (
                f"Kronecker products of {name}",
                {
                    "hesskern": ours,
                    "hesskern, TF32 allowed": partial(_with_tf32, ours),
                    "a loop of torch products": lambda A=A, B=B, X=X: [
                        a @ x @ b.T for a, b, x in zip(A, B, X, strict=True)
                    ],
                },
            )


def _with_tf32(call: Callable[[], Any]) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision(before)


def _split_product(x: Tensor, two: bool = False) -> Tensor:
    """float32 accuracy by hand: x in two TF32 parts, three products, or two and a transpose."""
    high = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)
    low = x - high

    def products() -> Tensor:
        cross = low.T @ high
        return high.T @ high + cross + (cross.T if two else high.T @ low)

    return _with_tf32(products)


def measure(
    contenders: Contenders, device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every contender in every round, and the errors of those that failed."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, call in contenders.items():
        try:
            call()
            synchronize()
            times[name] = []
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for _ in range(rounds):
        for name, seconds in times.items():
            synchronize()
            begin = time.perf_counter()
            contenders[name]()
            synchronize()
            seconds.append(time.perf_counter() - begin)
    return times, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=float, default=1.0, help="of every problem's size (1)")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": facts(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "build": build_info(),
        "part": arguments.part,
    }
    lines = ["| problem | contender | median | over hesskern |", "|---|---|---:|---:|"]
    problems: list[dict[str, Any]] = []
    for name, contenders in Problems(device, arguments.part):
        times, errors = measure(contenders, device, arguments.rounds)
        medians = {key: statistics.median(seconds) for key, seconds in times.items()}
        problems.append({"problem": name, "seconds": times, "medians": medians, "errors": errors})
        new = []
        for key, median in medians.items():
            ratio = f"{median / medians['hesskern']:.2f}x" if "hesskern" in medians else "–"
            new.append(f"| {name} | {key} | {median * 1e3:.3f} ms | {ratio} |")
        new += [f"| {name} | {key} | {error} | – |" for key, error in errors.items()]
        print("\n".join(new), flush=True)
        lines += new
        write(arguments.output, about, problems, lines)


def write(folder: Path, about: Any, problems: Any, lines: list[str]) -> None:
    for file, text in (
        ("gpu.json", json.dumps({"about": about, "problems": problems})),
        ("gpu.md", f"{about['device']}\n\n" + "\n".join(lines) + "\n"),
    ):
        temporary = folder / f".{file}"
        temporary.write_text(text)
        temporary.rename(folder / file)


if __name__ == "__main__":
    main()
