"""What ``hesskern influence`` computes: scores, and one plain dictionary of numbers about them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.apps.analyze.analysis import plain, versions
from hesskern.apps.processes import ONE, Processes
from hesskern.apps.resume import NOWHERE, Resume
from hesskern.attribution.influence import influence
from hesskern.attribution.result import Influence
from hesskern.choices import check_counts
from hesskern.devices import usable_device
from hesskern.factors.compute_ekfac import ekfac
from hesskern.progress import Progress
from hesskern.zoo import data as datasets
from hesskern.zoo import models, training

__all__ = ["Settings", "Study", "study"]

FORMAT = "hesskern.influence/1"
# Even: zero is an edge.
_BINS = 60
# Points of the curve of concentration.
_POINTS = 60


@dataclass(frozen=True)
class Settings:
    """What to look at; the fields are the options of ``hesskern influence``.

    Attributes:
        data, root, limit: see :func:`hesskern.zoo.data.load`; ``limit`` is of the training split.
        model: see :func:`hesskern.zoo.models.build`.
        checkpoint: file to load instead of training.
        layers: names or patterns of the layers to go through; None for all.
        queries: number of queries: the test samples with the largest losses.
        query: indices of test samples, instead.
        shown: samples of either kind shown for a query.
        damping: see :func:`hesskern.influence`; None for "mean".
        seed, recipe, epochs: of the training.
        batch_size: samples per batch of the curvature passes.
    """

    data: str = "digits"
    root: Path | None = None
    limit: int | None = None
    model: str = "f64x2"
    checkpoint: Path | None = None
    layers: tuple[str, ...] | None = None
    queries: int = 8
    query: tuple[int, ...] = ()
    shown: int = 6
    damping: float | None = None
    device: str = "cpu"
    seed: int = 0
    recipe: str = "quick"
    epochs: int | None = None
    batch_size: int = 512


@dataclass(frozen=True)
class Study:
    """The numbers (ready for JSON), and what they were made of.

    Attributes:
        result: of everything that the page shows but the pictures.
        scores: of all training samples.
        images: pixels in [0, 1] [H, W] or [H, W, 3] of queries and samples that are shown, by
            "test" or "train" and index; empty where the inputs are no images.
        model: trained or loaded.
    """

    result: dict[str, Any]
    scores: Influence
    images: dict[tuple[str, int], Tensor]
    model: nn.Module
    trained: bool = field(default=True)


def study(
    settings: Settings,
    progress: Progress,
    command: str | None = None,
    trained: Callable[[nn.Module], None] | None = None,
    processes: Processes = ONE,
    resume: Resume = NOWHERE,
) -> Study:
    """Trains or loads the model, makes the scores and what the page says of them.

    Args:
        settings: what to look at.
        progress: told of every step.
        command: the command line, for the page.
        trained: called with the model once it is trained, so that its weights can be kept should
            anything fail later.
        processes: share the training samples; the first trains.
        resume: where the state of training and passes is kept.

    Raises:
        ValueError: a setting is wrong; the message names it.
    """
    _check(settings)
    started = time.perf_counter()
    with processes.section("reading the data"):
        train = datasets.load(settings.data, settings.root, limit=settings.limit)
        test = datasets.load(settings.data, settings.root, train=False)
    _check_queries(settings, len(test))
    train = train.to(settings.device, torch.float32)
    test = test.to(settings.device, torch.float32)
    model = models.build(settings.model, train.input_shape, train.classes, settings.seed)
    model = model.to(settings.device)
    history = None
    if settings.checkpoint is not None:
        load = partial(models.load_checkpoint, model, settings.checkpoint)
        processes.weights(model, f"loading {settings.checkpoint}", load)
    else:
        recipe = training.recipe_for(settings.recipe, settings.data)
        if settings.epochs is not None:
            recipe = replace(recipe, epochs=settings.epochs)
        fit = partial(training.train, model, train, recipe, settings.seed, progress=progress)
        fit = partial(fit, checkpoint=resume.file("training"))
        history = processes.weights(model, "training", fit)
        if trained is not None:
            trained(model)
    fitted = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        E = ekfac(
            model,
            processes.batches(train, settings.batch_size),
            nn.CrossEntropyLoss(),
            settings.layers,
            bias="joint",
            progress=progress,
            checkpoint=resume.file("curvature"),
            group=processes.group,
        )
        curved = time.perf_counter()
        losses, guesses = _outcomes(model, test)
        chosen = list(settings.query)
        if not chosen:
            # Stable, so that equal losses come in the order of the data.
            order = losses.sort(descending=True, stable=True).indices
            chosen = order[: min(settings.queries, len(test))].tolist()
        index = torch.tensor(chosen, device=test.inputs.device)
        found = influence(
            E,
            model,
            [(test.inputs[index], test.targets[index])],
            processes.batches(train, settings.batch_size),
            nn.CrossEntropyLoss(),
            damping="mean" if settings.damping is None else settings.damping,
            per_layer=True,
            progress=progress,
            checkpoint=resume.file("scores"),
            group=processes.group,
        )
    assert isinstance(found.scores, dict)
    by_layer = {name: scores.cpu().double() for name, scores in found.scores.items()}
    total = torch.stack(list(by_layer.values())).sum(0)
    absolute = torch.stack([part.abs().sum() for part in by_layer.values()]).sum().clamp(min=1e-300)
    scores = replace(found, scores=total.float())
    _, train_guesses = _outcomes(model, train)
    entries = [
        _query(settings, total[i], (j, losses[j], guesses[j]), (train, train_guesses), test)
        for i, j in enumerate(chosen)
    ]
    measured = {
        name: dict(zip(("loss", "accuracy"), training.evaluate(model, split), strict=True))
        for name, split in (("train", train), ("test", test))
    }
    result = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": asdict(settings),
        "versions": versions(settings.device),
        "data": {
            "name": train.name,
            "source": train.source,
            "samples": len(train),
            "test_samples": len(test),
            "classes": train.classes,
        },
        "network": {
            "name": settings.model,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": history is not None,
            "skipped": dict(found.skipped),
            **measured,
        },
        "layers": {
            name: {
                "shape": list(E[name].layer_shape),
                "mean_eigenvalue": E[name].trace() / E[name].shape[0],
                "damping": found.damping[name],
                "share": float(part.abs().sum() / absolute),
            }
            for name, part in by_layer.items()
        },
        "queries": entries,
        "histogram": _histogram(total),
        "concentration": _concentration(total),
        "warnings": list(dict.fromkeys(str(w.message) for w in caught)),
        "times": {
            "training": fitted - started,
            "curvature": curved - fitted,
            "scores": time.perf_counter() - curved,
        },
        "seconds": time.perf_counter() - started,
    }
    images = _images(entries, train, test)
    return Study(plain(result), scores, images, model, history is not None)


def _check(settings: Settings) -> None:
    check_counts(settings, "queries", "shown", "batch_size")
    if settings.epochs is not None and settings.epochs < 0:
        raise ValueError(f"epochs must not be negative, got {settings.epochs}")
    if settings.damping is not None and not 0 <= settings.damping < math.inf:
        raise ValueError(f"damping must be non-negative and finite, got {settings.damping}")
    usable_device(settings.device)


def _check_queries(settings: Settings, count: int) -> None:
    for index in settings.query:
        if not 0 <= index < count:
            raise ValueError(f"query must be in [0, {count}), the test samples; got {index}")


@torch.no_grad()
def _outcomes(model: nn.Module, data: datasets.Dataset) -> tuple[Tensor, Tensor]:
    """[N] losses and predicted classes, on the CPU."""
    was_training = model.training
    model.eval()
    try:
        parts = [
            (nn.functional.cross_entropy(outputs, targets, reduction="none"), outputs.argmax(1))
            for inputs, targets in data.batches(1024)
            for outputs in [model(inputs)]
        ]
    finally:
        model.train(was_training)
    losses, guesses = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return losses, guesses


def _query(
    settings: Settings,
    scores: Tensor,
    query: tuple[int, Tensor, Tensor],
    train: tuple[datasets.Dataset, Tensor],
    test: datasets.Dataset,
) -> dict[str, Any]:
    index, loss, guess = query
    data, guesses = train
    order = scores.sort(descending=True, stable=True).indices
    count = min(settings.shown, len(scores))

    def entry(n: int) -> dict[str, Any]:
        return {
            "index": n,
            "class": int(data.targets[n]),
            "predicted": int(guesses[n]),
            "score": float(scores[n]),
        }

    target = int(test.targets[index])
    helpful = [entry(n) for n in order[:count].tolist() if scores[n] > 0]
    harmful = [entry(n) for n in order.flip(0)[:count].tolist() if scores[n] < 0]
    return {
        "index": index,
        "class": target,
        "predicted": int(guess),
        "loss": float(loss),
        "helpful": helpful,
        "harmful": harmful,
        "own_class": {
            "helpful": sum(e["class"] == target for e in helpful),
            "harmful": sum(e["class"] == target for e in harmful),
        },
    }


def _histogram(scores: Tensor) -> dict[str, Any]:
    """Counts of scores divided by their query's root mean square, all queries together.

    Scores of zero neither help nor harm, and are left out.
    """
    scaled = (scores / scores.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)).flatten()
    scaled = scaled[scaled != 0]
    most = float(scaled.abs().max().clamp(min=1e-3)) if len(scaled) else 1.0
    edges = torch.linspace(-most, most, _BINS + 1, dtype=torch.float64)
    # Rounding may have moved it, and small scores with it to the other side.
    edges[_BINS // 2] = 0
    counts = torch.histogram(scaled, edges).hist
    return {"edges": edges, "counts": counts.long()}


def _concentration(scores: Tensor) -> dict[str, Any]:
    """Share of the sum of absolute scores in the largest ones, mean over queries that have one.

    A query that the network is sure of beyond the digits of its numbers has zeros alone; they are
    counted as "without".
    """
    sizes = scores.abs().sort(dim=1, descending=True).values
    some = sizes[:, 0] > 0
    shares = (sizes.cumsum(1) / sizes.sum(1, keepdim=True).clamp(min=1e-300)).sum(0)
    shares = shares / some.sum().clamp(min=1)
    n = len(shares)
    counts = sorted({round(n ** (i / (_POINTS - 1))) for i in range(_POINTS)} | {1, n})
    return {
        "samples": counts,
        "share": [float(shares[k - 1]) for k in counts],
        "without": int((~some).sum()),
    }


def _images(
    entries: list[dict[str, Any]], train: datasets.Dataset, test: datasets.Dataset
) -> dict[tuple[str, int], Tensor]:
    wanted = {("test", entry["index"]) for entry in entries}
    for entry in entries:
        wanted |= {("train", e["index"]) for e in (*entry["helpful"], *entry["harmful"])}
    splits = {"train": train, "test": test}
    found = {}
    for split, index in sorted(wanted):
        image = _pixels(splits[split].inputs[index].cpu(), splits[split].name)
        if image is not None:
            found[split, index] = image
    return found


def _pixels(sample: Tensor, name: str) -> Tensor | None:
    """[H, W] or [H, W, 3] in [0, 1] of one input; None where it is no image."""
    if sample.dim() == 1:
        side = math.isqrt(len(sample))
        if side * side != len(sample):
            return None
        sample = sample.reshape(1, side, side)
    if sample.dim() != 3 or sample.shape[0] not in (1, 3):
        return None
    mean, deviation = (torch.tensor(values).reshape(-1, 1, 1) for values in datasets.MOMENTS[name])
    pixels = (sample * deviation + mean).clamp(0, 1)
    return pixels[0] if len(pixels) == 1 else pixels.movedim(0, 2)
