"""Deterministic SGD, so that the command line has trained networks to look at."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesskern.files import check_writable, keep_if_possible
from hesskern.progress import Progress, reporter
from hesskern.text import counted
from hesskern.zoo.data import Dataset

__all__ = ["RECIPES", "History", "Recipe", "evaluate", "recipe_for", "train"]


@dataclass(frozen=True)
class Recipe:
    """SGD's settings; the loss is cross-entropy, the learning rate constant."""

    epochs: int
    learning_rate: float = 0.01
    batch_size: int = 128
    momentum: float = 0.0
    weight_decay: float = 0.0


RECIPES: Mapping[str, Recipe] = {
    # arXiv 2010.04261: the default and the alternative of its experiments.
    "paper": Recipe(epochs=1000),
    "paper-momentum": Recipe(epochs=1000, momentum=0.9, weight_decay=5e-4),
}
"""Published settings by name; ``"quick"`` (see :func:`recipe_for`) depends on the data set."""

_QUICK: Mapping[str, Recipe] = {
    "digits": Recipe(epochs=15, batch_size=64, momentum=0.9),
    "mnist": Recipe(epochs=10),
    "cifar10": Recipe(epochs=10, momentum=0.9),
}


def recipe_for(name: str, data: str) -> Recipe:
    """The recipe called ``name``: ``"quick"`` (seconds, minutes at most) or a published one.

    Raises:
        ValueError: there is no such recipe.
    """
    if name == "quick":
        return _QUICK[data]
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of quick, {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]


@dataclass
class History:
    """Mean training loss and accuracy of each epoch (measured while training), and the seconds."""

    seed: int
    recipe: Recipe
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    progress: bool | Progress = False,
    description: str = "training",
    *,
    checkpoint: Path | None = None,
    save_every: float = 20.0,
) -> History:
    """Trains ``model`` in place on cross-entropy; the same seed gives the same weights.

    With ``checkpoint`` an interrupted run goes on after its last saved epoch and ends at the very
    weights an uninterrupted one ends at; a finished one is loaded. The learning rate is constant,
    so more epochs than before continue where the fewer ended. What is saved is finite.

    Args:
        model: network [N, *input_shape] -> [N, classes], on the data's device.
        data: inputs [N, *input_shape], targets [N].
        recipe: SGD's settings.
        seed: seed of the order of samples (and of dropout).
        progress: see :func:`hesskern.progress.reporter`.
        description: what progress calls the work.
        checkpoint: file for weights, optimizer and random state; replaced as a whole.
        save_every: seconds between two savings at the end of an epoch; the last epoch is saved.

    Raises:
        ValueError: loss or weights are no longer finite (the learning rate is too high), or
            ``checkpoint`` belongs to other settings, data or network, has more epochs behind it, or
            its folder cannot be written.

    Warns:
        RuntimeWarning: the checkpoint could not be written later on, which ends nothing.
    """
    report = reporter(progress)
    if checkpoint is not None:
        check_writable(checkpoint.parent, "checkpoint: folder")
    history = History(seed, recipe)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    order = torch.Generator().manual_seed(seed)
    device = data.inputs.device
    per_epoch = -(-len(data) // recipe.batch_size)
    was_training = model.training
    started = saved = time.perf_counter()
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            state = None
            if checkpoint is not None:
                fingerprint = _fingerprint(recipe, seed, data, model)
                state = _State(checkpoint, fingerprint, model, optimizer, order, history)
                state.restore()
                if len(history.loss) > recipe.epochs:
                    raise ValueError(
                        f"checkpoint {checkpoint} has {counted(len(history.loss), 'epoch')} behind "
                        f"it, more than the {recipe.epochs} asked for"
                    )
            before = history.seconds
            for epoch in range(len(history.loss), recipe.epochs):
                loss_sum = torch.zeros((), dtype=torch.float64, device=device)
                hits = torch.zeros((), dtype=torch.int64, device=device)
                permutation = torch.randperm(len(data), generator=order).to(device)
                for step, rows in enumerate(permutation.split(recipe.batch_size)):
                    inputs, targets = data.inputs[rows], data.targets[rows]
                    logits = model(inputs)
                    loss = nn.functional.cross_entropy(logits, targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    loss_sum += loss.detach() * len(rows)
                    hits += (logits.detach().argmax(1) == targets).sum()
                    report(description, epoch * per_epoch + step + 1, recipe.epochs * per_epoch)
                history.loss.append(float(loss_sum) / len(data))
                history.accuracy.append(int(hits) / len(data))
                # The last step's weights have not been in any loss yet.
                what = "loss" if not bool(torch.isfinite(loss_sum)) else "weights"
                if what == "loss" or not _finite(model):
                    raise ValueError(
                        f"training diverged in epoch {epoch + 1}: the {what} "
                        f"{'is' if what == 'loss' else 'are'} not finite with learning rate "
                        f"{recipe.learning_rate}"
                    )
                now = time.perf_counter()
                history.seconds = before + now - started
                if state and (epoch + 1 == recipe.epochs or now - saved >= save_every):
                    state.save()
                    saved = now
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    return history


def _finite(model: nn.Module) -> bool:
    """Whether parameters and buffers hold numbers alone."""
    tensors = (*model.parameters(), *model.buffers())
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def _fingerprint(recipe: Recipe, seed: int, data: Dataset, model: nn.Module) -> str:
    """What two runs must share so that one can go on where the other stopped."""
    settings = {key: value for key, value in asdict(recipe).items() if key != "epochs"}
    network = hashlib.sha256(repr(model).encode()).hexdigest()
    return json.dumps([settings, seed, data.name, len(data), data.digest(), network])


@dataclass(frozen=True)
class _State:
    """A run's state in a file, which also serves as a checkpoint of the weights."""

    path: Path
    fingerprint: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    history: History

    def save(self) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "loss": self.history.loss,
            "accuracy": self.history.accuracy,
            "seconds": self.history.seconds,
        }
        keep_if_possible(self.path, lambda temporary: torch.save(state, temporary))

    def restore(self) -> None:
        """Does nothing where there is no file yet."""
        if not self.path.is_file():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state["fingerprint"]
        except Exception as error:  # the reader raises types of its own for damaged files
            raise ValueError(f"checkpoint {self.path} cannot be read ({error})") from error
        if found != self.fingerprint:
            raise ValueError(
                f"checkpoint {self.path} was made with another network, settings or data: {found} "
                f"where {self.fingerprint} is expected"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint {self.path} does not fit the model: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        self.history.loss, self.history.accuracy = state["loss"], state["accuracy"]
        self.history.seconds = state["seconds"]


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, batch_size: int = 1024) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of ``model`` in eval mode over ``data``."""
    was_training = model.training
    model.eval()
    try:
        loss, hits = 0.0, 0
        for inputs, targets in data.batches(batch_size):
            logits = model(inputs)
            loss += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            hits += int((logits.argmax(1) == targets).sum())
        return loss / len(data), hits / len(data)
    finally:
        model.train(was_training)
