"""Small random networks and data that several tests use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CE = nn.CrossEntropyLoss()


def sample_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """``CE`` of one sample, in torch's functional form."""
    return F.cross_entropy(outputs, target)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def classes(*shape: int, c: int, seed: int = 0) -> Tensor:
    return torch.randint(0, c, shape, generator=generator(seed + 1000))


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with random parameters, biases and running statistics."""
    source = generator(seed)
    model = model.double()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
        if "running_var" in name:
            values = values.square() + 0.5
        elif tensor.dim() > 1:
            values = values * (1.4 / tensor[0].numel() ** 0.5)
        else:
            values = 0.3 * values + (1.0 if name.endswith("weight") else 0.0)
        tensor.data.copy_(values)
    return model


class Between(nn.Module):
    """``b(op(a(x)))`` with Linear layers a [hidden, d] and b [c, hidden]."""

    def __init__(
        self, op: Callable[[Tensor], Tensor], d: int = 4, hidden: int = 6, c: int = 3
    ) -> None:
        super().__init__()
        self.a = nn.Linear(d, hidden)
        self.b = nn.Linear(hidden, c)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x)))


class Residual(nn.Module):
    """Two residual blocks, one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.inner = nn.Linear(5, 5)
        self.project = nn.Linear(5, 3)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.relu(self.inner(x))
        return self.project(x) + self.last(F.relu(x - 0.2))


class ResidualConv(nn.Module):
    """A convolutional residual block with batch norm and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(x + self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class TwoInputs(nn.Module):
    """Takes two tensors, by position or by name, and returns an object with ``.logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(3, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, first: Tensor, second: Tensor) -> Any:
        return SimpleNamespace(
            logits=self.out(F.relu(self.left(first)) + F.relu(self.right(second)))
        )


class Attention(nn.Module):
    """Softmax attention written out, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 3)
        self.k = nn.Linear(4, 3)
        self.v = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 3**0.5
        return (scores.softmax(-1) @ self.v(x)).mean(1)


class Twice(nn.Module):
    """One layer used twice in a forward pass."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self.shared(self.between(self.shared(x)))))


class SharedOverPositions(nn.Module):
    """One convolution used on two images of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2)
        self.out = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        small = self.conv(x[:, :, ::2, ::2])
        large = self.conv(x)
        return self.out(F.relu(small).mean((2, 3)) + F.relu(large).mean((2, 3)))


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.second(F.relu(self.first(x)))))


class TiedDecoder(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed, in a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 5)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(F.relu(self.encode(x)), self.encode.weight.T)))


class Shaped(nn.Module):
    """A two-layer network with outputs [N, *shape]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, math.prod(shape))
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))).reshape(len(x), *self.shape)


class Routed(nn.Module):
    """One of two experts per batch, by the sign of the first entry; ``unused`` never runs.

    Args:
        beside: a layer ``dead`` more, whose outputs go nowhere.
    """

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.positive = nn.Linear(4, 3)
        self.negative = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)
        self.dead = nn.Linear(4, 3) if beside else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        if self.dead is not None:
            self.dead(h)
        return self.positive(h) if x[0, 0] > 0 else self.negative(h)


def routed_data() -> list[tuple[Tensor, Tensor]]:
    """Batches for ``Routed`` through negative, positive, negative."""
    data = []
    for i, sign in enumerate((-1.0, 1.0, -1.0)):
        x = randn(3, 4, seed=i)
        x[0, 0] = sign * x[0, 0].abs()
        data.append((x, classes(3, c=3, seed=i)))
    return data


@dataclass(frozen=True)
class Case:
    """A network with data for it.

    Attributes:
        build: makes the module; ``seeded`` fills it.
        shape: of one sample's input; a tuple of shapes for several arguments.
        exact: layers whose block is the Hessian; the others have the Gauss-Newton block.
        inexact: those others.
    """

    build: Callable[[], nn.Module]
    shape: Any
    exact: tuple[str, ...]
    inexact: tuple[str, ...] = ()

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return seeded(self.build()).to(dtype)

    def inputs(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
        if isinstance(self.shape, dict):
            return {
                key: randn(n, *shape, seed=seed + i, dtype=dtype)
                for i, (key, shape) in enumerate(self.shape.items())
            }
        if isinstance(self.shape[0], tuple):
            return tuple(
                randn(n, *shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(self.shape)
            )
        return randn(n, *self.shape, seed=seed, dtype=dtype)

    def data(self, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Tensor]]:
        """Two batches, the second a smaller one, with three classes."""
        return [
            (self.inputs(4, 1, dtype), classes(4, c=3, seed=1)),
            (self.inputs(3, 20, dtype), classes(3, c=3, seed=2)),
        ]

    @property
    def layers(self) -> tuple[str, ...]:
        return self.exact + self.inexact


def _mlp(*activations: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        parts: list[nn.Module] = []
        sizes = [4, 6, 5, 3]
        for i in range(3):
            parts.append(nn.Linear(sizes[i], sizes[i + 1], bias=i != 1))
            if i < 2:
                parts.append(activations[i % len(activations)])
        return nn.Sequential(*parts)

    return build


def _conv(*parts: nn.Module, features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*parts, nn.Flatten(), nn.Linear(features, 3))


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(4, 3), (4,), ("",)),
    "relu": Case(_mlp(nn.ReLU()), (4,), ("0", "2", "4")),
    "in-place relu": Case(_mlp(nn.ReLU(inplace=True)), (4,), ("0", "2", "4")),
    "leaky and hardtanh": Case(_mlp(nn.LeakyReLU(0.2), nn.Hardtanh()), (4,), ("0", "2", "4")),
    "prelu and relu6": Case(_mlp(nn.PReLU(), nn.ReLU6()), (4,), ("0", "2", "4")),
    "batch norm": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)
        ),
        (4,),
        ("0", "4"),
    ),
    "residual": Case(Residual, (4,), ("stem", "inner", "project", "last")),
    "conv stride": Case(
        _conv(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
            nn.ReLU(),
            nn.Conv2d(3, 2, 2, bias=False),
            nn.ReLU(True),
            features=2 * 2 * 3,
        ),
        (2, 5, 5),
        ("0", "2", "5"),
    ),
    "conv dilation": Case(
        _conv(nn.Conv2d(2, 2, 2, dilation=(2, 1), padding=1), nn.ReLU(), features=2 * 5 * 6),
        (2, 5, 5),
        ("0", "3"),
    ),
    "conv groups": Case(
        _conv(
            nn.Conv2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 2, groups=6), features=6 * 4
        ),
        (4, 4, 4),
        ("0", "2", "4"),
    ),
    "conv same": Case(
        _conv(nn.Conv2d(2, 2, (2, 3), padding="same"), nn.ReLU(), features=2 * 12),
        (2, 3, 4),
        ("0", "3"),
    ),
    "conv valid": Case(
        _conv(nn.Conv2d(2, 2, 2, padding="valid"), nn.ReLU(), features=2 * 6),
        (2, 3, 4),
        ("0", "3"),
    ),
    "conv reflect": Case(
        _conv(
            nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="reflect"), nn.ReLU(), features=2 * 20
        ),
        (2, 4, 3),
        ("0", "3"),
    ),
    "conv circular": Case(
        _conv(
            nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"), nn.ReLU(), features=2 * 12
        ),
        (2, 4, 3),
        ("0", "3"),
    ),
    "conv replicate groups": Case(
        _conv(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate", groups=2),
            nn.ReLU(),
            features=4 * 12,
        ),
        (2, 4, 3),
        ("0", "3"),
    ),
    "conv1d": Case(
        _conv(
            nn.Conv1d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv1d(4, 2, 2, dilation=2, groups=2),
            nn.ReLU(inplace=True),
            features=2 * 2,
        ),
        (2, 7),
        ("0", "2", "5"),
    ),
    "conv 1x1": Case(_conv(nn.Conv2d(3, 2, 1), nn.ReLU(), features=2 * 6), (3, 2, 3), ("0", "3")),
    "pooling": Case(
        _conv(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2),
            nn.AvgPool2d(2, stride=1),
            nn.AdaptiveMaxPool2d((1, 2)),
            nn.AdaptiveAvgPool2d(1),
            features=4,
        ),
        (2, 6, 6),
        ("0", "3", "8"),
    ),
    "residual conv": Case(ResidualConv, (2, 3, 4), ("conv1", "conv2", "fc")),
    "sequence": Case(
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.Flatten(), nn.Linear(10, 3)
        ),
        (5, 3),
        ("0", "2", "4"),
    ),
    "sequence of sequences": Case(
        lambda: nn.Sequential(
            nn.Linear(3, 2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(12, 3, bias=False)
        ),
        (3, 2, 3),
        ("0", "3"),
    ),
    "tuple": Case(TwoInputs, ((4,), (3,)), ("left", "right", "out")),
    "dict": Case(TwoInputs, {"second": (3,), "first": (4,)}, ("left", "right", "out")),
    "tanh": Case(_mlp(nn.Tanh()), (4,), ("4",), ("0", "2")),
    "gelu then relu": Case(_mlp(nn.GELU(), nn.ReLU()), (4,), ("2", "4"), ("0",)),
    "silu": Case(_mlp(nn.SiLU(inplace=True)), (4,), ("4",), ("0", "2")),
    "softplus": Case(_mlp(nn.Softplus(), nn.ELU()), (4,), ("4",), ("0", "2")),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
        (4,),
        ("3",),
        ("0",),
    ),
    "instance norm": Case(
        _conv(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3), nn.ReLU(), features=3 * 6),
        (2, 3, 4),
        ("4",),
        ("0",),
    ),
    "attention": Case(Attention, (5, 4), ("v",), ("q", "k")),
    "twice": Case(Twice, (4,), ("out",), ("shared",)),
    "shared convolution": Case(SharedOverPositions, (2, 4, 4), ("out", "conv")),
    "tied": Case(Tied, (4,), ("out",), ("first", "second")),
}


def small_network(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network whose layer "0" is of this kind, and one batch.

    "linear"; "positions": two of them, Linear; "rows": a convolution that has more positions than
    inputs, and smaller rows than both; "columns": one with fewer positions; "groups": grouped.
    """
    if kind == "linear":
        layers, x = [nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)], randn(20, 5)
    elif kind == "positions":
        layers, x = [nn.Linear(5, 6), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)], randn(9, 2, 5)
    elif kind == "rows":
        layers = [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)]
        x = randn(9, 1, 4, 4)
    elif kind == "columns":
        layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
        x = randn(7, 2, 4, 4)
    else:
        layers = [nn.Conv2d(4, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
        x = randn(9, 4, 3, 3)
    return seeded(nn.Sequential(*layers)), [(x, classes(len(x), c=3))]


def tanh_problem(
    activation: type[nn.Module] = nn.Tanh,
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], nn.Module]:
    """A network whose first layer has a functional term, one batch and a loss."""
    model = seeded(nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)))
    return model, [(randn(15, 4), classes(15, c=3))], nn.CrossEntropyLoss()


class Small(nn.Module):
    """A model on a device with room for so many samples at a time."""

    def __init__(self, inner: nn.Module, room: int) -> None:
        super().__init__()
        self.inner, self.room = inner, room

    def forward(self, x: Tensor) -> Any:
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return self.inner(x)
