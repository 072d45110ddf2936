"""Steps and time to a training loss: hk.optim.KFAC before SGD; SGD; Adam; all tuned.

    HESSKERN_DATA=DIR python benchmarks/kfac.py [--problem NAME] [--optimizer NAME] [--json FILE]

Two problems on MNIST: an autoencoder as that of Martens & Grosse 2015 (section 13), narrower by
default (--full for theirs), and LeNet5. Every optimizer has a grid; the setting that reaches the
last target in the fewest steps with seed 0 runs with all seeds. Steps are counted, at every tenth.
Time is the processor's, of one thread, as a multiple of one loss and gradient in the same run, so
that other work on the machine does not show; looking at the loss in between is not counted.

    python benchmarks/kfac.py --step

measures one step of KFAC on LeNet5 alone, in gradients, by wall time and with --threads (2).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesskern as hk
from hesskern.zoo.data import load
from hesskern.zoo.models import lenet5

EVERY = 10
LOOKED_AT = 2000


def autoencoder(widths: list[int]) -> nn.Module:
    """Sigmoid units, but for the linear code and the logits."""
    sizes = [784, *widths, *reversed(widths[:-1]), 784]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (d, m) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(d, m))
        if i not in (len(widths) - 1, len(sizes) - 2):
            layers.append(nn.Sigmoid())
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            # Martens 2010: every unit sees a few others at the beginning, at full strength.
            for row in module.weight.data:
                row[torch.randperm(len(row))[:15]] = torch.randn(min(15, len(row)))
    return model


def reconstruction(outputs: Tensor, images: Tensor) -> Tensor:
    """Cross-entropy of all pixels of an image, mean over images."""
    total = F.binary_cross_entropy_with_logits(outputs, images, reduction="sum")
    return total / len(images)


@dataclass(frozen=True)
class Problem:
    """A network, its loss and what every optimizer is tried with.

    Attributes:
        build: the network, by torch's global seed.
        loss: of outputs and targets.
        curvature: the same as KFAC takes it.
        targets: losses that are to be reached, the last of which is tuned for.
        steps: at most.
        grids: by optimizer, values by setting.
        reconstructs: whether the images are the targets.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    curvature: nn.Module
    targets: tuple[float, ...]
    steps: int
    grids: dict[str, dict[str, tuple[float, ...]]]
    reconstructs: bool
    batch: int


def trainings(full: bool) -> dict[str, Problem]:
    widths = [1000, 500, 250, 30] if full else [200, 100, 50, 20]
    return {
        "autoencoder": Problem(
            lambda: autoencoder(widths),
            reconstruction,
            nn.BCEWithLogitsLoss(reduction="sum"),
            (140.0, 120.0),
            1000,
            {
                "KFAC + SGD": {
                    "lr": (0.3, 1.0),
                    "momentum": (0.9,),
                    "damping": (0.3, 0.1, 0.03),
                    "kl_clip": (1.0,),
                },
                "Adam": {"lr": (3e-3, 1e-2, 1e-3)},
                "SGD": {"lr": (0.01, 0.03, 0.003), "momentum": (0.98, 0.9)},
            },
            True,
            512,
        ),
        "lenet5": Problem(
            lambda: lenet5((1, 28, 28)),
            F.cross_entropy,
            nn.CrossEntropyLoss(),
            (0.2, 0.1),
            600,
            {
                "KFAC + SGD": {
                    "lr": (0.1, 0.03),
                    "momentum": (0.9,),
                    "damping": (0.1, 0.01),
                    "kl_clip": (1e-2, 1e-3),
                },
                "Adam": {"lr": (3e-3, 1e-2, 1e-3)},
                "SGD": {"lr": (0.1, 0.03, 0.3, 0.01), "momentum": (0.9, 0.98)},
            },
            False,
            128,
        ),
    }


@dataclass
class Run:
    """What training gave.

    Attributes:
        reached: per target, steps; None where it was not.
        worth: the same in gradients' worth of time.
        losses: at every look.
        gradient: median seconds of one loss and gradient.
        step: mean of all a step takes, in gradients.
    """

    reached: list[int | None]
    worth: list[float | None]
    losses: list[float]
    gradient: float
    step: float


def batches(
    images: Tensor, labels: Tensor, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=source)
        for index in order[: len(order) // size * size].reshape(-1, size):
            yield images[index], labels[index]


def train(
    problem: Problem,
    name: str,
    setting: dict[str, float],
    images: Tensor,
    labels: Tensor,
    seed: int,
    limit: int,
) -> Run:
    torch.manual_seed(seed)
    model = problem.build()
    kfac = None
    if name == "Adam":
        optimizer: Any = torch.optim.Adam(model.parameters(), **setting)
    else:
        own = {key: value for key, value in setting.items() if key in ("lr", "momentum")}
        optimizer = torch.optim.SGD(model.parameters(), **own)
    if name == "KFAC + SGD":
        rest = {key: value for key, value in setting.items() if key not in own}
        kfac = hk.optim.KFAC(model, optimizer, problem.curvature, seed=seed, **rest)
    shown = images[:LOOKED_AT]
    wanted = shown.flatten(1) if problem.reconstructs else labels[:LOOKED_AT]
    reached: list[int | None] = [None] * len(problem.targets)
    spent_at: list[float | None] = [None] * len(problem.targets)
    losses: list[float] = []
    gradients: list[float] = []
    spent = 0.0
    for step, (x, y) in enumerate(batches(images, labels, problem.batch, seed)):
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(float(problem.loss(model(shown), wanted)))
            for i, target in enumerate(problem.targets):
                if reached[i] is None and losses[-1] <= target:
                    reached[i], spent_at[i] = step, spent
            lost = not losses[-1] < 3 * losses[0]
            if reached[-1] is not None or step >= limit or lost:
                break
        targets = x.flatten(1) if problem.reconstructs else y
        begin = time.process_time()
        optimizer.zero_grad()
        problem.loss(model(x), targets).backward()
        middle = time.process_time()
        if kfac is not None:
            kfac.step(x, targets)
        optimizer.step()
        end = time.process_time()
        gradients.append(middle - begin)
        spent += end - begin
    gradient = statistics.median(gradients) if gradients else math.nan
    worth = [None if seconds is None else seconds / gradient for seconds in spent_at]
    return Run(reached, worth, losses, gradient, spent / max(1, len(gradients)) / gradient)


def tuned(
    problem: Problem, name: str, images: Tensor, labels: Tensor
) -> tuple[dict[str, float], Run | None]:
    """The setting of the grid that reaches the last target first, with seed 0."""
    best: Run | None = None
    chosen: dict[str, float] = {}
    limit, lowest = problem.steps, math.inf
    grid = problem.grids[name]
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        # Whoever is not faster than the fastest so far need not go on.
        run = train(problem, name, setting, images, labels, 0, limit)
        said = run.reached[-1] if run.reached[-1] is not None else f"not in {limit}"
        print(f"  {name} {setting}: {said} steps, loss {run.losses[-1]:.4g}", flush=True)
        if run.reached[-1] is not None and (best is None or run.reached[-1] < limit):
            best, chosen, limit = run, setting, run.reached[-1]
        elif best is None and min(run.losses) < lowest:
            chosen, lowest = setting, min(run.losses)
    return chosen, best


def spread(values: list[Any], digits: int = 0) -> str:
    """Median of the seeds, and the range."""
    if any(value is None for value in values):
        return f"reached by {sum(v is not None for v in values)} of {len(values)}"
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def table(name: str, problem: Problem, found: dict[str, tuple[dict[str, float], list[Run]]]) -> str:
    heads = [f"to {target:g}: steps | gradients" for target in problem.targets]
    lines = [
        f"| {name} | setting | {' | '.join(heads)} | one step, in gradients |",
        "|---|---|" + "---|---|" * len(problem.targets) + "---|",
    ]
    for optimizer, (setting, runs) in found.items():
        shown = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        cells = []
        for i in range(len(problem.targets)):
            cells.append(spread([run.reached[i] for run in runs]))
            cells.append(spread([run.worth[i] for run in runs]))
        per_step = spread([run.step for run in runs], 2)
        lines.append(f"| {optimizer} | {shown} | {' | '.join(cells)} | {per_step} |")
    return "\n".join(lines)


def one_step(threads: int, rounds: int = 60) -> str:
    """A step of KFAC on LeNet5, 128 images, inverses every 20, in gradients of the same round."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = lenet5((1, 28, 28))
    x, y = torch.rand(128, 1, 28, 28) * 2 - 1, torch.randint(0, 10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    kfac = hk.optim.KFAC(model, optimizer, nn.CrossEntropyLoss())

    def gradient() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def step() -> None:
        gradient()
        kfac.step(x, y)
        optimizer.step()

    def seconds(what: Callable[[], None]) -> float:
        begin = time.perf_counter()
        what()
        return time.perf_counter() - begin

    for _ in range(4):
        step()
    pairs = [(seconds(gradient), seconds(step)) for _ in range(rounds)]
    plain = statistics.median(one for one, _ in pairs)
    # The mean of every 20 holds one computation of the inverses.
    ratios = [
        statistics.mean(two for _, two in pairs[i : i + 20])
        / statistics.mean(one for one, _ in pairs[i : i + 20])
        for i in range(0, rounds, 20)
    ]
    return (
        f"gradient {plain * 1e3:.2f} ms, step {spread(ratios, 2)} gradients, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", action="append", choices=["autoencoder", "lenet5"])
    parser.add_argument("--optimizer", action="append", choices=["KFAC + SGD", "Adam", "SGD"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=20_000, help="training images used")
    parser.add_argument("--steps", type=int, help="at most, instead of the problem's own")
    parser.add_argument("--full", action="store_true", help="the published autoencoder")
    parser.add_argument("--root", type=Path, help="folder of MNIST; default $HESSKERN_DATA")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", action="store_true", help="one step on LeNet5, in gradients")
    parser.add_argument("--threads", type=int, default=2, help="of --step")
    given = parser.parse_args()
    if given.step:
        print(one_step(given.threads))
        return
    torch.set_num_threads(1)
    data = load("mnist", given.root, limit=given.samples)
    record: dict[str, Any] = {}
    for name, problem in trainings(given.full).items():
        if given.problem and name not in given.problem:
            continue
        if given.steps:
            problem = Problem(**{**vars(problem), "steps": given.steps})
        found: dict[str, tuple[dict[str, float], list[Run]]] = {}
        # Targets of the autoencoder are brightnesses from 0 to 1.
        images = (data.inputs + 1) / 2 if problem.reconstructs else data.inputs
        labels = data.targets
        print(name, flush=True)
        for optimizer in problem.grids:
            if given.optimizer and optimizer not in given.optimizer:
                continue
            setting, first = tuned(problem, optimizer, images, labels)
            runs = [] if first is None else [first]
            for seed in range(len(runs), given.seeds):
                runs.append(train(problem, optimizer, setting, images, labels, seed, problem.steps))
            found[optimizer] = setting, runs
            print(table(name, problem, found), flush=True)
        record[name] = {
            optimizer: {"setting": setting, "runs": [vars(run) for run in runs]}
            for optimizer, (setting, runs) in found.items()
        }
        if given.json:
            given.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
