"""A random case from a seed: model, batches, loss."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fuzz.layers
import fuzz.strange
import fuzz.structure
import fuzz.values  # noqa: F401  (their rules register themselves)
from fuzz.builder import PRODUCTIONS, Builder, Rejected, Value
from fuzz.data import Batch, LossCase, draw_loss, draw_targets, draw_weights
from fuzz.layers import applied, make_linear
from fuzz.program import Program, Taps, plain_torch

__all__ = ["Case", "draw", "steady"]

STRANGE = 0.45
"""Part of the models that may hold rules which hesskern may refuse."""


@dataclass
class Case:
    """A model with its data.

    Attributes:
        seed: that it was drawn from.
        program: the model's text.
        batches: with float64 tensors.
        loss: of the samples.
        frozen: names of parameters that want no gradient when the model is handed over.
        training: whether it is handed over in training mode.
        dtype: in which hesskern sees model and data.
        values: seed of the parameters' values.
        by_name: the model's arguments go as a dict.
        one_weight: the weights go as ``sample_weight`` instead of with the batches.
    """

    seed: int
    program: Program
    batches: list[Batch]
    loss: LossCase
    frozen: set[str] = field(default_factory=set)
    training: bool = False
    dtype: torch.dtype = torch.float64
    values: int = 0
    one_weight: bool = False
    by_name: bool = False

    def model(self) -> nn.Module:
        """The model that is tested, as it is handed over."""
        model = self._made(self.program.build)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        return model.train(self.training)

    def reference(self, taps: Any, wide: bool = True) -> nn.Module:
        """The same function, noted by ``taps``, in eval mode; ``wide``: in float64."""
        model = self._made(lambda: self.program.build_reference(taps))
        return (widened(model, self.program) if wide else model.requires_grad_()).eval()

    def through(self) -> nn.Module:
        """The function with the derivatives that the model leaves out, in float64."""
        model = self._made(self.program.build_through)
        return widened(model, self.program).eval()

    def _made(self, build: Callable[[], nn.Module]) -> nn.Module:
        return filled(build, self.program, self.values, self.dtype)

    def data(self) -> list[Any]:
        """Batches as hesskern takes them."""
        elements: list[Any] = []
        for batch in self.batches:
            named = {name: _cast(tensor, self.dtype) for name, tensor in batch.inputs.items()}
            inputs = tuple(named.values())
            given: Any = named if self.by_name else inputs[0] if len(inputs) == 1 else inputs
            targets = _cast(batch.targets, self.dtype)
            if batch.weight is None or self.one_weight:
                elements.append((given, targets))
            else:
                elements.append((given, targets, _cast(batch.weight, self.dtype)))
        return elements

    @property
    def sample_weight(self) -> Tensor | None:
        if not self.one_weight:
            return None
        return torch.cat([b.weight for b in self.batches if b.weight is not None])

    def inputs(self, batch: Batch, wide: bool = True) -> list[Tensor]:
        """Rounded as hesskern sees them; ``wide``: in float64."""
        rounded = [_cast(tensor, self.dtype) for tensor in batch.inputs.values()]
        return [_cast(t, torch.float64 if wide else self.dtype).clone() for t in rounded]

    def describe(self) -> str:
        sizes = [{n: list(t.shape) for n, t in b.inputs.items()} for b in self.batches]
        weights = [
            None if b.weight is None else [round(w, 3) for w in b.weight.tolist()]
            for b in self.batches
        ]
        lines = [
            f"# seed {self.seed}; {self.dtype}; training={self.training}; "
            f"features: {', '.join(sorted(self.program.features))}",
            f"# batches: {sizes}; targets {[list(b.targets.shape) for b in self.batches]}",
            f"# loss: {self.loss.describe()}" + ("; arguments by name" if self.by_name else ""),
        ]
        if any(b.weight is not None for b in self.batches):
            lines.append(f"# weights: {weights}" + (" as sample_weight" if self.one_weight else ""))
        if self.frozen:
            lines.append(f"# frozen: {sorted(self.frozen)}")
        return "\n".join([*lines, self.program.text()])


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def filled(
    build: Callable[[], nn.Module], program: Program, seed: int, dtype: torch.dtype
) -> nn.Module:
    """A model with random parameters, buffers and running statistics."""
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        # Some modules draw more than their parameters. (torch.manual_seed takes milliseconds.)
        torch.default_generator.manual_seed(seed)
        model = build().double()
    for name in program.single:
        model.get_submodule(name).float()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not (tensor.is_floating_point() or tensor.is_complex()) or name.endswith(("._u", "._v")):
            continue
        if name.endswith("weight_mask"):
            tensor.copy_(torch.rand(tensor.shape, generator=source) > 0.4)
            continue
        values = torch.randn(
            tensor.shape,
            generator=source,
            dtype=torch.complex128 if tensor.is_complex() else torch.float64,
        )
        if "running_var" in name:
            values = values.square() + 0.5
        elif tensor.dim() > 1:
            values = values * (1.2 / max(tensor[0].numel(), 1) ** 0.5)
        else:
            values = 0.4 * values + (1.0 if name.endswith("weight") else 0.0)
        tensor.data.copy_(values)
    return model if dtype == torch.float64 else model.to(dtype)


def widened(model: nn.Module, program: Program) -> nn.Module:
    model = model.double()
    for name in program.single:
        model.get_submodule(name).float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _sizes(rng: random.Random) -> list[int]:
    count = rng.choices((1, 2, 3, 4), (3, 4, 2, 1))[0]
    sizes = [rng.choices((1, 2, 3, 4, 5, 6), (1, 2, 3, 3, 2, 1))[0] for _ in range(count)]
    if rng.random() < 0.15:
        sizes[0] = 1
    return sizes


def _inputs(rng: random.Random) -> tuple[str, list[int], bool]:
    """Layout of the batch, its shape without the samples, and whether there is a mask."""
    layout = rng.choices(("v", "s", "1", "2", "ids"), (6, 4, 2, 3, 1.5))[0]
    if layout == "v":
        return layout, [rng.choice((1, 2, 3, 4, 5))], False
    if layout == "s":
        return layout, [rng.randint(1, 5), rng.choice((1, 2, 3, 4))], rng.random() < 0.25
    if layout == "1":
        return layout, [rng.randint(1, 3), rng.randint(2, 7)], False
    if layout == "2":
        return layout, [rng.randint(1, 3), rng.randint(2, 5), rng.randint(2, 5)], False
    return layout, [rng.randint(1, 5)], rng.random() < 0.25


def _batch(
    layout: str, shape: list[int], mask: bool, second: int, n: int, source: torch.Generator
) -> Batch:
    inputs: dict[str, Tensor] = {}
    if layout == "ids":
        # No token twice in a sample: between equal positions only rounding tells which is larger.
        inputs["x"] = torch.rand(n, 5, generator=source).argsort(1)[:, : shape[0]]
    else:
        inputs["x"] = torch.randn(n, *shape, generator=source, dtype=torch.float64)
    if mask:
        # Positions behind a length of each sample; the first always stays.
        lengths = torch.randint(1, shape[0] + 1, (n, 1), generator=source)
        inputs["mask"] = torch.arange(shape[0])[None] >= lengths
    if second:
        inputs["y"] = torch.randn(n, second, generator=source, dtype=torch.float64)
    return Batch(inputs)


def draw(seed: int) -> Case:
    """The case of a seed; the same on every machine."""
    rng = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            case = _attempt(rng, seed)
            if case is not None:
                return case


def _attempt(rng: random.Random, seed: int) -> Case | None:
    source = torch.Generator().manual_seed(rng.getrandbits(31))
    sizes = _sizes(rng)
    layout, shape, mask = _inputs(rng)
    if layout == "s" and rng.random() < 0.3:
        # As many steps as samples: sizes say nothing.
        shape[0] = min(max(sizes), 5)
        sizes = [shape[0] if rng.random() < 0.7 else n for n in sizes]
    second = rng.choice((1, 2, 3, 4)) if rng.random() < 0.15 else 0
    batches = [_batch(layout, shape, mask, second, n, source) for n in sizes]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.getrandbits(31))
        try:
            b = Builder(rng, max(batches, key=lambda batch: len(batch.inputs["x"])).inputs)
            start = _start(b, layout)
            if second:
                b.feature("two inputs")
                b.named("y", "v")
            _grow(b, start, rng.random() < STRANGE)
            case = _finish(b, batches, source, seed)
        except (Rejected, RuntimeError, ValueError, IndexError) as error:
            REJECTED.append(f"{type(error).__name__}: {error}")
            return None
    return case


REJECTED: list[str] = []
"""Why whole models were thrown away."""


def _start(b: Builder, layout: str) -> Value:
    if layout != "ids":
        return b.named("x", layout)
    d = b.width()
    table = b.module("t", f"nn.Embedding(5, {d})")
    value = b.value(f"self.{table}(x)", "s")
    if b.chance(0.3):
        # A head whose weight is the table.
        d_in = make_linear(b, d, 5, "module")
        b.setup(f"self.{d_in.name}.weight = self.{table}.weight")
        b.program.odd.add(d_in.name)
        b.feature("tied to the embedding", strange=True)
    return value


def _grow(b: Builder, value: Value, strange: bool) -> None:
    steps = b.pick((1, 2, 3, 4, 5, 6, 7))
    # Few strange rules a model: a failure then says where it comes from.
    budget = b.pick((1, 2, 3), (6, 2, 1)) if strange else 0
    done = 0
    for _ in range(4 * steps):
        if done == steps:
            break
        fitting = [
            rule
            for rule in PRODUCTIONS.values()
            if value.layout in rule.layouts and (budget or not rule.strange)
        ]
        rule = b.pick(fitting, [rule.weight * (2.0 if rule.strange else 1.0) for rule in fitting])
        result = b.attempt(rule, value)
        if result is not None:
            budget -= rule.strange
            value = result
            done += 1
    _head(b, value)


def _head(b: Builder, value: Value) -> None:
    """From the last value to outputs [N, c, ...], and the return."""
    x, classes = value.name, b.pick((1, 2, 3, 4), (0.5, 3, 3, 1))
    if value.layout == "f":
        value = b.value(f"{x}.transpose(0, 1)", "s")
        x = value.name
    if value.layout == "s" and b.chance(0.3):
        layer = make_linear(b, b.shape(value)[2], classes)
        value = b.value(applied(b, layer, x, 3), "s")
        if b.chance(0.2):
            b.feature("flattened tokens", strange=True)
            b.end(f"{value.name}.reshape(-1, {classes})")
            return
        b.feature("token outputs")
        b.end(f"{value.name}.transpose(1, 2)")
        return
    if value.layout == "2" and b.chance(0.3):
        name = b.module("c", f"nn.Conv2d({b.shape(value)[1]}, {classes}, 1)")
        b.feature("pixel outputs")
        b.end(f"tap('{name}', {x}, self.{name}({x}))")
        return
    if value.layout == "1" and b.chance(0.2):
        name = b.module("c", f"nn.Conv1d({b.shape(value)[1]}, {classes}, 1)")
        b.feature("token outputs")
        b.end(f"tap('{name}', {x}, self.{name}({x}))")
        return
    if value.layout in "s12":
        pooled = "flatten(1)" if b.chance(0.5) else "flatten(2).mean(2)"
        if value.layout == "s":
            pooled = b.pick(("flatten(1)", "mean(1)", "mean(1)"))
        value = b.value(f"{x}.{pooled}", "v")
    if b.chance(0.8) or b.shape(value)[1] > 6:
        known = [layer for layer in b.linears if layer.inputs == b.shape(value)[1]]
        layer = b.pick(known) if known and b.chance(0.15) else None
        layer = layer or make_linear(b, b.shape(value)[1], classes)
        value = b.value(applied(b, layer, value.name, 2), "v")
    end = value.name
    if b.shape(value)[1] == 1 and b.chance(0.4):
        b.feature("outputs [N]")
        end = f"{end}.squeeze(1)"
    if b.chance(0.08):
        b.feature("outputs with logits")
        end = f"Output({end})"
    b.end(end)


def steady(
    model: nn.Module, batch: Batch, source: torch.Generator, taps: Taps | None = None
) -> bool:
    """Whether a model's outputs and gradients stay where its values move by some rounding errors.

    The sign of a sum that is zero but for rounding is nobody's to know, nor which of two positions
    is larger that are equal but for rounding: that shows in the gradients at what ``taps`` notes.
    """
    tensors = [*batch.inputs.values(), *model.parameters()]
    kept = [tensor.detach().clone() for tensor in tensors]
    seen = []
    for step in range(4):
        for tensor, value in zip(tensors, kept, strict=True):
            if tensor.is_floating_point():
                noise = torch.randn(value.shape, generator=source, dtype=torch.float64)
                tensor.data.copy_(value * (1 + 1e-13 * (step > 0) * noise))
        noted = Taps() if taps is None else taps
        noted.clear()
        out = model(*[t.clone() for t in batch.inputs.values()])
        out = getattr(out, "logits", out)
        direction = torch.arange(1.0, out.numel() + 1, dtype=torch.float64).reshape(out.shape)
        found = [out.detach()]
        if out.requires_grad:
            real = [p for p in model.parameters() if not p.is_complex()]
            real += [z for _, _, z in noted if not z.is_complex()]
            found += torch.autograd.grad(
                (out * direction).sum(), real, allow_unused=True, materialize_grads=True
            )
        seen.append(torch.cat([tensor.double().reshape(-1) for tensor in found]))
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.data.copy_(value)
    # Layers in float32 round more than that.
    limit = 1e-7 if all(p.dtype != torch.float32 for p in model.parameters()) else 1e-2
    return all(torch.allclose(seen[0], other, rtol=limit, atol=limit) for other in seen[1:])


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    out = model(*[t.clone() for t in batch.inputs.values()])
    return getattr(out, "logits", out)


def _weighted(out: Tensor) -> Tensor:
    """A sum that tells all outputs apart."""
    return (out * torch.arange(1, out.numel() + 1, dtype=out.dtype).sin().view(out.shape)).sum()


def _check_torch(model: nn.Module, batches: list[Batch], program: Program) -> None:
    """Raises where torch's gradient of a model with a norm before attention is no derivative.

    Its batch norm on the CPU errs where a gradient lies in memory unlike the input: (1, 12, 12, 4)
    beside (3, 3, 3, 1) for [4, 1, 1, 3], as attention leaves it.
    """
    attention = any("attention" in feature for feature in program.features)
    marks = ("cut(", "number(", "no_grad(", ".float()", "half", "bfloat16")
    cut = not attention or any(mark in line for mark in marks for line in program.body)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cut or not norms or not parameters:
        return
    source = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in parameters]

    def value() -> Tensor:
        return sum((_weighted(_outputs(model, batch)) for batch in batches), torch.zeros(()))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, direction in zip(parameters, directions, strict=True):
                p.add_(direction, alpha=step)
            result = value()
            for p, direction in zip(parameters, directions, strict=True):
                p.sub_(direction, alpha=step)
        return result

    with plain_torch():
        total = value()
        if not total.requires_grad:
            return
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        slope = sum(
            float((g * d).sum())
            for g, d in zip(gradients, directions, strict=True)
            if g is not None
        )
        for step in (1e-5, 1e-6):
            measured = float(moved(step) - moved(-step)) / (2 * step)
            if abs(measured - slope) <= 1e-4 * max(abs(slope), 1.0):
                return
    raise Rejected("torch's gradient is not the derivative")


def _finish(b: Builder, batches: list[Batch], source: torch.Generator, seed: int) -> Case | None:
    rng, program = b.rng, b.program
    layers = any(word in line for line in program.body for word in ("tap(", "self.m", "self.g"))
    if not layers and rng.random() < 0.9:
        return None
    if not b.scope["self"]._parameters and not list(b.scope["self"].parameters()):
        return None
    values, taps = rng.getrandbits(31), Taps()
    model = filled(lambda: program.build_reference(taps), program, values, torch.float64)
    model.eval()
    # What torch itself cannot differentiate, in place or with checkpoints, is nobody's model.
    tested = filled(program.build, program, values, torch.float64).eval()
    outputs = []
    for batch in batches:
        for one in (tested, model):
            out = _outputs(one, batch)
            if out.requires_grad:
                # Some in-place operations leave nothing that can be differentiated.
                _weighted(out).backward()
        out = out.detach()
        if out.dim() < 1 or not bool(torch.isfinite(out).all()) or float(out.abs().max()) > 200:
            return None
        if out.numel() > 120:
            return None
        outputs.append(out)
    if not program.random:
        _check_torch(model, batches, program)
    if not program.random and not all(steady(model, batch, source, taps) for batch in batches):
        return None
    fixed = len({out.shape[1:] for out in outputs}) == 1
    case = Case(seed, program, batches, draw_loss(rng, outputs[0], fixed), values=values)
    soft = rng.random() < 0.15
    weighted = rng.random() < 0.25
    for batch, out in zip(batches, outputs, strict=True):
        batch.targets = draw_targets(rng, source, case.loss, out, soft)
        hidden = case.loss.kind == "ce" and not batch.targets.is_floating_point()
        if batch is not batches[0] and hidden and rng.random() < 0.05:
            # Nobody in it counts.
            batch.targets = torch.full_like(batch.targets, case.loss.loss.ignore_index)
        if weighted:
            batch.weight = draw_weights(rng, source, len(out))
    same_rows = all(len(o) == len(c.inputs["x"]) for o, c in zip(outputs, batches, strict=True))
    case.one_weight = weighted and same_rows and rng.random() < 0.3
    case.by_name = rng.random() < 0.15
    case.training = rng.random() < 0.4
    names = [name for name, _ in model.named_parameters()]
    mode = rng.random()
    if mode < 0.1:
        case.frozen = set(names)
    elif mode < 0.4:
        case.frozen = {name for name in names if rng.random() < 0.4}
    if not program.single and not any(p.is_complex() for p in model.parameters()):
        kind = rng.random()
        case.dtype = (
            torch.float32 if kind < 0.08 else torch.bfloat16 if kind < 0.11 else torch.float64
        )
    if case.dtype != torch.float64:
        narrow = case.model().eval()
        for batch in batches:
            # What mixes dtypes does not run in every one.
            narrow(*[_cast(t, case.dtype) for t in batch.inputs.values()])
    return case
