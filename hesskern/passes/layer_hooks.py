"""What a model's layers tell while it runs: their calls, inputs, and weights made of others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesskern.graph.cuts import uncounted
from hesskern.passes.forward_pass import grad_fn_of
from hesskern.passes.layers import calls_itself, weight_of

__all__ = ["LayerHooks"]


class _Root(torch.autograd.Function):
    """The same tensor, without a copy, as a non-leaf that is no view.

    An in-place activation then shows up in the graph by its own name instead of as ``CopySlices``.
    """

    piecewise_linear = True
    passes_gradients = True

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        with uncounted():
            return z.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class LayerHooks:
    """Hooks on the layers of a model, from now on until they are removed.

    Args:
        modules: of the model, by name.
        names: of the layers.
        leaves: layers whose weight is a parameter; that of the others is computed from some.

    Attributes:
        paused: whether calls are not looked at.
        called: layers that have run with gradients.
        without_gradients: layers that have run without.
        shapes: of weights that are computed.
        computed: where those stand in the graph of the last run.
        results: nodes of what layers gave in the last run.
        given: nodes of linear calls in the last run, their inputs, and these inputs' versions.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], names: Iterable[str], leaves: Collection[str]
    ) -> None:
        self._leaves = leaves
        self.paused = False
        self.called: set[str] = set()
        self.without_gradients: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.forget()
        self._modules: list[nn.Module] = []
        self._handles: list[Any] = []
        for name in names:
            module, attribute = weight_of(modules, name)
            if isinstance(module, torch.jit.ScriptModule):
                # It takes no hooks; its calls are found in the graph.
                continue
            self._modules.append(module)
            hook = self._behind(name, attribute)
            self._handles.append(module.register_forward_hook(hook, prepend=True))

    def copy_inputs(self) -> None:
        """From now on layers read copies, which no later operation in place overwrites."""
        self._handles += [
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            for module in self._modules
        ]
        self._modules = []

    def remove(self) -> None:
        """Takes the hooks off, and lets go of the last run's graph."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def forget(self) -> None:
        """Lets go of the last run's graph."""
        self.computed: dict[str, list[GradientEdge]] = {}
        self.results: list[Any] = []
        self.given: list[tuple[Any, Tensor, int]] = []

    @staticmethod
    def _before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def copied(value: Any) -> Any:
            # What is overwritten in place later is then not what the layer has read.
            return value.clone() if isinstance(value, Tensor) else value

        return tuple(map(copied, args)), {name: copied(v) for name, v in kwargs.items()}

    def _behind(self, name: str, attribute: str) -> Any:
        def hook(module: nn.Module, args: Any, z: Any) -> Tensor | None:
            if self.paused:
                return None
            if not torch.is_grad_enabled():
                self.without_gradients.add(name)
                return None
            self.called.add(name)
            if name not in self._leaves:
                weight = getattr(module, attribute)
                if isinstance(weight, Tensor) and weight.requires_grad:
                    self.shapes[name] = tuple(weight.shape)
                    with uncounted():
                        self.computed.setdefault(name, []).append(get_gradient_edge(weight))
            node = grad_fn_of(z) if isinstance(z, Tensor) else None
            if node is None:
                return None
            plain = calls_itself(module)
            root = _Root.apply(z) if z._is_view() and plain else None  # type: ignore[no-untyped-call]
            self.results.append(node if root is None else grad_fn_of(root))
            if plain and args and isinstance(args[0], Tensor):
                with uncounted():
                    self.given.append((node, args[0], args[0]._version))
            return root

        return hook
