"""One walk over a model: every layer's inputs, and root rows times its output Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesskern.checks import as_weights
from hesskern.layers import LayerSpec, pad_input
from hesskern.piecewise import layers_followed_by_smooth
from hesskern.progress import Progress
from hesskern.propagation import Propagation
from hesskern.tying import WeightReads

__all__ = [
    "Batch",
    "Capture",
    "LayerUse",
    "batches",
    "check_iterable",
    "frozen_eval",
    "halves",
    "model_device",
    "run_model",
]


@dataclass(frozen=True)
class Batch:
    """One element of the data.

    Attributes:
        index: position in the data, from 0.
        inputs: tensor, tuple or dict for the model.
        targets: for the loss.
        given_targets: the same where they came from: values on the host can be looked at without
            waiting for a device.
        weight: [N] sample weights where they came from, or None.
    """

    index: int
    inputs: Any
    targets: Any
    given_targets: Any
    weight: Tensor | None


@dataclass
class LayerUse:
    """One call of one layer in a forward pass.

    Attributes:
        x: input [N, d], [N, t, d] or [N, C, (H,) W], detached, padded.
        edge: where the gradient with respect to the layer's output arrives.
        version: of x when the layer read it.
    """

    x: Tensor
    edge: GradientEdge
    version: int


class _Root(torch.autograd.Function):
    """The same tensor, without a copy, as a non-leaf that is no view.

    Gradients then have a node to arrive at, and an in-place activation shows up in the graph by
    its own name instead of as ``CopySlices``.
    """

    piecewise_linear = True
    passes_gradients = True

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] if ctx.needs_input_grad[0] else None, None


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode with every parameter frozen; modes and flags come back, also after an error.

    Raises:
        ValueError: the model was made under ``torch.inference_mode()``, or is on the meta device.
    """
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(
            "model must not be made under torch.inference_mode(): autograd cannot run through it"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("model must hold values, but it has tensors on the meta device")
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


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


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
        TypeError: data is not iterable, or an element is not such a tuple; ``sample_weight`` is not
            a tensor.
        ValueError: ``sample_weight`` has another length than the data; before the first batch where
            the data is a list or tuple.
    """
    check_iterable(data)
    if sample_weight is not None and not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a tensor, got {type(sample_weight).__name__}")
    if sample_weight is not None and sample_weight.dim() != 1:
        raise ValueError(f"sample_weight must be [total samples], got {list(sample_weight.shape)}")
    total = _length(data)
    if sample_weight is not None:
        sample_weight = as_weights(sample_weight)
        samples = _samples(data)
        if samples is not None and samples != len(sample_weight):
            raise _other_length(sample_weight, f"{samples} samples")
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
        inputs, given = _move(element[0], device), _nearby(element[1], device)
        weight = _nearby(element[2], device) if len(element) == 3 else None
        if sample_weight is not None:
            count = _leading_size(inputs)
            weight = sample_weight[offset : offset + count]
            offset += count
            if len(weight) != count:
                raise _other_length(sample_weight, "more samples")
        yield Batch(index, inputs, _move(given, device), given, weight)
        if progress is not None:
            progress(description, index + 1, total)
    if sample_weight is not None and offset != len(sample_weight):
        raise _other_length(sample_weight, f"{offset} samples")


def _other_length(sample_weight: Tensor, found: str) -> ValueError:
    return ValueError(f"sample_weight has {len(sample_weight)} entries but the data has {found}")


def _samples(data: Iterable[Any]) -> int | None:
    """Number of samples in a list of batches; None where it is not known without iterating."""
    if not isinstance(data, (list, tuple)):
        return None
    total = 0
    for element in data:
        if not isinstance(element, (tuple, list)) or not element:
            return None
        try:
            total += _leading_size(element[0])
        except (AttributeError, IndexError, TypeError):
            # No batch at all: the pass over the data says so.
            return None
    return total


def check_iterable(data: Any) -> None:
    """Raises TypeError if data cannot be an iterable of batches."""
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of (inputs, targets), got {type(data).__name__}")


def _length(data: Iterable[Any]) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:
        # A DataLoader over an iterable data set has a length only in name.
        return None


def _move(value: Any, device: torch.device) -> Any:
    # To the host without waiting, values would be read before they arrive.
    return _mapped(
        _usable(value), lambda tensor: tensor.to(device, non_blocking=device.type == "cuda")
    )


def _nearby(value: Any, device: torch.device) -> Any:
    """The value with tensors on the host or on the device."""
    return _mapped(
        _usable(value), lambda t: t if t.device in (device, torch.device("cpu")) else t.to(device)
    )


def _usable(value: Any) -> Any:
    """The value with tensors that hold values and that autograd takes."""
    return _mapped(value, _usable_tensor)


def _usable_tensor(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            f"data must hold values, got a tensor {list(tensor.shape)} on the meta device"
        )
    # Autograd refuses tensors made under inference_mode; a clone is a normal one.
    return tensor.clone() if tensor.is_inference() else tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dicts with changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def halves(batch: Batch) -> list[Batch]:
    """The batch in two, or as it is where it has one sample or does not say how many."""
    try:
        count = _leading_size(batch.inputs)
    except (AttributeError, TypeError):
        return [batch]
    if count < 2:
        return [batch]

    def part(value: Any, samples: slice) -> Any:
        return _mapped(value, lambda t: t[samples] if t.dim() and len(t) == count else t)

    def half(samples: slice) -> Batch:
        targets = part(batch.targets, samples)
        same = batch.given_targets is batch.targets
        given = targets if same else part(batch.given_targets, samples)
        weight = part(batch.weight, samples)
        return Batch(batch.index, part(batch.inputs, samples), targets, given, weight)

    return [half(slice(0, count // 2)), half(slice(count // 2, count))]


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
        kept: layers of which earlier captures have kept something.
        examine: whether every forward pass looks for layers whose Gauss-Newton block is not their
            Hessian.
        inexact: such layers, with the reason.
        unfit: layers not asked for by name whose input's first axis does not count the samples,
            with the reason; they are left out of ``forward``'s uses for good.
    """

    model: nn.Module
    specs: dict[str, LayerSpec]
    kept: Collection[str] = ()
    examine: bool = False
    inexact: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    _uses: dict[str, list[LayerUse]] = field(default_factory=dict)
    _reached: set[str] = field(default_factory=set)
    _without_gradients: set[str] = field(default_factory=set)
    _copy: bool = False

    def __enter__(self) -> Capture:
        self._modules = dict(self.model.named_modules())
        self._state = ExitStack()
        self._state.enter_context(frozen_eval(self.model))
        # Sums are never taken in the narrow dtype that autocast gives the model alone.
        kind = model_device(self.model).type
        self._autocast = (
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
        )
        self._state.enter_context(torch.autocast(kind, enabled=False))
        self._handles = [
            self._modules[name].register_forward_hook(
                self._hook(name), prepend=True, with_kwargs=True
            )
            for name in self.specs
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._uses = {}
        self._state.__exit__(*error)

    @property
    def reasons(self) -> dict[str, str]:
        """Layers without curvature in some batch (unfit) or in any so far, with the reason."""
        reasons = {
            name: "runs under torch.no_grad() inside the model"
            if name in self._without_gradients
            else "was never reached in the forward pass"
            for name in self.specs
            if name not in self._reached
        }
        return {**reasons, **self.unfit}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, z: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                self._without_gradients.add(name)
                return None
            x = (args[0] if args else kwargs["input"]).detach()
            x = pad_input(module, x.clone() if self._copy else x)
            out = None
            if not z.requires_grad or z._is_view():
                out = z = _Root.apply(z, torch.zeros((), requires_grad=True))
            use = LayerUse(x, get_gradient_edge(z), x._version)
            self._uses.setdefault(name, []).append(use)
            return out

        return hook

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, list[LayerUse]]]:
        """Runs the model.

        Returns:
            outputs [N, ...] and the uses of every layer that was reached and is not unfit.

        Raises:
            ValueError: the first axis of a layer's input does not count the samples, and the layer
                is required or was fit before, or no layer's does.
        """
        weights = self._weights() if self.examine else {}
        reads = WeightReads(weights.values())
        versions = _versions(batch.inputs)
        with reads if weights else nullcontext():
            outputs, uses = self._run(batch)
        if any(use.x._version != use.version for layer in uses.values() for use in layer):
            # An in-place operation overwrote a layer's input after the layer had read it.
            if _versions(batch.inputs) != versions:
                raise ValueError(
                    "model must not overwrite its own inputs in place after a layer has read them; "
                    "let its forward() work on a copy"
                )
            self._copy = True
            outputs, uses = self._run(batch)
        self._check_samples(outputs, uses)
        if self.examine:
            self._examine(outputs, uses, weights, reads)
        return outputs, {name: layer for name, layer in uses.items() if name not in self.unfit}

    def _check_samples(self, outputs: Tensor, uses: dict[str, list[LayerUse]]) -> None:
        """Finds layers whose input's first axis does not count the samples.

        Where that is so of all layers, or of one that was fit before, the batch is at fault: to
        skip the layer would lose what was accumulated for it.
        """
        found = {
            name: f"sees inputs {list(use.x.shape)} while the model returns "
            f"{outputs.shape[0]} samples"
            for name, layer in uses.items()
            for use in layer
            if use.x.dim() < 2 + self.specs[name].spatial_axes or use.x.shape[0] != outputs.shape[0]
        }
        for name, text in found.items():
            fit_before = name in self._reached or name in self.kept
            if self.specs[name].required or fit_before or len(found) == len(uses):
                raise ValueError(
                    f"layer {name!r} {text}; the first axis of a layer's input must count the "
                    "samples (leave the layer out with layers=[...])"
                )
        for name, text in found.items():
            self.unfit.setdefault(name, f"{text}; its first axis does not count the samples")
        self._reached.update(name for name in uses if name not in self.unfit)

    def _run(self, batch: Batch) -> tuple[Tensor, dict[str, list[LayerUse]]]:
        self._uses = {}
        kind, dtype, enabled = self._autocast
        try:
            with torch.autocast(kind, dtype, enabled=enabled):
                outputs = run_model(self.model, batch.inputs)
        except BaseException:
            # Their graph holds memory.
            self._uses = {}
            raise
        # Checkpointed parts run again in the backward pass; their hooks must not add to these.
        uses, self._uses = self._uses, {}
        return outputs, uses

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
        edges = [use.edge for layer in uses.values() for use in layer]
        grads: Iterable[Tensor | None] = (
            torch.autograd.grad(
                outputs, edges, grad_outputs=row, retain_graph=not last, allow_unused=True
            )
            if edges and outputs.requires_grad
            else [None] * len(edges)
        )
        gradients = iter(grads)
        return {name: [next(gradients) for _ in layer] for name, layer in uses.items()}

    def backward_all(
        self,
        outputs: Tensor,
        rows: int,
        row: Callable[[int], Tensor],
        uses: dict[str, list[LayerUse]],
        budget: int | None = None,
    ) -> Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]] | None:
        """All rows' gradients with respect to the output of every layer, a block at a time.

        Args:
            outputs: [N, ...] from :meth:`forward`.
            rows: number of rows.
            row: ``row(j)`` has the outputs' shape; called once for each j, in order.
            uses: from :meth:`forward`.
            budget: bytes that a block may take; None: what is fastest.

        Returns:
            iterator over blocks: which samples, which rows, and per layer and use their gradients
            [n, r, ...], or None where nothing flows back. None instead of an iterator where the
            model holds operations that only autograd knows, or there is one row, which has nothing
            to share.
        """
        if rows < 2:
            return None
        plan = Propagation.plan(outputs, [use.edge for layer in uses.values() for use in layer])
        if plan is None:
            return None

        def named() -> Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]]:
            for block in plan.blocks(rows, row, budget):
                gradients = iter(block.gradients)
                by_layer = {name: [next(gradients) for _ in layer] for name, layer in uses.items()}
                yield block.samples, block.rows, by_layer

        return named()

    def _weights(self) -> dict[str, Tensor]:
        """The layers' weights; not those that the layer computes anew at every access."""
        weights = {name: self._modules[name]._parameters.get("weight") for name in self.specs}
        return {name: weight for name, weight in weights.items() if weight is not None}

    def _examine(
        self,
        outputs: Tensor,
        uses: dict[str, list[LayerUse]],
        weights: dict[str, Tensor],
        reads: WeightReads,
    ) -> None:
        """Finds layers whose block is not the Hessian."""
        edges: dict[str, list[GradientEdge]] = {}
        for name, layer in uses.items():
            edges[name] = [use.edge for use in layer]
            if len(layer) > 1:
                self.inexact[name] = f"is used {len(layer)} times in one forward pass"
            elif name in weights and reads.counts[id(weights[name])] > 1:
                self.inexact[name] = self._sharing(name, weights[name])
        for name, operation in layers_followed_by_smooth(outputs, edges).items():
            self.inexact.setdefault(
                name, f"is followed by {operation}, which is not known to be piecewise linear"
            )

    def _sharing(self, name: str, weight: Tensor) -> str:
        for other, module in self._modules.items():
            if other != name and any(p is weight for p in module._parameters.values()):
                return f"shares its weight with {other!r}"
        return "has a weight that the forward pass also uses outside the layer"


def _versions(inputs: Any) -> list[int]:
    """Version counters of the tensors in a batch's inputs."""
    if isinstance(inputs, Tensor):
        return [inputs._version]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if not isinstance(values, Iterable):
        return []
    return [value._version for value in values if isinstance(value, Tensor)]
