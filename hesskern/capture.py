"""One walk over a model: every layer's inputs, and root rows times its output Jacobian."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesskern.layers import LayerSpec, pad_input
from hesskern.piecewise import layers_followed_by_smooth
from hesskern.progress import Progress

__all__ = ["Batch", "Capture", "LayerUse", "batches", "frozen_eval", "run_model"]


@dataclass(frozen=True)
class Batch:
    """One element of the data.

    Attributes:
        index: position in the data, from 0.
        inputs: tensor, tuple or dict for the model.
        targets: for the loss.
        weight: [N] sample weights, or None.
    """

    index: int
    inputs: Any
    targets: Any
    weight: Tensor | None


@dataclass
class LayerUse:
    """One call of one layer in a forward pass.

    Attributes:
        x: input [N, d], [N, t, d] or [N, C, (H,) W], detached, padded.
        edge: where the gradient with respect to the layer's output arrives; None where the
            model ran the layer without gradients.
    """

    x: Tensor
    edge: GradientEdge | None
    version: int


class _Root(torch.autograd.Function):
    """Makes a tensor without history a non-leaf, without a copy, so that gradients stop at it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode with every parameter frozen; modes and flags come back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        # Compiled models run eagerly: hooks and double backward need the plain graph.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def run_model(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs [N, ...] for a tensor, a tuple or list of arguments, or a dict of them.

    Raises:
        TypeError: the model returns neither a tensor nor something with ``logits``.
    """
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    elif hasattr(outputs, "logits"):
        outputs = outputs.logits
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model must return a tensor (or an object with .logits), got {type(outputs).__name__}"
        )
    if not outputs.is_floating_point():
        raise TypeError(f"model must return a floating-point tensor, got {outputs.dtype}")
    if outputs.dim() == 0:
        raise ValueError("model must return outputs per sample [N, ...], got a scalar")
    return outputs


def batches(
    data: Iterable[Any],
    device: torch.device,
    sample_weight: Tensor | None = None,
    progress: Progress | None = None,
    description: str = "data",
) -> Iterator[Batch]:
    """The data's batches on the model's device.

    Args:
        data: iterable of (inputs, targets) or (inputs, targets, weight [N]).
        device: where tensors go.
        sample_weight: [total samples] weights in iteration order, instead of weights in the data.
        progress: callback, told after every batch.
        description: what the progress bar says.

    Raises:
        TypeError: data is not iterable, or an element is not such a tuple.
        ValueError: ``sample_weight`` has another length than the data.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of (inputs, targets), got {type(data).__name__}")
    total = len(data) if isinstance(data, Sized) else None
    offset = 0
    for index, element in enumerate(data):
        if not isinstance(element, (tuple, list)) or len(element) not in (2, 3):
            found = (
                f"a {type(element).__name__} of {len(element)}"
                if isinstance(element, (tuple, list))
                else type(element).__name__
            )
            raise TypeError(
                f"data must yield (inputs, targets) or (inputs, targets, weight); "
                f"batch {index} is {found}"
            )
        inputs, targets = _move(element[0], device), _move(element[1], device)
        weight = _move(element[2], device) if len(element) == 3 else None
        if sample_weight is not None:
            count = _leading_size(inputs)
            weight = sample_weight[offset : offset + count].to(device)
            offset += count
            if len(weight) != count:
                raise ValueError(
                    f"sample_weight has {len(sample_weight)} entries but the data has more samples"
                )
        yield Batch(index, inputs, targets, weight)
        if progress is not None:
            progress(description, index + 1, total)
    if sample_weight is not None and offset != len(sample_weight):
        raise ValueError(
            f"sample_weight has {len(sample_weight)} entries but the data has {offset} samples"
        )


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_move(item, device) for item in value)
    return value


def _leading_size(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
    raise TypeError("inputs must contain a tensor whose first axis counts the samples")


@dataclass
class Capture:
    """Hooks on the chosen layers of a model, for the time of a ``with`` block.

    Attributes:
        model: in eval mode and frozen inside the block.
        specs: the layers, by name.
        reasons: layers that have no curvature in this model, with the reason; filled by the first
            forward pass.
        inexact: layers whose Gauss-Newton block is not their Hessian, with the reason; filled by
            the first forward pass.
    """

    model: nn.Module
    specs: dict[str, LayerSpec]
    reasons: dict[str, str] = field(default_factory=dict)
    inexact: dict[str, str] = field(default_factory=dict)
    _uses: dict[str, list[LayerUse]] = field(default_factory=dict)
    _copy: bool = False
    _first: bool = True

    def __enter__(self) -> Capture:
        modules = dict(self.model.named_modules())
        self._state = frozen_eval(self.model)
        self._state.__enter__()
        self._handles = [
            modules[name].register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
            for name in self.specs
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._uses = {}
        self._state.__exit__(*error)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, z: Tensor) -> Tensor | None:
            x = (args[0] if args else kwargs["input"]).detach()
            x = pad_input(module, x.clone() if self._copy else x)
            uses = self._uses.setdefault(name, [])
            if not torch.is_grad_enabled():
                uses.append(LayerUse(x, None, x._version))
                return None
            out = None
            if not z.requires_grad:
                out = z = _Root.apply(z, torch.zeros((), requires_grad=True))
            uses.append(LayerUse(x, get_gradient_edge(z), x._version))
            return out

        return hook

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, list[LayerUse]]]:
        """Runs the model.

        Returns:
            outputs [N, ...] and the uses of every layer that was reached.

        Raises:
            ValueError: a layer's first axis does not count the samples.
        """
        self._uses = {}
        outputs = run_model(self.model, batch.inputs)
        if any(use.x._version != use.version for uses in self._uses.values() for use in uses):
            # An in-place operation overwrote a layer's input after the layer had read it.
            self._copy = True
            self._uses = {}
            outputs = run_model(self.model, batch.inputs)
        if self._first:
            self._first = False
            self._examine(outputs)
        for name, uses in self._uses.items():
            for use in uses:
                axes = self.specs[name].spatial_axes
                if use.x.dim() < 2 + axes or use.x.shape[0] != outputs.shape[0]:
                    raise ValueError(
                        f"layer {name!r} sees inputs {list(use.x.shape)} while the model returns "
                        f"{outputs.shape[0]} samples; the first axis of a layer's input must count "
                        "the samples (leave the layer out with layers=[...])"
                    )
        return outputs, self._uses

    def backward(
        self, outputs: Tensor, row: Tensor, uses: dict[str, list[LayerUse]], last: bool
    ) -> dict[str, list[Tensor | None]]:
        """One row's gradient with respect to the output of every layer, activations only.

        Args:
            outputs: [N, ...] from :meth:`forward`.
            row: the outputs' shape; one root row per sample.
            uses: from :meth:`forward`.
            last: whether the graph may be freed.

        Returns:
            per layer and use, the layer output's shape, or None where nothing flows back.
        """
        edges = [use.edge for layer in uses.values() for use in layer if use.edge is not None]
        grads: Iterable[Tensor | None] = (
            torch.autograd.grad(
                outputs, edges, grad_outputs=row, retain_graph=not last, allow_unused=True
            )
            if edges and outputs.requires_grad
            else [None] * len(edges)
        )
        gradients = iter(grads)
        return {
            name: [None if use.edge is None else next(gradients) for use in layer]
            for name, layer in uses.items()
        }

    def _examine(self, outputs: Tensor) -> None:
        """Finds, once, layers without curvature here and layers whose block is not the Hessian."""
        owners: dict[int, str] = {}
        modules = dict(self.model.named_modules())
        edges: dict[str, list[GradientEdge]] = {}
        for name in self.specs:
            weight = getattr(modules[name], "weight", None)
            first = owners.setdefault(id(weight), name)
            uses = self._uses.get(name, [])
            if not uses:
                self.reasons[name] = "was never reached in the forward pass"
            elif all(use.edge is None for use in uses):
                self.reasons[name] = "runs under torch.no_grad() inside the model"
            if first != name:
                for one in (first, name):
                    self.inexact[one] = f"shares its weight between {first!r} and {name!r}"
            if len(uses) > 1:
                self.inexact[name] = f"is used {len(uses)} times in one forward pass"
            edges[name] = [use.edge for use in uses if use.edge is not None]
        for name, operation in layers_followed_by_smooth(outputs, edges).items():
            self.inexact.setdefault(
                name, f"is followed by {operation}, which is not piecewise linear"
            )
