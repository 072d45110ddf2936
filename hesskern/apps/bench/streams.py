"""Networks and batches that EKFAC is measured on, and what plain torch makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern.apps.bench import language
from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.contenders import Call, Contender, relative_difference
from hesskern.apps.bench.language import TextCase
from hesskern.passes.transformers import CausalLM

__all__ = [
    "MISFIT",
    "Bases",
    "Reference",
    "Stream",
    "difference",
    "double",
    "gradient",
    "images",
    "plain_ekfac",
    "reference",
    "text",
    "watched",
]

Bases = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Per layer U [m, m], V [d, d] and S [m, d], the mean over samples of (U^T R_n V)^2."""

MISFIT = 3e-5
"""How far factors may be from what float32 eigenvectors give; ``eigh`` leaves 1e-5 of 1,152."""

Take = Callable[[str, Tensor, Tensor], None]
"""Takes a layer's name, its inputs x [N, T, d] and its outputs' gradients g [N, T, m]."""


@dataclass(frozen=True)
class Stream:
    """A network, its batches, and what every package is to make of them.

    Attributes:
        title, description: for people.
        case: of suite lm, or of images.
        model: native, in eval mode.
        names: the layers that all take.
        batches: as hesskern takes them.
        samples: in all batches.
        loss: for hesskern.
        root: of a model, a batch and whether targets are drawn, the scalar whose gradients of a
            sample's rows are its root row.
        losses: of a model and a batch, the sum of the samples' losses.
    """

    title: str
    description: str
    case: TextCase | Case
    model: nn.Module
    names: tuple[str, ...]
    batches: Sequence[Any]
    samples: int
    loss: Any
    root: Callable[[nn.Module, Any, bool], Tensor]
    losses: Callable[[nn.Module, Any], Tensor]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by name, in the model's order."""
        return {name: self.model.get_submodule(name) for name in self.names}


def text(case: TextCase) -> Stream:
    """A language model; each sample's loss is the mean over its tokens."""

    def root(model: nn.Module, batch: Any, drawn: bool) -> Tensor:
        logits, labels = language.logits_of(model, batch), batch["labels"]
        if drawn:
            labels = language.drawn_labels(logits, labels)
        return language.root_loss(logits, labels)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = language.logits_of(model, batch)
        return language.sample_losses(logits, batch["labels"]).sum()

    return Stream(
        case.title,
        "random weights, float32; the 4 Linear-like layers of every block, as the head is tied to "
        "the embedding; weights only",
        case,
        case.model,
        tuple(language.layers(case.model)),
        case.batches,
        case.samples,
        CausalLM(),
        root,
        losses,
    )


def images(case: Case, batch: int) -> Stream:
    """A network of images, in batches of that many; cross-entropy."""

    def root(model: nn.Module, pair: Any, drawn: bool) -> Tensor:
        inputs, targets = pair
        logits = model(inputs)
        if drawn:
            targets = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        return F.cross_entropy(logits, targets, reduction="sum")

    def losses(model: nn.Module, pair: Any) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1], reduction="sum")

    cut = zip(case.inputs.split(batch), case.targets.split(batch), strict=True)
    return Stream(
        f"{case.title} in batches of {batch}",
        f"{case.description}; weights only, all layers",
        case,
        case.model,
        tuple(
            name
            for name, module in case.model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ),
        list(cut),
        case.samples,
        nn.CrossEntropyLoss(),
        root,
        losses,
    )


def double(stream: Stream) -> Stream:
    """The same model and inputs in float64."""
    model = copy.deepcopy(stream.model).double()
    batches = [
        batch if isinstance(batch, dict) else (batch[0].double(), batch[1])
        for batch in stream.batches
    ]
    return replace(stream, model=model, batches=batches)


def gradient(stream: Stream) -> Contender:
    """The unit: loss and gradient of all parameters on the same batches."""

    def prepare() -> Call:
        parameters = list(stream.model.parameters())

        def call() -> None:
            for batch in stream.batches:
                torch.autograd.grad(stream.losses(stream.model, batch), parameters)

        return call

    return Contender("one gradient (loss.backward)", prepare, unit=True)


def _rows(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [N, T, d] and gradients [N, T, m] of a layer's call."""
    if isinstance(module, nn.Conv2d):
        shape: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
        return F.unfold(x, *shape).mT, g.flatten(2).mT
    return x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])


def watched(
    stream: Stream, batches: Sequence[Any], scalar: Callable[[Any], Tensor], take: Take
) -> None:
    """Backward of ``scalar`` of every batch; ``take`` has every layer's rows. Nothing is checked.

    Of all gradients of weights only that of the first layer is made.
    """

    def hook(name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, result: Tensor) -> None:
            x = args[0].detach()
            result.register_hook(lambda g: take(name, *_rows(module, x, g)))

        return forward

    handles = [module.register_forward_hook(hook(name)) for name, module in stream.layers.items()]
    first = stream.layers[stream.names[0]].get_parameter("weight")
    try:
        for batch in batches:
            torch.autograd.grad(scalar(batch), first)
    finally:
        for handle in handles:
            handle.remove()


def _factors(stream: Stream, drawn: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of G^T G [m, m] and X^T X [d, d] over all rows, per layer."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, x: Tensor, g: Tensor) -> None:
        if name not in sums:
            m, d = g.shape[2], x.shape[2]
            sums[name] = g.new_zeros(m, m), x.new_zeros(d, d)
        for total, rows in zip(sums[name], (g.flatten(0, 1), x.flatten(0, 1)), strict=True):
            total.addmm_(rows.T, rows)

    watched(stream, stream.batches, lambda batch: stream.root(stream.model, batch, drawn), add)
    return sums


def _corrections(
    stream: Stream, bases: dict[str, tuple[Tensor, Tensor]], drawn: bool
) -> dict[str, Tensor]:
    """S [m, d] per layer in the bases U [m, m], V [d, d]; the cheaper order of the products."""
    sums = {name: u.new_zeros(len(u), len(v)) for name, (u, v) in bases.items()}

    def add(name: str, x: Tensor, g: Tensor) -> None:
        (u, v), t = bases[name], x.shape[1]
        m, d = len(u), len(v)
        if t == 1:
            left, right = (g[:, 0] @ u).square_(), (x[:, 0] @ v).square_()
            sums[name].addmm_(left.T, right)
            return
        if t * (m * m + d * d) < m * d * (m + d):
            rotated = (g @ u).mT @ (x @ v)
        else:
            rotated = u.T @ (g.mT @ x) @ v
        sums[name] += rotated.square_().sum(0)

    watched(stream, stream.batches, lambda batch: stream.root(stream.model, batch, drawn), add)
    return {name: total / stream.samples for name, total in sums.items()}


def plain_ekfac(stream: Stream, drawn: bool) -> Bases:
    """EKFAC by hooks alone: factors, ``eigh``, and a second pass for the corrections."""
    bases = {
        name: (torch.linalg.eigh(outer)[1], torch.linalg.eigh(inner)[1])
        for name, (outer, inner) in _factors(stream, drawn).items()
    }
    values = _corrections(stream, bases, drawn)
    return {name: (u, v, values[name]) for name, (u, v) in bases.items()}


@dataclass(frozen=True)
class Reference:
    """In float64: the factors, and a pass that has the corrections in anybody's bases.

    Eigenvectors of close eigenvalues turn with every rounding, and S with them, so that results
    are compared in their own bases: those must give the factors, and S be the reference's in them.
    """

    stream: Stream
    factors: dict[str, tuple[Tensor, Tensor]]
    drawn: bool


def reference(stream: Stream, drawn: bool) -> Call:
    """Makes the :class:`Reference`."""

    def call() -> Reference:
        exact = double(stream)
        # Inputs are the same whatever is drawn.
        return Reference(exact, _factors(exact, drawn=False), drawn)

    return call


def difference(result: Bases, expected: Reference) -> float:
    """The largest relative difference of any layer's corrections.

    Of the factors that the bases give where one differs by more than :data:`MISFIT`, which is what
    ``eigh`` in float32 leaves; and where targets were drawn, as gradients are other ones each time:
    then of input covariances alone.
    """
    exact = {name: (u.double(), v.double()) for name, (u, v, _) in result.items()}
    if set(exact) != set(expected.factors):
        raise ValueError(f"layers {sorted(exact)} are not the reference's")
    misfits = []
    for name, (u, v) in exact.items():
        outer, inner = expected.factors[name]
        misfits.append(_misfit(v, inner))
        if not expected.drawn:
            misfits.append(_misfit(u, outer))
    if expected.drawn or max(misfits) > MISFIT:
        return max(misfits)
    values = _corrections(expected.stream, exact, drawn=False)
    return max(relative_difference(s, values[name]) for name, (_, _, s) in result.items())


def _misfit(basis: Tensor, matrix: Tensor) -> float:
    """How far W [n, n] is from M's eigenvectors: W diag(W^T M W) W^T from M, and W^T W from I."""
    values = (basis * (matrix @ basis)).sum(0)
    one = torch.eye(len(basis), dtype=basis.dtype)
    return max(
        relative_difference((basis * values) @ basis.T, matrix),
        relative_difference(basis.T @ basis, one),
    )
