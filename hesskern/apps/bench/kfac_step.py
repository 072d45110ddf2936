"""Suite ``kfac-step``: training steps with K-FAC's preconditioned gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesskern.apps.bench import cases
from hesskern.apps.bench.cases import Case
from hesskern.apps.bench.contenders import Built, Call, Contender, Problem
from hesskern.apps.bench.settings import Settings
from hesskern.optim.kfac import KFAC
from hesskern.progress import Progress

__all__ = ["OWN", "STEPS", "problems", "repeated"]

Make = Callable[[Case, nn.Module], Callable[[], None]]
"""Of a case and a copy of its model, one step."""

STEPS = 20
_DAMPING = 1e-2
_DECAY = 0.95
# Small enough that thousands of steps leave the network what it was.
_RATE = 1e-6


def problems() -> list[Problem]:
    """LeNet5, batches of 128 images, inverses every 20 steps."""
    return [Problem("kfac-step", "lenet5", _build, memory=True)]


def _build(settings: Settings, progress: Progress) -> Built:
    whole = cases.lenet5(settings)
    batch = 16 if settings.quick else 128
    case = replace(whole, inputs=whole.inputs[:batch], targets=whole.targets[:batch])
    own = {name: partial(repeated, case, make) for name, make in OWN.items()}
    return (
        f"LeNet5, batch of {case.samples} images 3 x 32 x 32: {STEPS} steps of K-FAC with SGD, "
        "inverses once",
        "weights and biases; one drawn target per image in every step; the same batch each time; "
        f"a gradient is {STEPS} of them here",
        [
            Contender("hesskern", own["hesskern"]),
            Contender("hooks and torch", own["hooks and torch"]),
            Contender("asdl K-FAC", partial(repeated, case, _asdl), "asdfghjkl", "asdl"),
            Contender("SGD alone", own["SGD alone"]),
            Contender("Adam", own["Adam"]),
            Contender("gradients", own["gradients"], unit=True),
        ],
    )


def repeated(case: Case, make: Make) -> Call:
    """A call of ``STEPS`` steps, after as many that are not counted."""
    step = make(case, copy.deepcopy(case.model))

    def call() -> None:
        for _ in range(STEPS):
            step()

    # The first steps make inverses more often than those that follow.
    call()
    return call


def _losses(case: Case, model: nn.Module) -> Callable[[], None]:
    """Backward of the batch's mean loss into ``.grad``."""

    def backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(case.inputs), case.targets).backward()

    return backward


def _gradient(case: Case, model: nn.Module) -> Callable[[], None]:
    return _losses(case, model)


def _stepping(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    backward = _losses(case, model)

    def step() -> None:
        backward()
        optimizer.step()

    return step


def _sgd(case: Case, model: nn.Module) -> Callable[[], None]:
    return _stepping(case, model, torch.optim.SGD(model.parameters(), _RATE, momentum=0.9))


def _adam(case: Case, model: nn.Module) -> Callable[[], None]:
    return _stepping(case, model, torch.optim.Adam(model.parameters(), _RATE))


def _hesskern(case: Case, model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=0.9)
    kfac = KFAC(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        damping=_DAMPING,
        decay=_DECAY,
        inverse_every=STEPS,
    )
    backward = _losses(case, model)

    def step() -> None:
        backward()
        kfac.step(case.inputs, case.targets)
        optimizer.step()

    return step


def _asdl(case: Case, model: nn.Module) -> Callable[[], None]:
    """Its K-FAC; curvature in every step, as the others have it.

    It marks its work for CUDA's profilers, which a torch without CUDA refuses.
    """
    from asdl import FISHER_MC, KfacGradientMaker, PreconditioningConfig

    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=0.9)
    config = PreconditioningConfig(
        data_size=case.samples,
        damping=_DAMPING,
        ema_decay=1 - _DECAY,
        curvature_upd_interval=1,
        preconditioner_upd_interval=STEPS,
    )
    maker = KfacGradientMaker(model, config, fisher_type=FISHER_MC)

    def step() -> None:
        optimizer.zero_grad()
        logits = maker.setup_model_call(model, case.inputs)
        maker.setup_loss_call(F.cross_entropy, logits, case.targets)
        with patch.object(torch.cuda.nvtx, "range", lambda *_: nullcontext()):
            maker.forward_and_backward()
        optimizer.step()

    return step


class _Plain:
    """K-FAC by hooks alone: of one forward pass the backward passes of the loss and of drawn
    targets; without any check, without clipping."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, self.model = case, model
        self.optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=0.9)
        self.factors: dict[nn.Module, list[Tensor]] = {}
        self.inverses: dict[nn.Module, list[Tensor]] = {}
        self.steps = 0
        self._drawing = False
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(self._forward)

    def _forward(self, layer: Any, args: Any, result: Tensor) -> None:
        x = args[0].detach()

        def backward(g: Tensor) -> None:
            if self._drawing:
                self._add(layer, x, g)

        result.register_hook(backward)

    def _add(self, layer: Any, x: Tensor, g: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            shape: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            x = F.unfold(x, *shape).mT
            g = g.flatten(2).mT
        rows, g = (
            x.reshape(-1, x.shape[-1]),
            g.reshape(-1, g.shape[1] if g.dim() == 2 else g.shape[2]),
        )
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        n = self.case.samples
        new = [rows.T @ rows / n, g.T @ g * (n / len(g))]
        old = self.factors.setdefault(layer, [torch.zeros_like(part) for part in new])
        for total, part in zip(old, new, strict=True):
            total.mul_(_DECAY).add_(part, alpha=1 - _DECAY)

    def _invert(self) -> None:
        for layer, (inner, outer) in self.factors.items():
            pi = ((inner.trace() * len(outer)) / (outer.trace() * len(inner))).sqrt()
            self.inverses[layer] = [
                torch.linalg.inv(
                    inner + pi * _DAMPING**0.5 * torch.eye(len(inner), device=inner.device)
                ),
                torch.linalg.inv(
                    outer + _DAMPING**0.5 / pi * torch.eye(len(outer), device=outer.device)
                ),
            ]

    def step(self) -> None:
        self.model.zero_grad()
        logits = self.model(self.case.inputs)
        self._drawing = True
        targets = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        drawn = F.cross_entropy(logits, targets, reduction="sum") / self.case.samples**0.5
        first = next(iter(self.model.parameters()))
        torch.autograd.grad(drawn, first, retain_graph=True)
        self._drawing = False
        F.cross_entropy(logits, self.case.targets).backward()
        if self.steps % STEPS == 0:
            self._invert()
        self.steps += 1
        for layer, (inner, outer) in self.inverses.items():
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            assert weight.grad is not None
            assert bias.grad is not None
            joint = torch.cat([weight.grad.flatten(1), bias.grad[:, None]], 1)
            joint = outer @ joint @ inner
            weight.grad.copy_(joint[:, :-1].view_as(weight))
            bias.grad.copy_(joint[:, -1])
        self.optimizer.step()


def _plain(case: Case, model: nn.Module) -> Callable[[], None]:
    return _Plain(case, model).step


OWN: dict[str, Make] = {
    "hesskern": _hesskern,
    "hooks and torch": _plain,
    "SGD alone": _sgd,
    "Adam": _adam,
    "gradients": _gradient,
}
"""What needs no other package."""
