"""Whole calls on a GPU against autograd and curvlinops: what a user types, not single kernels.

    python benchmarks/gpu_calls.py --output FOLDER [--device cuda] [--part 1.0] [--only factors ...]

Writes gpu_calls.json and gpu_calls.md, anew after every problem. Times are those of a clock on the
wall around a call and the wait for its end, medians over rounds in which all contenders of a
problem take turns. "over" is a contender's time over hesskern's, "unit" the time in units of the
problem's own (one gradient, or one forward pass). Beside them one more call is watched, if it takes
less than a quarter of a second: peak memory above what was held before, kernel launches, and how
often the host waited. Convolutions use TF32 where torch's defaults say so; "difference" is that of
hesskern's factors to its own in float64, on few samples, with TF32 forbidden: rounding, and with
millions of ReLUs some that are zero in one of them alone.

MNIST is taken from $HESSKERN_DATA; without it random data of its shape stand in, as is said.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.sparse.linalg as sparse
import torch
import torch.nn.functional as F
from certify_step import BATCH, steps
from gpu_report import Table, parser_of
from torch import Tensor, nn

import hesskern as hk
from hesskern import ops
from hesskern.apps.bench import cases, ekfac_peers, kfac_step, language, peers, streams
from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.contenders import LOSS, Call, eager_product, relative_difference
from hesskern.apps.bench.settings import Settings
from hesskern.zoo.data import load
from hesskern.zoo.models import build

PAIRS, RESIDUAL, TOLERANCE = 20, 1e-4, 1e-4
FEW = 64
STEPS = 20
# Before every call that is timed: threads of other libraries go on looking for work for a while.
PAUSE = 0.1
# Seconds of a call that is watched; the profiler takes many times as long.
WATCHED = 0.25
_LAUNCHES = ("LaunchKernel", "GraphLaunch")
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


@dataclass
class Problem:
    """Contenders of one problem.

    Attributes:
        calls: by contender; hesskern's own begin with "hesskern".
        unit: the contender whose time is the unit.
        notes: by contender, what is known of it beside its times, asked after the calls.
    """

    name: str
    calls: dict[str, Call]
    unit: str | None = None
    notes: dict[str, Callable[[], str]] = field(default_factory=dict)


class Problems:
    """Problems on one device, their sizes times ``part``."""

    def __init__(self, device: torch.device, part: float) -> None:
        self.device, self._part = device, part

    def _size(self, n: int, least: int = 16) -> int:
        return max(int(n * self._part), least)

    def _case(self, title: str, model: nn.Module, shape: tuple[int, ...], n: int) -> Case:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(n, *shape, generator=generator)
        targets = torch.randint(10, (n,), generator=generator)
        model = model.to(self.device).eval()
        return Case(title, "", model, inputs.to(self.device), targets.to(self.device))

    def factors(self) -> Iterator[Problem]:
        """Kronecker factors of four networks, exact, from drawn targets, and empirical."""
        cnn = cases.cnn(Settings(quick=True)).model
        networks = (
            ("MLP 784-200-200-10", build("f200x2", (784,), 10), (784,), 8192),
            ("CNN 64-64-M-128-128-M-256-256-M", cnn, (3, 32, 32), 1024),
            ("ResNet18-W64", build("resnet18-w64", (3, 32, 32), 10), (3, 32, 32), 512),
            ("LeNet5", build("lenet5", (3, 32, 32), 10), (3, 32, 32), 4096),
        )
        for title, model, shape, full in networks:
            n = self._size(full)
            case = self._case(title, model, shape, n)
            for output in ("exact", "mc", "empirical"):
                ours = partial(hk.kronecker_factors, case.model, case.batch, LOSS, output=output)
                calls: dict[str, Call] = {"hesskern": ours, "gradient": _gradient(case)}
                if output != "empirical":
                    calls["curvlinops KFAC"] = _lazily(peers.curvlinops_factors, case, output)
                yield Problem(
                    f"{output} factors of {title}, {n:,} samples",
                    calls,
                    "gradient",
                    {"hesskern": partial(_difference, case)} if output == "exact" else {},
                )

    def ekfac(self) -> Iterator[Problem]:
        """EKFAC from drawn targets of a GPT-2 and two networks of images; influence scores."""
        settings = Settings(quick=self._part < 1)
        gpt = language.gpt2(settings)
        batches = [{k: t.to(self.device) for k, t in batch.items()} for batch in gpt.batches]
        gpt = replace(gpt, model=gpt.model.to(self.device), batches=batches)
        images = (
            ("ResNet18-W64", build("resnet18-w64", (3, 32, 32), 10), 512, 128),
            ("LeNet5", build("lenet5", (3, 32, 32), 10), 4096, 1024),
        )
        fits = [streams.text(gpt)]
        for title, model, full, batch in images:
            case = self._case(title, model, (3, 32, 32), self._size(full))
            fits.append(streams.images(case, self._size(batch)))
        for fit in fits:
            names = list(fit.names)
            given = (fit.model, fit.batches, fit.loss, names, "mc")
            yield Problem(
                f"EKFAC, drawn targets, {fit.title}",
                {
                    "hesskern": partial(hk.ekfac, *given),
                    "hooks and torch": partial(streams.plain_ekfac, fit, True),
                    "curvlinops EKFAC": _lazily(ekfac_peers.PEERS[0].prepare, fit, True),
                    "gradient": streams.gradient(fit).prepare(),
                },
                "gradient",
            )
        fit, asked = fits[0], language.queries(gpt, 8)
        asked = {k: t.to(self.device) for k, t in asked.items()}
        E = hk.ekfac(fit.model, fit.batches, fit.loss, list(fit.names))
        yield Problem(
            f"influence of all samples on 8 queries, EKFAC given, {fit.title}",
            {
                "hesskern": partial(hk.influence, E, fit.model, [asked], fit.batches, fit.loss),
                "gradient": streams.gradient(fit).prepare(),
            },
            "gradient",
        )

    def kfac(self) -> Iterator[Problem]:
        """Training steps of LeNet5 with K-FAC's preconditioned gradients."""
        case = self._case("LeNet5", build("lenet5", (3, 32, 32), 10), (3, 32, 32), self._size(128))
        yield Problem(
            f"{kfac_step.STEPS} steps of K-FAC with SGD, LeNet5, {case.samples} images",
            {name: kfac_step.repeated(case, make) for name, make in kfac_step.OWN.items()},
            "gradients",
        )

    def eigen(self) -> Iterator[Problem]:
        """Layer Hessians of F-200^2 and their leading eigenpairs, beside ARPACK."""
        case = self._trained()
        calls: dict[str, Call] = {
            "hesskern": partial(hk.layer_hessians, case.model, case.batch, LOSS),
            f"hesskern, tolerance={TOLERANCE:g}": partial(
                hk.layer_hessians, case.model, case.batch, LOSS, tolerance=TOLERANCE
            ),
            "gradient": _gradient(case),
        }
        yield Problem(f"layer_hessians, {case.title}", calls, unit="gradient")
        whole = hk.layer_hessians(case.model, case.batch, LOSS)
        pruned = hk.layer_hessians(case.model, case.batch, LOSS, tolerance=TOLERANCE)
        for layer, H in whole.items():
            found: dict[str, str] = {}
            yield Problem(
                f"top {PAIRS} of {layer}, residual {RESIDUAL:g}, {case.title}",
                {
                    "hesskern": partial(_noted, found, "hesskern", H),
                    "hesskern, pruned": partial(_noted, found, "pruned", pruned[layer]),
                    "ARPACK on double backward": partial(_arpack, found, case, layer, H),
                },
                notes={
                    "hesskern": partial(found.get, "hesskern", ""),
                    "hesskern, pruned": partial(found.get, "pruned", ""),
                    "ARPACK on double backward": partial(found.get, "arpack", ""),
                },
            )

    def _trained(self) -> Case:
        """F-200^2 after six epochs, on MNIST or random data of its shape."""
        n = self._size(60_000, 600)
        try:
            data = load("mnist", limit=n)
            inputs, targets, source = data.inputs.flatten(1), data.targets, "MNIST"
        except (ValueError, OSError):
            generator = torch.Generator().manual_seed(2)
            targets = torch.randint(10, (n,), generator=generator)
            centres = torch.randn(10, 784, generator=generator)
            inputs = centres[targets] + 2 * torch.randn(n, 784, generator=generator)
            source = "random data, no MNIST there"
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        model = build("f200x2", (784,), 10).to(self.device)
        sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        order = torch.Generator().manual_seed(0)
        for _ in range(6):
            for rows in torch.randperm(n, generator=order).to(self.device).split(512):
                sgd.zero_grad()
                LOSS(model(inputs[rows]), targets[rows]).backward()
                sgd.step()
        title = f"F-200^2, {n:,} samples ({source})"
        return Case(title, "", model.eval(), inputs, targets)

    def transformer(self) -> Iterator[Problem]:
        """A GPT-shaped network's forward pass with the covariances of all Linear inputs."""
        n, length = self._size(8, 1), self._size(512, 16)
        width, depth = (768, 12) if self._part == 1 else (64, 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _Decoder(8192 if self._part == 1 else 101, width, depth, 12, length)
        model = model.to(self.device).eval().bfloat16()
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(101, (n, length), generator=generator).to(self.device)

        @torch.no_grad()
        def forward() -> Tensor:
            return model(tokens)

        yield Problem(
            f"forward pass and all covariances, GPT shape {depth} x {width}, bfloat16, "
            f"{n * length:,} tokens",
            {
                "hesskern": partial(_with_covariances, model, forward, _ours),
                "torch.mm": partial(_with_covariances, model, forward, _mm),
                "forward pass": forward,
            },
            unit="forward pass",
        )

    def certificate(self) -> Iterator[Problem]:
        """Steps of a certificate's optimization beside as many of plain SGD: T-600, batch 500."""
        certify, sgd = steps("T-600", self._size(60_000, 1000), STEPS, self.device)
        yield Problem(
            f"{STEPS} steps of a certificate, T-600, batch {BATCH}",
            {"hesskern": certify, "SGD": sgd},
            unit="SGD",
        )


def _lazily(make: Callable[..., Call], *arguments: Any) -> Call:
    """What a package makes, when it is first called: it may not be installed."""
    made: list[Call] = []

    def call() -> Any:
        if not made:
            made.append(make(*arguments))
        return made[0]()

    return call


def _gradient(case: Case) -> Call:
    def call() -> None:
        case.model.zero_grad(set_to_none=True)
        LOSS(case.model(case.inputs), case.targets).backward()

    return call


def _difference(case: Case) -> str:
    """Of the factors on few samples to those in float64, without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        x, y = case.inputs[:FEW], case.targets[:FEW]
        found = hk.kronecker_factors(case.model, [(x, y)], LOSS)
        exact = hk.kronecker_factors(copy.deepcopy(case.model).double(), [(x.double(), y)], LOSS)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    worst = max(
        relative_difference(getattr(found[name], factor).double(), getattr(exact[name], factor))
        for name in found
        for factor in ("input_covariance", "output_hessian")
    )
    return f"difference {worst:.1e}"


def _noted(found: dict[str, str], name: str, H: hk.LayerHessian) -> hk.EigenResult:
    result = hk.eigsh(H, PAIRS, tol=RESIDUAL)
    found[name] = f"{result.matvecs} products, residual {float(result.residuals.max()):.1e}"
    return result


def _arpack(found: dict[str, str], case: Case, layer: str, H: hk.LayerHessian) -> None:
    """ARPACK with no more asked of it than of hesskern: residuals of RESIDUAL times λ_1."""
    size = H.shape[0]
    vector = torch.empty(size, device=H.device)
    product = eager_product(case, f"{layer}.weight", vector)
    known = hk.eigsh(H, PAIRS, tol=RESIDUAL).values if "tolerance" not in found else None
    if known is not None:
        found["tolerance"] = str(RESIDUAL * float(known[0] / known[-1]))
    count = 0

    def multiply(array: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        vector.copy_(torch.from_numpy(array.reshape(-1)))
        return product().cpu().numpy()

    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
    operator = sparse.LinearOperator((size, size), matvec=multiply, dtype=np.float32)
    sparse.eigsh(operator, PAIRS, which="LA", tol=float(found["tolerance"]), v0=start)
    found["arpack"] = f"{count} products"


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class _Decoder(nn.Module):
    """A decoder of GPT-2's shape."""

    def __init__(self, words: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        heads = heads if width % heads == 0 else 4
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        return self.head(self.blocks(x))


def _ours(total: Tensor, rows: Tensor) -> None:
    ops.input_covariance_(total, rows)


def _mm(total: Tensor, rows: Tensor) -> None:
    total += rows.T @ rows


def _with_covariances(
    model: nn.Module, forward: Call, add: Callable[[Tensor, Tensor], None]
) -> None:
    """A forward pass that adds every Linear's input rows to a float32 covariance."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            d = module.in_features
            total = torch.zeros(d, d, device=module.weight.device)

            def hook(_: nn.Module, args: Any, total: Tensor = total, d: int = d) -> None:
                add(total, args[0].reshape(-1, d))

            handles.append(module.register_forward_pre_hook(hook))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()


def timed(call: Call, device: torch.device) -> float:
    """Seconds of a call, the wait for its end included."""
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watched(call: Call, device: torch.device) -> dict[str, float]:
    """Peak MiB above what was held before, launches and waits of one call; empty on a CPU."""
    if device.type != "cuda":
        return {}
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    _wait(device)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        _wait(device)
    names = [event.name for event in profile.events()]
    launches = sum(any(part in name for part in _LAUNCHES) for name in names)
    # The profiler's end and our own wait are two of them.
    waits = sum(any(part in name for part in _WAITS) for name in names)
    return {"peak_MiB": peak, "launches": launches, "waits": max(waits - 1, 0)}


def measure(problem: Problem, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times and counts of every contender, and the errors of those that failed."""
    times: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, call in problem.calls.items():
        try:
            timed(call, device)
            times[name] = []
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for _ in range(rounds):
        for name in times:
            time.sleep(PAUSE if device.type == "cuda" else 0)
            times[name].append(timed(problem.calls[name], device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    counts = {
        name: watched(problem.calls[name], device) if median < WATCHED else {}
        for name, median in medians.items()
    }
    return {
        "problem": problem.name,
        "seconds": times,
        "medians": medians,
        "counts": counts,
        "notes": {name: note() for name, note in problem.notes.items() if name in times},
        "unit": problem.unit,
        "errors": errors,
    }


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table for one problem."""
    problem, medians, rows = result["problem"], result["medians"], []
    ours = medians.get("hesskern")
    unit = result["unit"]
    for name, seconds in medians.items():
        over = f"{seconds / ours:.2f}x" if ours and name != "hesskern" else ""
        units = f"{seconds / medians[unit]:.2f}" if unit in medians else ""
        counts = result["counts"][name]
        shown = [f"{counts[k]:,.0f}" if counts else "" for k in ("peak_MiB", "launches", "waits")]
        note = result["notes"].get(name, "")
        rows.append([problem, name, f"{seconds * 1e3:.2f}", over, units, *shown, note])
    return rows + [[problem, name, error] for name, error in result["errors"].items()]


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parts = ("factors", "ekfac", "kfac", "eigen", "transformer", "certificate")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    counts = ["peak, MiB", "launches", "waits"]
    headings = ["problem", "contender", "ms", "over", "unit", *counts, "note"]
    table = Table(arguments, "gpu_calls", headings)
    problems = Problems(device, arguments.part)
    for part in arguments.only:
        for problem in getattr(problems, part)():
            result = measure(problem, device, arguments.rounds)
            table.add(result, rows_of(result))


if __name__ == "__main__":
    main()
