"""One walk over a model: every layer's inputs, and root rows times its output Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesskern.devices import on_host
from hesskern.graph.cuts import Cuts
from hesskern.graph.evidence import Evidence
from hesskern.graph.nodes import behind, in_order
from hesskern.graph.piecewise import layers_followed_by_smooth
from hesskern.graph.propagation import Propagation
from hesskern.graph.sample_probe import random_rows
from hesskern.graph.weight_uses import Target, WeightUse, find_uses
from hesskern.passes.batches import Batch
from hesskern.passes.diagonal_uses import DiagonalUse
from hesskern.passes.diagonals import DiagonalCapture
from hesskern.passes.forward_pass import check_repeatable, run_model
from hesskern.passes.frozen_model import FrozenModel
from hesskern.passes.layer_hooks import LayerHooks
from hesskern.passes.layer_uses import LayerUse, before_autocast, inputs_by_call, layer_uses
from hesskern.passes.layers import LayerSpec, tied_module

__all__ = ["Capture"]


@dataclass
class Capture:
    """The chosen layers of a model, for the time of a ``with`` block.

    Attributes:
        model: in eval mode and frozen inside the block, but for the layers' weights.
        specs: the layers, by name.
        kept: layers of which earlier captures have kept something.
        examine: whether every forward pass looks for layers whose Gauss-Newton block is not their
            Hessian.
        evidence: of which rows belong to which samples.
        call: gives the outputs [N, ...] for the model and the inputs of a batch.
        inexact: such layers, with the reason.
        unfit: layers not asked for by name that have no block here, with the reason: their weight
            acts otherwise than in linear calls, or their rows do not belong to single samples. They
            are left out of ``forward``'s uses for good.
        linear_use: whether the linear calls of a weight that is also looked up count as its uses.
        tied: such layers, with the name of a module that looks rows of their weight up.
        diagonals: the parameters whose uses are wanted as well.
        diagonal_uses: theirs in the last run.
    """

    model: nn.Module
    specs: dict[str, LayerSpec]
    kept: Collection[str] = ()
    examine: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    call: Callable[[nn.Module, Any], Tensor] = run_model
    inexact: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    linear_use: bool = False
    tied: dict[str, str] = field(default_factory=dict)
    diagonals: DiagonalCapture | None = None
    diagonal_uses: dict[str, list[DiagonalUse]] = field(default_factory=dict)
    _reached: set[str] = field(default_factory=set)
    _before: Mapping[str, Any] = field(default_factory=dict)
    _flat: set[Any] = field(default_factory=set)
    _tried: set[Any] = field(default_factory=set)
    _leaves: dict[str, Target] = field(default_factory=dict)

    def __enter__(self) -> Capture:
        beside = () if self.diagonals is None else self.diagonals.parameters.values()
        self._frozen = FrozenModel(self.model, self.specs, self.call, beside)
        self._frozen.__enter__()
        # Calling what holds several experts tells nothing about one of them.
        single = [name for name, spec in self.specs.items() if spec.expert is None]
        self._hooks = LayerHooks(self._frozen.modules, single, self._frozen.weights)
        self._hooks.called.update(self._before.get("called", ()))
        self._hooks.without_gradients.update(self._before.get("without gradients", ()))
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.remove()
        self._flat, self._leaves, self.diagonal_uses = set(), {}, {}
        self._frozen.__exit__(*error)

    def state(self) -> dict[str, Any]:
        """What was found of the layers so far, as plain values, for a pass that goes on later."""
        return {
            "reached": sorted(self._reached),
            "unfit": dict(self.unfit),
            "inexact": dict(self.inexact),
            "tied": dict(self.tied),
            "called": sorted(self._hooks.called),
            "without gradients": sorted(self._hooks.without_gradients),
            "diagonals": [] if self.diagonals is None else sorted(self.diagonals.reached),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave; before the ``with`` block."""
        self._before = state
        self._reached.update(state["reached"])
        for own, found in (
            (self.unfit, state["unfit"]),
            (self.inexact, state["inexact"]),
            (self.tied, state["tied"]),
        ):
            own.update(found)
        if self.diagonals is not None:
            self.diagonals.reached.update(state["diagonals"])

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model may run without anything being captured."""
        self._hooks.paused = True
        try:
            yield
        finally:
            self._hooks.paused = False

    @property
    def reasons(self) -> dict[str, str]:
        """Layers without curvature in some batch (unfit) or in any so far, with the reason."""
        reasons = {}
        for name in self.specs:
            if name in self._reached:
                continue
            if name in self._hooks.without_gradients:
                reasons[name] = "runs under torch.no_grad() inside the model"
            elif name in self._hooks.called:
                reasons[name] = "was never reached from the outputs, which do not depend on it"
            elif self.specs[name].expert is not None:
                reasons[name] = "was never reached in the forward pass: no row was routed to it"
            else:
                reasons[name] = "was never reached in the forward pass"
        return {**reasons, **self.unfit}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, list[LayerUse]]]:
        """Runs the model.

        Returns:
            outputs [N, ...] and the uses of every layer that was reached and is not unfit.

        Raises:
            ValueError: a layer has no block here, and is required or was fit before, or none has
                one; the outputs are random.
        """
        versions = _versions(batch.inputs)
        self.diagonal_uses = {}
        outputs, cuts = self._run(batch)
        try:
            found = self._found(outputs)
        except RuntimeError as error:
            # An in-place operation overwrote a layer's input after the layer had read it.
            if "inplace operation" not in str(error):
                raise
            if _versions(batch.inputs) != versions:
                raise ValueError(
                    "model must not overwrite its own inputs in place after a layer has read them; "
                    "let its forward() work on a copy"
                ) from error
            self._hooks.copy_inputs()
            outputs, cuts = self._run(batch)
            found = self._found(outputs)
        targets, alive, calls, others = found
        if self._frozen.drew:
            check_repeatable(
                _values(outputs, calls), lambda: self._values_again(batch), batch.index
            )
        if not len(outputs):
            return outputs, {}
        uses = self._fitting(outputs, alive, calls, others, batch.mask)
        if self.diagonals is not None:
            self.diagonal_uses = self.diagonals.uses(outputs, alive, self.evidence, self._flat)
        if cuts is not None:
            self._examine(outputs, uses, targets, cuts)
        return outputs, uses

    def _found(
        self, outputs: Tensor
    ) -> tuple[dict[str, Target], list[Any], dict[str, list[WeightUse]], dict[str, str]]:
        """The layers' weights, the graph, their linear calls, and what else they act through."""
        targets = {name: self._target(name) for name in self.specs if name not in self.unfit}
        results, given = self._hooks.results, inputs_by_call(self._hooks.given)
        self._hooks.results, self._hooks.given = [], []
        self._flat = {node for node, x in given.items() if x.dim() == 2}
        alive = behind(outputs)
        calls, others, looked_up = find_uses(alive, targets, results)
        for name in looked_up - self.tied.keys():
            self.tied[name] = tied_module(self._frozen.modules, name)
        if self._frozen.autocast:
            calls = before_autocast(calls, given)
        return targets, alive, calls, others

    def _target(self, name: str) -> Target:
        """A layer's weight in the graph of the last run."""
        if name in self._leaves:
            return self._leaves[name]
        spec, leaf = self.specs[name], self._frozen.weights.get(name)
        edges: tuple[GradientEdge, ...]
        if leaf is not None:
            edges, shape = (get_gradient_edge(leaf),), tuple(leaf.shape)
            if spec.expert is not None:
                shape = shape[1:]
        else:
            edges = tuple(dict.fromkeys(self._hooks.computed.get(name, ())))
            shape = self._hooks.shapes.get(name, spec.shape)
        bias = self._frozen.biases.get(name)
        target = Target(
            shape,
            edges,
            spec.kind == "conv",
            spec.transposed,
            None if bias is None else get_gradient_edge(bias),
            self.linear_use,
            spec.expert,
        )
        if leaf is not None:
            # Where a parameter's gradient arrives is the same for as long as somebody holds it.
            self._leaves[name] = target
        return target

    def _fitting(
        self,
        outputs: Tensor,
        alive: list[Any],
        calls: dict[str, list[WeightUse]],
        others: dict[str, str],
        mask: Any,
    ) -> dict[str, list[LayerUse]]:
        """Uses of the layers that have a block, and why the other layers have none.

        Where that is so of all layers, or of one that was fit before, the batch is at fault: to
        skip the layer would lose what was accumulated for it.
        """
        samples = len(outputs)
        found = {
            name: f"has a weight that {text}, so it has no block sum of s x^T"
            for name, text in others.items()
        }
        # An expert that got nothing.
        calls = {name: [use for use in uses if use.rows] for name, uses in calls.items()}
        calls = {name: uses for name, uses in calls.items() if uses}
        fitting: dict[str, list[WeightUse]] = {}
        for name, uses in calls.items():
            problem = next(filter(None, (self._misfit(name, use) for use in uses)), None)
            if problem is None:
                fitting[name] = uses
            else:
                found[name] = problem
        arranged = self.evidence.arrange(outputs, alive, fitting, self._flat)
        result: dict[str, list[LayerUse]] = {}
        for name in fitting:
            text = next((a.problem for a in arranged[name] if a.problem), None)
            if text is not None:
                found[name] = self._unarranged(fitting[name], samples, text)
                continue
            if any(call.routed for call in arranged[name]) and _may_mask(mask, name):
                found[name] = (
                    "sees rows that a router has chosen, and which of them are padding cannot be "
                    "told (let position_mask say None for the layer where padding is to count)"
                )
                continue
            spec = self.specs[name]
            result[name] = [
                use
                for call, arranged_call in zip(fitting[name], arranged[name], strict=True)
                for use in layer_uses(spec, call, arranged_call)
            ]
        self._refuse(found, len(calls) + len(others))
        self._reached.update(result)
        return {name: result[name] for name in self.specs if name in result}

    def _refuse(self, found: dict[str, str], reached: int) -> None:
        """Keeps the reasons, or raises one of them."""
        for name, text in found.items():
            fit_before = name in self._reached or name in self.kept
            if self.specs[name].required or fit_before or len(found) == reached:
                raise ValueError(
                    f"layer {name!r} {text}; the rows that a layer sees must belong to single "
                    "samples, and its weight must act in linear calls alone (leave the layer out "
                    "with layers=[...])"
                )
        for name, text in found.items():
            self.unfit.setdefault(name, text)

    @staticmethod
    def _unarranged(uses: list[WeightUse], samples: int, text: str) -> str:
        """Why rows of a layer's calls belong to no samples."""
        for use in uses:
            if use.rows % samples and use.window is None:
                return (
                    f"sees inputs {list(use.x.shape)} while the model returns {samples} samples; "
                    f"its first axis does not count the samples, and {text}"
                )
        return f"sees rows that are no samples: {text}"

    def _misfit(self, name: str, use: WeightUse) -> str | None:
        """Why a call has no place in the layer's block, before its samples are looked for."""
        spec = self.specs[name]
        if use.settings is not None:
            stride, padding, dilation, groups = use.settings
            same = (stride, dilation, groups[0]) == (spec.stride, spec.dilation, spec.groups)
            if not same or any(p < q for p, q in zip(padding, spec.padding, strict=True)):
                return "is also used with another stride, padding, dilation or groups than its own"
        return None

    def _values_again(self, batch: Batch) -> list[Tensor]:
        """Outputs and layers' inputs of another run on the same batch."""
        outputs, _ = self._run(batch)
        return _values(outputs, self._found(outputs)[2])

    def _run(self, batch: Batch) -> tuple[Tensor, Cuts | None]:
        """Outputs [N, ...], and what the model has taken out of the graph, where that counts."""
        self._hooks.forget()
        self._flat = set()
        cuts = Cuts() if self.examine else None
        return self._frozen.run(batch.inputs, cuts), cuts

    def backward(
        self,
        outputs: Tensor,
        row: Tensor,
        uses: Mapping[str, Sequence[LayerUse | DiagonalUse]],
        last: bool,
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
        return {
            name: [
                None if gradient is None else use.by_sample(gradient)
                for use, gradient in zip(layer, gradients, strict=False)
            ]
            for name, layer in uses.items()
        }

    def backward_all(
        self,
        outputs: Tensor,
        rows: int,
        row: Callable[[int], Tensor],
        uses: Mapping[str, Sequence[LayerUse | DiagonalUse]],
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
        layers = uses.values()
        if (
            rows < 2
            or self._frozen.hooked
            or any(not use.contiguous for layer in layers for use in layer)
        ):
            return None
        edges = [use.edge for layer in uses.values() for use in layer]
        plan = Propagation.plan(outputs, edges, self._tried)
        if plan is None:
            return None

        def named() -> Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]]:
            for block in plan.blocks(rows, row, budget):
                gradients = iter(block.gradients)
                by_layer = {
                    name: [
                        None if gradient is None else use.in_block(gradient)
                        for use, gradient in zip(layer, gradients, strict=False)
                    ]
                    for name, layer in uses.items()
                }
                yield block.samples, block.rows, by_layer

        return named()

    def _examine(
        self,
        outputs: Tensor,
        uses: dict[str, list[LayerUse]],
        targets: dict[str, Target],
        cuts: Cuts,
    ) -> None:
        """Finds layers whose block is not the Hessian."""
        edges = {name: list(targets[name].edges) for name in uses}
        for name, operation in layers_followed_by_smooth(outputs, edges).items():
            text = f"is followed by {operation}, which is not known to be piecewise linear"
            if len(uses[name]) > 1 and operation in ("Addmm", "Bmm", "Convolution", "Linear", "Mm"):
                text = f"is used {len(uses[name])} times in one forward pass, one after the other"
            self.inexact.setdefault(name, text)
        lost = set(in_order([edge.node for edge in cuts.edges]))
        for name in uses:
            if cuts.unknown or any(edge.node in lost for edge in edges[name]):
                self.inexact.setdefault(
                    name, "acts on a value that forward() takes out of the graph (detach, no_grad)"
                )
            elif self._frozen.hooked:
                self.inexact.setdefault(name, "lies in a model that hooks its gradients")


def _may_mask(mask: Any, name: str) -> bool:
    """Whether a batch's mask, or that of a layer's name, may say that a position is no data."""
    if isinstance(mask, Mapping):
        mask = next((one for pattern, one in mask.items() if fnmatchcase(name, pattern)), None)
    return isinstance(mask, Tensor) and not (on_host(mask) and bool((mask != 0).all()))


def _values(outputs: Tensor, calls: dict[str, list[WeightUse]]) -> list[Tensor]:
    """Outputs, layers' inputs, and what comes back to the layers of one random row of outputs."""
    uses = [use for layer in calls.values() for use in layer]
    edges = [GradientEdge(use.node, 0) for use in uses]
    gradients: tuple[Tensor | None, ...] = ()
    if edges and outputs.grad_fn is not None:
        gradients = torch.autograd.grad(
            outputs, edges, random_rows(outputs), retain_graph=True, allow_unused=True
        )
    empty = outputs.new_empty(0)
    returned = [empty if g is None else g.detach() for g in gradients]
    return [outputs.detach(), *(use.x for use in uses), *returned]


def _versions(inputs: Any) -> list[int]:
    """Version counters of the tensors in a batch's inputs."""
    if isinstance(inputs, Tensor):
        return [inputs._version]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if not isinstance(values, Iterable):
        return []
    return [value._version for value in values if isinstance(value, Tensor)]
