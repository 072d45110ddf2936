"""Many rows backwards through a model at once, where its graph consists of known operations.

Autograd runs one row of gradients at a time through the whole batch. Rows of one sample have much
in common: the same derivatives, and zeros at the same places behind ReLUs and maxima. Here the
autograd graph is read, and every operation has a rule (propagation_rules.py) that takes all rows of
a few samples on together, few enough to stay in the cache from one operation to the next.

A gradient of a tensor [N, ...] is [n, r, ...] for n of the samples and r of the rows. Tensors whose
first axis merges samples with something else, [N t, ...], count as [N, t, ...]. Images keep their
channels last in memory, behind the rows, on the CPU; on a device where its convolutions want them
so, every row with its channels last.

Hooks that a model registers on its activations change no gradient here: the graph does not show
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.nodes import kind, product
from hesskern.graph.propagation_layout import (
    DTYPES,
    Layout,
    Unknown,
    cut,
    dtype_of,
    metadata,
    times,
    view,
)
from hesskern.graph.propagation_rules import rule_for

__all__ = ["Block", "Propagation"]

# Devices on which rows go together; on others autograd takes them one by one.
_DEVICES = ("cpu", "cuda")

# Elements of the largest gradient of a block: its successor and itself stay in the cache.
_BLOCK = 2**21
# Where single samples are large: elements that a block may have for the sake of several rows, which
# share what they have in common, and of a sample for every thread.
_LARGE_BLOCK = 2**23
_ROWS = 28
# On a device, whose launches take as long for few elements: of the largest gradient of a block.
_DEVICE_BLOCK = 2**27
# Gradients of the largest size that are alive at a time, beside those that are wanted.
_ALIVE = 4


@dataclass(frozen=True)
class Block:
    """Gradients of some samples and rows, valid until the next block.

    Attributes:
        samples, rows: which.
        gradients: per edge [n, r, ...], or None where nothing arrives.
    """

    samples: slice
    rows: slice
    gradients: list[Tensor | None]


class Propagation:
    """The plan for one forward pass.

    Args:
        outputs: [N, ...] of the model, with their graph.
        edges: where gradients are wanted.
        tried: forms of graphs that have been tried on this device.

    Attributes:
        by_kernels: whether this package's kernels on the CPU take the rows; else torch's own.
    """

    def __init__(
        self, outputs: Tensor, edges: list[GradientEdge], tried: set[Any] | None = None
    ) -> None:
        tried = set() if tried is None else tried
        self._n = outputs.shape[0]
        self.by_kernels = _by_kernels(outputs)
        self._start: Any = outputs.grad_fn
        self._edges = edges
        self._wanted = {edge.node for edge in edges}
        if outputs.output_nr != 0 or any(edge.output_nr != 0 for edge in edges):
            raise Unknown
        self._order = self._needed(outputs)
        layout = Layout(self._n, self.by_kernels, self._order)
        self._shapes = layout.shapes
        self._dtypes = {node: dtype_of(node) for node in self._order}
        if any(metadata(node).device != outputs.device for node in self._order):
            raise Unknown
        self._rules = {node: rule_for(layout, node) for node in self._order}
        self._arrivals: dict[Any, int] = {}
        for node in self._order:
            for operand in self._rules[node].operands:
                following = node.next_functions[operand][0]
                self._arrivals[following] = self._arrivals.get(following, 0) + 1
        sizes = [product(shape) for shape in self._shapes.values()]
        self._largest, self._total = max(sizes, default=1), sum(sizes)
        if not self.by_kernels:
            wanted = [product(self._shapes[n]) for n in self._wanted if n in self._shapes]
            self._total = sum(wanted) + _ALIVE * self._largest
        self._outputs = outputs.new_empty(0, *outputs.shape[1:])
        self._form = tuple(
            (kind(n), self._shapes[n], self._dtypes[n], self._rules[n].operands)
            for n in self._order
        )
        # A trial takes a device as many launches as a block.
        if self.by_kernels or self._form not in tried:
            self._try()
            tried.add(self._form)

    @classmethod
    def plan(
        cls, outputs: Tensor, edges: list[GradientEdge], tried: set[Any] | None = None
    ) -> Propagation | None:
        """The plan, or None where autograd itself has to do it."""
        if outputs.device.type not in _DEVICES or outputs.dtype not in DTYPES:
            return None
        if outputs.grad_fn is None:
            return None
        if len(outputs) == 0 or not edges:
            return None
        with torch.no_grad():
            try:
                return cls(outputs, edges, tried)
            except Exception:
                # Whatever a rule cannot do, autograd can, or it has the better message.
                return None

    def _needed(self, outputs: Tensor) -> list[Any]:
        """Nodes on the way to a wanted one, each before the nodes that it passes gradients to."""
        needed: dict[Any, bool] = {}
        order: list[Any] = []
        pending: list[Any] = [outputs.grad_fn]
        while pending:
            node = pending[-1]
            if node in needed:
                pending.pop()
                continue
            following = [edge for edge in node.next_functions if edge[0] is not None]
            missing = [follower for follower, _ in following if follower not in needed]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            needed[node] = node in self._wanted or any(needed[f] for f, _ in following)
            if needed[node]:
                if any(number != 0 and needed[f] for f, number in following):
                    raise Unknown
                order.append(node)
        return order[::-1]

    def _try(self) -> None:
        """One row of one sample, so that what a rule cannot do shows before anything is made."""
        row = self._outputs.new_ones(1, 1, *self._outputs.shape[1:])
        self._run(row, slice(0, 1), strict=True)

    def blocks(
        self, rows: int, row: Callable[[int], Tensor], budget: int | None = None
    ) -> Iterator[Block]:
        """Gradients of all rows and samples, block by block.

        Args:
            rows: number of rows.
            row: ``row(j)`` is [N, ...], shaped as the outputs; called once for each j, in order.
            budget: bytes that a block may take on its way beyond one row; None: what is fastest.

        Yields:
            blocks that together hold every row of every sample once.
        """
        step, samples = self._block_size(rows, budget)
        for begin in range(0, rows, step):
            block = torch.stack([row(j) for j in range(begin, min(rows, begin + step))], 1)
            for start in range(0, self._n, samples):
                chosen = slice(start, min(start + samples, self._n))
                with torch.no_grad():
                    gradients = self._run(block[chosen], chosen)
                yield Block(chosen, slice(begin, begin + block.shape[1]), gradients)

    def _block_size(self, rows: int, budget: int | None) -> tuple[int, int]:
        """Rows and samples of a block."""
        largest = max(1, self._largest)
        step = max(_BLOCK // (largest * self._n), min(_ROWS, _LARGE_BLOCK // largest), 1)
        if not self.by_kernels:
            # Rows before samples: masks and places of maxima are read once for all of them.
            together = min(_ROWS, _DEVICE_BLOCK // largest)
            step = max(_DEVICE_BLOCK // (largest * self._n), together, 1)
        step = min(rows, step)
        if budget is not None:
            # Half is for the rows themselves, held twice while they are put together, half for
            # their gradients at every operation.
            half = budget // (2 * self._outputs.element_size())
            row = 2 * self._n * product(self._outputs.shape[1:])
            step = max(1, min(step, half // max(1, row)))
            if not self.by_kernels:
                step = max(1, min(step, half // max(1, self._total)))
        # All blocks of about the same number of rows.
        step = -(-rows // -(-rows // step))
        if self.by_kernels:
            samples = max(1, _BLOCK // (largest * step))
            threads = torch.get_num_threads()
            shared = -(-samples // threads) * threads
            if shared * step * largest <= max(_LARGE_BLOCK, samples * step * largest):
                samples = shared
        else:
            samples = max(1, _DEVICE_BLOCK // (largest * step))
            samples = -(-self._n // -(-self._n // samples))
        if budget is not None and step > 1:
            samples = max(1, min(samples, half // max(1, step * self._total)))
        return step, samples

    def _run(self, block: Tensor, samples: slice, strict: bool = False) -> list[Tensor | None]:
        """A block's gradients at the edges.

        Args:
            block: [n, r, ...] rows of the samples.
            samples: which.
            strict: whether to raise where a gradient has not the shape of its tensor.
        """
        arrived: dict[Any, Tensor] = {}
        found: dict[Any, Tensor] = {}
        if self._start in self._shapes:
            arrived[self._start] = view(block, self._shapes[self._start])
        for node in self._order:
            gradient = arrived.pop(node, None)
            if gradient is None:
                continue
            if node in self._wanted:
                found[node] = gradient
            rule = self._rules[node]
            if not rule.operands:
                continue
            if len(rule.operands) == 1:
                target, result = self._pass_on(node, gradient, samples)
                targets, results = [target], [result]
            else:
                assert rule.apply is not None
                results = rule.apply(gradient, samples, None)
                targets = [node.next_functions[i][0] for i in rule.operands]
            for target, result in zip(targets, results, strict=True):
                if strict and result.shape != (*block.shape[:2], *self._shapes[target]):
                    raise Unknown
                # Operands of several dtypes are promoted; each one's gradient has its own.
                if result.dtype != self._dtypes[target]:
                    result = result.to(self._dtypes[target])
                before = arrived.get(target)
                arrived[target] = result if before is None else before + result
        return [found.get(edge.node) for edge in self._edges]

    def _pass_on(self, node: Any, gradient: Tensor, samples: slice) -> tuple[Any, Tensor]:
        """A gradient through a node of one operand and the elementwise ones behind it.

        Returns:
            the next node, and the gradient that arrives there.
        """
        rule = self._rules[node]
        target, factor, relu = self._through(node, samples)
        if rule.masked is not None:
            return target, rule.masked(gradient, samples, factor, relu)
        if rule.apply is not None:
            if self.by_kernels:
                return target, rule.apply(gradient, samples, factor)[0]
            gradient = rule.apply(gradient, samples, None)[0]
            # Before a factor makes up for what is missing.
            if gradient.shape[2:] != self._shapes[node.next_functions[rule.operands[0]][0]]:
                raise Unknown
        return target, times(gradient, factor) if relu is None else cut(gradient, factor, relu)

    def _through(self, node: Any, samples: slice) -> tuple[Any, Tensor | None, Tensor | None]:
        """The next node behind elementwise ones that nothing else meets, this one among them.

        Returns:
            the next node; what they multiply gradients by, [n or 1, ...] or None; on a device the
            result [n, ...] of a ReLU that is none of the factors, or None.
        """
        factor: Tensor | None = None
        relu: Tensor | None = None
        target = node
        while True:
            rule = self._rules[target]
            if rule.factor is None:
                if target is not node:
                    break
            elif relu is None and rule.relu is not None and not self.by_kernels:
                relu = rule.relu[samples]
            else:
                part = rule.factor(samples)
                factor = part if factor is None else factor * part
            target = target.next_functions[rule.operands[0]][0]
            if self._arrivals[target] > 1 or target in self._wanted:
                break
            if self._dtypes[target] != self._dtypes[node]:
                break
        return target, factor, relu


def _by_kernels(outputs: Tensor) -> bool:
    """Whether there are kernels for rows where the outputs lie."""
    return outputs.device.type == "cpu"
