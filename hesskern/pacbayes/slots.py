"""A model seen from its posterior: which layers carry one, how, and what must not have moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hesskern.passes.layers import LayerSpec, calls_itself, select_layers

__all__ = ["Slot", "check_fixed", "evaluating", "replaced", "slots_of", "state_of"]

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Slot:
    """One layer whose weight (and bias, as the last column) is drawn from the posterior.

    Attributes:
        spec: geometry; ``spec.shape`` is [m, d] with the bias among the d.
        module: the layer.
        per_example: whether examples may each have a weight of their own: a Linear layer, used once
            a pass, on rows [N, d].
        reads_data: whether its input is the flattened input of the model.
        writes_output: whether its output is the model's.
    """

    spec: LayerSpec
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    per_example: bool
    reads_data: bool = False
    writes_output: bool = False

    def matrix(self, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """[m, d]: the weight, flattened, with the bias as last column; of ``state`` if given."""
        if state is None:
            weight, bias = self.module.weight, self.module.bias
        else:
            weight = state[f"{self.spec.name}.weight" if self.spec.name else "weight"]
            bias = state.get(f"{self.spec.name}.bias" if self.spec.name else "bias")
        flat = weight.detach().flatten(1)
        return flat.clone() if bias is None else torch.cat([flat, bias.detach()[:, None]], 1)

    def load(self, matrix: Tensor) -> None:
        """Writes [m, d] into the module's weight and bias."""
        weight, bias = self.split(matrix.to(self.module.weight.dtype))
        with torch.no_grad():
            self.module.weight.copy_(weight)
            if bias is not None and self.module.bias is not None:
                self.module.bias.copy_(bias)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight in the module's shape, and bias [m] or None, of a matrix [m, d]."""
        d = self.spec.weight_inputs
        weight = matrix[:, :d].reshape(self.module.weight.shape)
        return weight, matrix[:, d] if self.spec.joint else None

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's output for this matrix [m, d] in place of its weight and bias."""
        weight, bias = self.split(matrix)
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)):
            return self.module._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)

    def extended(self, x: Tensor) -> Tensor:
        """x [N, d], with the column of ones that belongs to the bias."""
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.spec.joint else x


def slots_of(model: nn.Module, inputs: Tensor) -> dict[str, Slot]:
    """The layers that carry a posterior, by name, in the model's order.

    Args:
        model: any module of one input; its Linear, Conv1d and Conv2d layers carry the posterior.
        inputs: [N >= 2, *shape], a few samples to see how the layers are used.

    Raises:
        ValueError: no supported layer, a batch norm in train mode, or outputs that are not [N, c].
        NotImplementedError: two layers share a parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"model: batch norm {name!r} is in train mode, which couples the samples of a "
                "batch; call model.eval()"
            )
    known, skipped = select_layers(model, None, "joint")
    modules = dict(model.named_modules())
    # Noise goes where a module is called: other uses of a matrix keep the weights they have.
    specs = {
        name: spec
        for name, spec in known.items()
        if name in modules and calls_itself(modules[name])
    }
    if not specs:
        raise ValueError(
            "model has no Linear, Conv1d or Conv2d that is called as it is; it has "
            f"{', '.join([*known, *skipped])}"
        )
    _check_untied(modules, specs)
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in specs}
    with ExitStack() as stack, torch.no_grad():
        for name in specs:
            hook = modules[name].register_forward_hook(
                lambda _, args, output, name=name: uses[name].append((args[0], output))
            )
            stack.callback(hook.remove)
        stack.enter_context(evaluating(model))
        outputs = model(inputs)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(inputs):
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model must return [N, c] for {len(inputs)} samples, got {found}")
    flat = inputs.flatten(1)
    slots = {}
    for name, spec in specs.items():
        used = uses[name]
        if not used:
            raise ValueError(f"layer {name!r} is not used in the model's forward pass")
        x, output = used[0]
        once = len(used) == 1 and spec.kind == "linear" and x.dim() == 2 and len(x) == len(inputs)
        slots[name] = Slot(
            spec,
            modules[name],
            once,
            once and x.shape == flat.shape and x.data_ptr() == inputs.data_ptr(),
            once and output is outputs,
        )
    return slots


def _check_untied(modules: Mapping[str, nn.Module], specs: Mapping[str, LayerSpec]) -> None:
    owner: dict[int, str] = {}
    for name in specs:
        for parameter in modules[name].parameters(recurse=False):
            if id(parameter) in owner:
                raise NotImplementedError(
                    f"layers {owner[id(parameter)]!r} and {name!r} share a parameter; posteriors "
                    "over tied weights are not supported"
                )
            owner[id(parameter)] = name


def state_of(prior: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a module's or state dict's tensors.

    Raises:
        TypeError: ``prior`` is neither.
    """
    if isinstance(prior, nn.Module):
        prior = prior.state_dict()
    if not isinstance(prior, Mapping) or not all(isinstance(v, Tensor) for v in prior.values()):
        raise TypeError(f"prior must be a module or a state dict, got {type(prior).__name__}")
    return {name: tensor.detach().clone() for name, tensor in prior.items()}


def check_fixed(
    model: nn.Module, prior: Mapping[str, Tensor], slots: Mapping[str, Slot]
) -> dict[str, Tensor]:
    """The tensors outside the posterior, which must equal the prior's.

    A tensor that was learned and is not part of Q would be used for free: the bound would not hold.

    Returns:
        these tensors by name, buffers included.

    Raises:
        ValueError: names or shapes differ from the prior's, or such a tensor has moved.
    """
    drawn = {
        f"{name}.{part}" if name else part
        for name, slot in slots.items()
        for part in (("weight", "bias") if slot.spec.joint else ("weight",))
    }
    own = model.state_dict()
    if own.keys() != prior.keys():
        odd = sorted(own.keys() ^ prior.keys())[0]
        where = "model" if odd in own else "prior"
        raise ValueError(f"prior: {odd!r} is in the {where} alone")
    fixed = {}
    for name, tensor in own.items():
        if tensor.shape != prior[name].shape:
            raise ValueError(
                f"prior: {name!r} is {list(prior[name].shape)}, the model's is {list(tensor.shape)}"
            )
        if name in drawn:
            continue
        if not torch.equal(tensor.cpu(), prior[name].cpu()):
            raise ValueError(
                f"{name!r} differs from the prior's and has no posterior, so it would count for "
                "nothing in the bound; give it the prior's value"
            )
        fixed[name] = tensor.detach().clone()
    return fixed


@contextmanager
def replaced(slots: Mapping[str, Slot], forwards: Mapping[str, Any]) -> Iterator[None]:
    """Inside, these layers compute ``forwards[name](x)`` instead."""
    try:
        for name, forward in forwards.items():
            slots[name].module.__dict__["forward"] = forward
        yield
    finally:
        for name in forwards:
            slots[name].module.__dict__.pop("forward", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
