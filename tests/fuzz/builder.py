"""Programs grown line by line: every line runs as it is written, so that shapes are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fuzz.program import Program
from fuzz.vocabulary import NAMES

__all__ = ["PRODUCTIONS", "Builder", "Linear", "Rejected", "Value", "production"]

T = TypeVar("T")


class Rejected(Exception):
    """A production that does not apply here."""


@dataclass(frozen=True)
class Value:
    """A variable of the program.

    Attributes:
        name: in the program.
        layout: what its axes mean: "v" [N, c]; "s" [N, T, c]; "f" [T, N, c]; "t" [N T, c];
            "1" [N, c, L]; "2" [N, c, H, W].
    """

    name: str
    layout: str


@dataclass(frozen=True)
class Linear:
    """A linear layer that can be used again; ``kind`` is how its module is to be called."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    kind: str


class Builder:
    """Grows a :class:`Program` on one batch of inputs."""

    def __init__(self, rng: random.Random, inputs: dict[str, Tensor]) -> None:
        self.rng = rng
        self.program = Program(tuple(inputs))
        self.scope: dict[str, Any] = {
            **NAMES,
            "self": nn.Module(),
            "tap": lambda name, x, z: z,
            "cut": Tensor.detach,
            "number": Tensor.item,
            "no_grad": torch.no_grad,
            "checkpoint": lambda f, *args, **_: f(*args),
            **{name: tensor.clone() for name, tensor in inputs.items()},
        }
        self.pool: list[Value] = []
        self.linears: list[Linear] = []
        self._names = 0

    # choices

    def pick(self, choices: Sequence[T], weights: Sequence[float] | None = None) -> T:
        return self.rng.choices(list(choices), weights)[0]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def width(self) -> int:
        return self.pick((1, 2, 3, 4, 5, 6), (1, 3, 4, 3, 1, 0.5))

    # what is there

    def tensor(self, value: Value) -> Tensor:
        return self.scope[value.name]

    def shape(self, value: Value) -> torch.Size:
        return self.tensor(value).shape

    def like(self, value: Value) -> list[Value]:
        """Other variables of the same layout and shape."""
        same = (value.layout, self.shape(value))
        return [
            other
            for other in self.pool
            if other.name != value.name and (other.layout, self.shape(other)) == same
        ]

    # lines

    def name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def module(self, prefix: str, expression: str) -> str:
        """A line of ``__init__``; the attribute's name."""
        name = self.name(prefix)
        self.setup(f"self.{name} = {expression}")
        self.scope["self"]._modules[name].double().eval()
        return name

    def setup(self, line: str) -> None:
        exec(line, self.scope)
        self.program.init.append(line)

    def line(self, text: str) -> None:
        """A line of ``forward``."""
        exec(text, self.scope)
        self.program.body += text.split("\n")

    def end(self, expression: str) -> None:
        """The last line of ``forward``."""
        self.program.body.append(f"return {expression}")

    def is_batch(self, value: Value) -> bool:
        """Whether a variable lies in the batch's own memory, which a model must not change."""
        own = self.tensor(value).untyped_storage().data_ptr()
        arguments = (self.scope[name] for name in self.program.arguments)
        return any(own == tensor.untyped_storage().data_ptr() for tensor in arguments)

    def value(self, expression: str, layout: str) -> Value:
        """A new variable."""
        name = self.name("h")
        self.line(f"{name} = {expression}")
        return self.named(name, layout)

    def named(self, name: str, layout: str) -> Value:
        value = Value(name, layout)
        tensor = self.tensor(value)
        axes = {"v": 2, "s": 3, "f": 3, "t": 2, "1": 3, "2": 4}[layout]
        if tensor.dim() != axes or tensor.numel() > 400 or 0 in tensor.shape:
            raise Rejected(f"{layout} {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()) or float(tensor.detach().abs().max()) > 1e4:
            raise Rejected("values out of hand")
        self.pool.append(value)
        return value

    def feature(self, word: str, strange: bool = False) -> None:
        self.program.features.add(word)
        if strange:
            self.program.plain = False

    def attempt(self, production: Production, value: Value) -> Value | None:
        """Applies a production, or leaves everything as it was."""
        program = self.program
        before = (
            len(program.init),
            len(program.body),
            set(program.features),
            set(program.odd),
            set(program.pruned),
            set(program.single),
            (program.plain, program.random, program.tolerance),
            list(self.pool),
            list(self.linears),
            set(self.scope),
            dict(self.scope["self"]._modules),
            dict(self.scope["self"]._parameters),
            dict(self.scope["self"]._buffers),
            self._names,
        )
        try:
            result = production.apply(self, value)
            if result is None:
                raise Rejected("not applicable")
            return result
        except (
            Rejected,
            RuntimeError,
            ValueError,
            IndexError,
            AssertionError,
            NotImplementedError,
        ) as error:
            production.rejections.append(f"{type(error).__name__}: {error}")
            (
                init,
                body,
                features,
                odd,
                pruned,
                single,
                marks,
                pool,
                linears,
                scope,
                *module,
                names,
            ) = before
            del program.init[init:], program.body[body:]
            program.features, program.odd = features, odd
            program.pruned, program.single = pruned, single
            program.plain, program.random, program.tolerance = marks
            self.pool, self.linears, self._names = pool, linears, names
            root = self.scope["self"]
            # What an in-place operation has changed may stay: only shapes are asked for.
            for name in self.scope.keys() - scope:
                del self.scope[name]
            for store, old in zip(
                (root._modules, root._parameters, root._buffers), module, strict=True
            ):
                store.clear()
                store.update(old)
            return None


@dataclass
class Production:
    """A rule of the grammar.

    Attributes:
        apply: writes lines and gives the new value; None or an error where it does not apply.
        layouts: that it takes.
        weight: how often it is drawn.
        strange: whether hesskern may refuse models that hold it.
        rejections: why it did not apply, over all models.
    """

    name: str
    apply: Callable[[Builder, Value], Value | None]
    layouts: str
    weight: float
    strange: bool
    rejections: list[str]


PRODUCTIONS: dict[str, Production] = {}


def production(layouts: str, weight: float = 1.0, strange: bool = False) -> Callable[[Any], Any]:
    """Registers a rule; its name is its feature."""

    def register(function: Callable[[Builder, Value], Value | None]) -> Any:
        word = function.__name__.strip("_").replace("_", " ")

        def apply(b: Builder, value: Value) -> Value | None:
            result = function(b, value)
            if result is not None:
                b.feature(word, strange)
            return result

        PRODUCTIONS[word] = Production(word, apply, layouts, weight, strange, [])
        return function

    return register
