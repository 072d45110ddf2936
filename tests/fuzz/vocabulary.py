"""Names that the programs of random models use besides torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

__all__ = [
    "NAMES",
    "Block",
    "Conv1D",
    "Reversed",
    "SubLinear",
    "derivative",
    "hooked",
    "replaced",
    "with_hook",
]


class SubLinear(nn.Linear):
    """A Linear with a forward of its own that computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


class Conv1D(nn.Module):
    """A linear layer with its weight [inputs, outputs], as in GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(size_out)


class Reversed(torch.autograd.Function):
    """Identity with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -0.5 * grads[0]


class Cubed(torch.autograd.Function):
    """x³ by a custom Function with a right gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


class Output:
    """What models of transformers return."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def replaced(module: nn.Module) -> nn.Module:
    """The module with a wrapper around its forward, as hooks of several libraries put there."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    module.forward = forward
    return module


def hooked(x: Tensor) -> Tensor:
    """x with half its gradient, by a hook on the tensor."""
    y = x * 1.0
    if y.requires_grad:
        # None is what a second derivative may bring.
        y.register_hook(lambda gradient: None if gradient is None else gradient * 0.5)
    return y


def with_hook(module: nn.Module, kind: str) -> nn.Module:
    """The module with a hook of its user's."""
    if kind == "pre":
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2.0,))
    elif kind == "post":
        module.register_forward_hook(lambda _, args, z: z.tanh())
    elif kind == "look":
        module.register_forward_hook(lambda _, args, z: None)
    else:
        module.register_full_backward_hook(lambda _, before, after: None)
    return module


class Block(nn.Module):
    """Two linear layers with a residual, one of them used twice."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d, bias=False)
        self.steps = nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, d)])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x + self.down(nn.functional.relu(self.up(x)))


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d sum(function(x)) / dx, differentiable in the weights; x counts as a constant."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]


NAMES: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": nn.functional,
    "SubLinear": SubLinear,
    "Conv1D": Conv1D,
    "Reversed": Reversed,
    "Cubed": Cubed,
    "replaced": replaced,
    "derivative": derivative,
    "hooked": hooked,
    "with_hook": with_hook,
    "Block": Block,
    "Output": Output,
}
