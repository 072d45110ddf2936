"""Networks and data that the suites run on."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hesskern.apps.bench.settings import Settings
from hesskern.progress import Progress
from hesskern.tensor_files import savable
from hesskern.zoo.data import Dataset, load
from hesskern.zoo.models import build, load_checkpoint
from hesskern.zoo.training import Recipe, evaluate, train

__all__ = ["Case", "cnn", "double", "f200", "lenet5", "mlp", "resnet18", "train_f200"]

_MNIST_SAMPLES = 60_000
# Published networks are trained for 1000 epochs without momentum; this gets as far in a minute.
_RECIPE = Recipe(epochs=30, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """A network and one batch.

    Attributes:
        title: for people, sizes included.
        description: what the weights and the data are.
        model: maps inputs to logits; in eval mode.
        inputs: [N, *shape] float32.
        targets: [N] classes.
    """

    title: str
    description: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def batch(self) -> list[tuple[Tensor, Tensor]]:
        """All samples as the one batch of a data loader."""
        return [(self.inputs, self.targets)]

    @property
    def samples(self) -> int:
        return len(self.inputs)


def double(case: Case) -> Case:
    """A copy in float64."""
    model = copy.deepcopy(case.model).double()
    return replace(case, model=model, inputs=case.inputs.double())


def _random_case(
    title: str, model: nn.Module, shape: tuple[int, ...], samples: int, description: str
) -> Case:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, *shape, generator=generator)
    targets = torch.randint(10, (samples,), generator=generator)
    size = " x ".join(map(str, shape))
    return Case(
        f"{title}, {samples:,} samples of {size}", description, model.eval(), inputs, targets
    )


_INITIAL = "Xavier's initial weights, standard normal inputs"


def mlp(settings: Settings) -> Case:
    """784-200-200-10 on 8,192 samples."""
    model = build("f200x2", (784,), 10)
    return _random_case("MLP 784-200-200-10", model, (784,), _samples(settings, 8192), _INITIAL)


def lenet5(settings: Settings) -> Case:
    """LeNet5 on 2,048 images 3x32x32."""
    model = build("lenet5", (3, 32, 32), 10)
    return _random_case("LeNet5", model, (3, 32, 32), _samples(settings, 2048), _INITIAL)


def cnn(settings: Settings) -> Case:
    """3x3 convolutions 64-64-M-128-128-M-256-256-M and one linear layer, on 128 images 3x32x32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 0):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 10))
    return _random_case(
        "CNN 64-64-M-128-128-M-256-256-M",
        model,
        (3, 32, 32),
        _samples(settings, 128),
        "torch's initial weights, standard normal inputs",
    )


def resnet18(settings: Settings) -> Case:
    """ResNet18-W16 without batch norm on 256 images 3x32x32."""
    width = 4 if settings.quick else 16
    model = build(f"resnet18-w{width}", (3, 32, 32), 10)
    title = f"ResNet18-W{width}"
    return _random_case(title, model, (3, 32, 32), _samples(settings, 256), _INITIAL)


def _samples(settings: Settings, full: int) -> int:
    return max(full // 16, 8) if settings.quick else full


def f200(settings: Settings) -> Case:
    """F-200^2 with the weights at ``settings.checkpoint``, on MNIST or data of its shape."""
    if settings.checkpoint is None:
        raise ValueError("settings.checkpoint must be the state dict that train_f200 wrote")
    data = _mnist(settings)
    model = load_checkpoint(build("f200x2", data.input_shape, 10), settings.checkpoint).eval()
    loss, accuracy = evaluate(model, data)
    return Case(
        f"F-200^2 (784-200-200-10), {len(data):,} samples",
        f"{data.source}; trained {_RECIPE.epochs} epochs with momentum "
        f"(mean loss {loss:.3g}, accuracy {accuracy:.1%})",
        model,
        data.inputs,
        data.targets,
    )


def train_f200(settings: Settings, path: Path, progress: Progress) -> None:
    """Trains F-200^2; writes its state dict to ``path``."""
    data = _mnist(settings)
    model = build("f200x2", data.input_shape, 10)
    train(model, data, _RECIPE, progress=progress, description="training F-200^2")
    save_file(savable(model.state_dict()), path)


def _mnist(settings: Settings) -> Dataset:
    """MNIST's training images; synthetic data of the same shape, called so, where there is none.

    Raises:
        ValueError: ``settings.root`` is given but does not hold them.
    """
    limit = 2048 if settings.quick else None
    try:
        return load("mnist", settings.root, limit=limit)
    except ValueError:
        if settings.root is not None:
            raise
    samples = limit or _MNIST_SAMPLES
    generator = torch.Generator().manual_seed(0)
    classes, rank = 10, 40
    # Clusters in a space of low dimension, so that training has something to find.
    centers = torch.randn(classes, rank, generator=generator)
    directions = torch.randn(rank, 784, generator=generator) / math.sqrt(rank)
    targets = torch.randint(classes, (samples,), generator=generator)
    hidden = centers[targets] + 0.7 * torch.randn(samples, rank, generator=generator)
    inputs = (hidden @ directions).reshape(samples, 1, 28, 28)
    return Dataset(
        "mnist", inputs, targets, classes, "SYNTHETIC data of MNIST's shape (MNIST was not found)"
    )
