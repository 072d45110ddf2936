"""Every operator on a GPU against what a user would write in torch.

    python benchmarks/gpu.py --output FOLDER [--device cuda] [--part 1.0] [--kernels]

Writes gpu.json and gpu.md, anew after every problem. Three times of every contender, medians all:
"rested", single calls after a pause, in rounds in which all contenders of a problem take turns;
"busy", the later half of calls without a pause, when a card's power may limit it; "graph", calls
back to back in a captured graph, without the host's part. "over" is a contender's rested time over
hesskern's. A contender that fails is named with its error. On a CPU there are rested times alone.
With --kernels, gpu_kernels.md and .json hold what runs in hesskern's calls, by torch's profiler.
"""

from __future__ import annotations

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
from gpu_report import Table, parser_of
from torch import Tensor, nn

from hesskern import ops

Contenders = dict[str, Callable[[], Any]]
Problem = tuple[str, Contenders]

PAUSE = 0.15
BUSY = 0.2
CALLS = 5
IN_GRAPH = 10


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
        yield from self._positions()
        yield from self._layer_hessian()
        yield from self._kronecker()

    def _covariance(self) -> Iterator[Problem]:
        n = self._size(65536)
        for full in (512, 2048, 4096):
            d = self._size(full)
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

    def _positions(self) -> Iterator[Problem]:
        for n, m, t in ((4096, 6, 784), (1024, 64, 1024)):
            n = self._size(n)
            g = self._normal(n, 1, m, t)
            acc = torch.zeros(m, m, device=self._device)

            def composed(g: Tensor = g, m: int = m) -> Tensor:
                rows = g.permute(0, 1, 3, 2).reshape(-1, m)
                return rows.T @ rows

            yield (
                f"root rows with positions [{n}, {m}, {t}]",
                {
                    "hesskern": lambda acc=acc, g=g: ops.output_hessian_(acc.zero_(), g),
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
        # As an operator keeps them from its second product on.
        packed = ops.pack_layer_inputs(x, m)
        anew = partial(ops.layer_hessian_matmul, x, s, V, 1 / n)
        ours = partial(anew, packed)
        # About what a tolerance of 1e-4 leaves of a trained network's samples.
        few = n * 36 // 100
        pruned = partial(
            ops.layer_hessian_matmul,
            x[:few],
            s[:few],
            V,
            1 / n,
            ops.pack_layer_inputs(x[:few], m),
        )
        yield (
            f"layer Hessian, fc1 of F-200^2, {n} samples",
            {
                "hesskern": ours,
                "hesskern, inputs packed anew": anew,
                "hesskern, TF32 allowed": partial(_with_tf32, ours),
                "hesskern, 36% of the samples": pruned,
                "jvp of grad, compiled": lambda: compiled(weight, V),
                "jvp of grad, compiled, TF32 allowed": partial(
                    _with_tf32, lambda: compiled(weight, V)
                ),
            },
        )
        block = self._normal(8, m, d)
        yield (
            f"layer Hessian, fc1 of F-200^2, {n} samples, 8 vectors",
            {
                "hesskern": partial(ops.layer_hessian_matmul, x, s, block, 1 / n, packed),
                "one by one": lambda: [
                    ops.layer_hessian_matmul(x, s, v, 1 / n, packed) for v in block
                ],
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


class Times:
    """Seconds of one contender's calls."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._call, self._cuda = call, device.type == "cuda"
        self.rested: list[float] = []
        self.busy: list[float] = []
        self.graph: float | None = None

    def rest(self) -> None:
        """Some calls after a pause."""
        if not self._cuda:
            begin = time.perf_counter()
            self._call()
            self.rested.append(time.perf_counter() - begin)
            return
        time.sleep(PAUSE)
        self.rested += self._timed(CALLS)

    def work(self) -> None:
        """Calls without a pause, and in a graph where that can be."""
        if not self._cuda:
            return
        count = min(max(int(BUSY / statistics.median(self.rested)), 10), 2000)
        self.busy = self._timed(count)[count // 2 :]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(IN_GRAPH):
                    self._call()
        except RuntimeError:
            # What waits for the device cannot be captured.
            torch.cuda.synchronize()
            return
        replays = Times(graph.replay, torch.device("cuda"))
        self.graph = statistics.median(replays._timed(5)) / IN_GRAPH

    def _timed(self, count: int) -> list[float]:
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
        for begin, end in zip(events[::2], events[1::2], strict=True):
            begin.record()
            self._call()
            end.record()
        torch.cuda.synchronize()
        pairs = zip(events[::2], events[1::2], strict=True)
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def medians(self) -> dict[str, float | None]:
        return {
            "rested": statistics.median(self.rested),
            "busy": statistics.median(self.busy) if self.busy else None,
            "graph": self.graph,
        }


def measure(
    contenders: Contenders, device: torch.device, rounds: int
) -> tuple[dict[str, Times], dict[str, str]]:
    """Every contender's times, and the errors of those that failed."""
    times: dict[str, Times] = {}
    errors: dict[str, str] = {}
    for name, call in contenders.items():
        try:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name] = Times(call, device)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for _ in range(rounds):
        for one in times.values():
            one.rest()
    for one in times.values():
        one.work()
    return times, errors


def kernels_of(name: str, contenders: Contenders, device: torch.device) -> list[list[str]]:
    """Microseconds and launches of every kernel in one call of hesskern's, the longest first."""
    call = contenders["hesskern"]
    call()
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else None
    with torch.profiler.profile(activities=[kind or torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(CALLS):
            call()
        if kind:
            torch.cuda.synchronize()
    found = [
        (e.self_device_time_total if kind else e.self_cpu_time_total, e.count, e.key)
        for e in seen.key_averages()
    ]
    return [
        [name, key[:120].replace("|", "/"), f"{time / CALLS:.1f}", f"{count / CALLS:g}"]
        for time, count, key in sorted(found, reverse=True)
        if time > 0
    ]


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.3f}"


def rows_of(name: str, times: dict[str, Times], errors: dict[str, str]) -> list[list[str]]:
    """Rows of the table for one problem."""
    medians = {key: one.medians() for key, one in times.items()}
    rows = []
    for key, median in medians.items():
        ours = medians["hesskern"]["rested"] if "hesskern" in medians else None
        over = f"{median['rested'] / ours:.2f}x" if ours and median["rested"] else "–"
        shown = [_milliseconds(median[kind]) for kind in ("rested", "busy", "graph")]
        rows.append([name, key, *shown, over])
    return rows + [[name, key, error] for key, error in errors.items()]


def main() -> None:
    parser = parser_of(__doc__, rounds=2)
    parser.add_argument("--kernels", action="store_true", help="shows what runs in the calls")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    headings = ["problem", "contender", "rested, ms", "busy, ms", "graph, ms", "over"]
    table = Table(arguments, "gpu", headings)
    kernels = Table(arguments, "gpu_kernels", ["problem", "kernel", "us", "launches"])
    for name, contenders in Problems(device, arguments.part):
        times, errors = measure(contenders, device, arguments.rounds)
        result = {
            "problem": name,
            "rested": {key: one.rested for key, one in times.items()},
            "medians": {key: one.medians() for key, one in times.items()},
            "errors": errors,
        }
        table.add(result, rows_of(name, times, errors))
        if arguments.kernels and "hesskern" in times:
            rows = kernels_of(name, contenders, device)
            kernels.add({"problem": name, "kernels": rows}, rows)


if __name__ == "__main__":
    main()
