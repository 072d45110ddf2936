"""Where a weight acts, read off the autograd graph.

Everything through which the outputs depend on a weight is an edge of the graph into the weight's
node. So the uses found here are all uses, whoever made them: the layer's own call, a replaced
forward(), ``F.linear(x, layer.weight)``, fused attention, or the backward graph of an inner
``autograd.grad``. A weight all of whose uses are linear calls has a block sum s x^T; one with any
other use has not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.entry_numbers import CHAIN, Numbers
from hesskern.graph.nodes import (
    axis_of,
    has_graph,
    in_order,
    kind,
    output_shape,
    passes_gradients,
    per_axis,
    product,
)

__all__ = ["Target", "WeightUse", "find_uses", "linear_call"]

_LOOKUPS = frozenset(("Embedding", "EmbeddingBag"))


@dataclass(frozen=True)
class Target:
    """A weight whose uses are wanted.

    Attributes:
        shape: of the tensor, or of one matrix of it.
        edges: where its gradient arrives: one for a leaf, one for each time that a weight was
            computed from other parameters.
        convolution: whether its calls are convolutions rather than matrix products.
        transposed: whether it is kept [d, m] rather than [m, d].
        bias: of the bias, where that belongs to the block.
        lookups: whether rows of it may also be looked up, as embeddings do, without being part of
            its block.
        expert: which matrix of a tensor [E, ...] of several is the weight; None where it is all.
    """

    shape: tuple[int, ...]
    edges: tuple[GradientEdge, ...]
    convolution: bool = False
    transposed: bool = False
    bias: GradientEdge | None = None
    lookups: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class WeightUse:
    """One linear call.

    Attributes:
        node: of the graph; the gradient of the call's result arrives at its output 0.
        x: [..., d] the rows, or [B, C, (H,) W], detached.
        outputs: [..., m] or [B, m, (H,) W], shape of the call's result.
        part: which rows of the weight the call used; None for all.
        settings: stride, padding, dilation and (groups,) of a convolution; None for a matrix
            product.
        window: which rows of the result those of ``x`` gave, where others are another weight's;
            None for all.
        expert: whether the weight is one of several in the same tensor.
    """

    node: Any
    x: Tensor
    outputs: tuple[int, ...]
    part: slice | None = None
    settings: tuple[tuple[int, ...], ...] | None = None
    window: slice | None = None
    expert: bool = False

    @property
    def rows(self) -> int:
        """How many rows the call has; of a convolution, how many images."""
        if self.window is not None:
            return int(self.window.stop - self.window.start)
        return self.outputs[0] if self.settings is not None else product(self.outputs[:-1])


@dataclass
class _Found:
    """Uses of one target.

    Attributes:
        uses: linear calls.
        other: what the weight does besides, or "".
        looked_up: whether rows of it are looked up as well, where the target allows that.
    """

    uses: list[WeightUse] = field(default_factory=list)
    other: str = ""
    looked_up: bool = False


def find_uses(
    alive: list[Any], targets: dict[str, Target], beside: Iterable[Any] = ()
) -> tuple[dict[str, list[WeightUse]], dict[str, str], set[str]]:
    """The calls through which the outputs depend on each weight.

    Args:
        alive: the nodes that the outputs depend on, by :func:`hesskern.graph.nodes.behind`.
        targets: by name.
        beside: nodes of results that the outputs may not depend on; the calls behind them are found
            as well, and other operations there do not matter.

    Returns:
        by name, the calls of every weight that acts in linear calls alone, in the order in which
        they were made; and for the others what they do besides. A weight on which the outputs do
        not depend is in neither. Then the names of those with calls that are looked up besides.

    Raises:
        RuntimeError: torch's, where an input was overwritten in place after it had been used.
    """
    living = set(alive)
    # The outputs mostly depend on all results.
    more = [node for node in beside if node not in living and has_graph(node)]
    order = in_order([*alive[-1:], *more]) if more else alive
    there = set(order) if more else living
    parents = _parents(order, there, targets)
    uses: dict[str, list[WeightUse]] = {}
    others: dict[str, str] = {}
    looked_up: set[str] = set()
    ends: dict[Any, list[int]] = {}
    for name, target in targets.items():
        found = _Uses(target, parents, there, living, ends).all()
        if found.other:
            others[name] = found.other
        elif found.uses:
            uses[name] = sorted(found.uses, key=lambda use: use.node._sequence_nr())
            if target.expert is not None:
                uses[name] = [replace(use, expert=True) for use in uses[name]]
            if found.looked_up:
                looked_up.add(name)
    return uses, others, looked_up


def _parents(
    order: list[Any], there: set[Any], targets: dict[str, Target]
) -> dict[Any, list[tuple[Any, int, int]]]:
    """What takes the weights, what they are computed from, or a view-like node above them.

    Args:
        order: the graph's nodes, each behind every node that it leads to.
        there: the same.
        targets: by name.

    Returns:
        by node, those that lead to it, with the operand and the number of the node's result.
    """
    nodes = [
        edge.node
        for target in targets.values()
        for edge in (*target.edges, target.bias)
        if edge is not None and edge.node in there
    ]
    wanted = set(in_order(nodes))
    parents: dict[Any, list[tuple[Any, int, int]]] = {}
    for node in order:
        takes = False
        for operand, (follower, number) in enumerate(node.next_functions):
            if follower in wanted:
                parents.setdefault(follower, []).append((node, operand, number))
                takes = True
        if takes and (kind(node) in CHAIN or passes_gradients(node)):
            wanted.add(node)
    return parents


class _Uses:
    """The search for one target."""

    def __init__(
        self,
        target: Target,
        parents: dict[Any, list[tuple[Any, int, int]]],
        there: set[Any],
        living: set[Any],
        ends: dict[Any, list[int]],
    ) -> None:
        self._target = target
        self._parents = parents
        self._there = there
        self._living = living
        # Where the groups of rows of grouped products end, read once from the device.
        self._ends = ends
        self._found = _Found()

    def all(self) -> _Found:
        edges = [edge for edge in self._target.edges if edge.node in self._there]
        heads = {edge.node for edge in edges}
        below = set(in_order(heads))
        for node in below - heads:
            for parent, _, _ in self._parents.get(node, ()):
                if parent not in below and parent in self._living:
                    # What the weight is computed from acts by itself as well.
                    self._other(parent)
        if len(heads) > 1 and any(head in in_order(heads - {head}) for head in heads):
            self._found.other = "is computed from itself"
        shape = self._target.shape
        for edge in edges:
            numbers = Numbers(shape)
            for parent, operand, number in self._parents.get(edge.node, ()):
                if number != edge.output_nr:
                    continue
                if self._target.expert is None:
                    self._follow(parent, operand, numbers)
                else:
                    self._follow_stack(parent, operand, False, self._target.expert)
        if self._target.bias is not None and not self._found.other:
            self._check_bias(self._target.bias)
        return self._found

    def _follow(self, node: Any, operand: int, numbers: Numbers) -> None:
        """Goes on to a node that takes what the numbers tell as an operand."""
        if kind(node) in CHAIN or passes_gradients(node):
            for result in range(len(node._input_metadata)):
                seen = numbers.through(node, result)
                if seen is None:
                    self._other(node)
                    return
                for parent, place, arriving in self._parents.get(node, ()):
                    if arriving == result:
                        self._follow(parent, place, seen)
            return
        use = linear_call(node, operand, numbers, self._target)
        if use is None:
            self._other(node)
        else:
            self._found.uses.append(use)

    def _follow_stack(self, node: Any, operand: int, flipped: bool, expert: int) -> None:
        """Goes on to a node that takes all matrices [E, ..], each of them transposed or not."""
        name = kind(node)
        parents = self._parents.get(node, ())
        flip = name == "Transpose" and {
            axis_of(node._saved_dim0, 3),
            axis_of(node._saved_dim1, 3),
        } == {1, 2}
        if flip or name in ("Alias", "Clone", "ToCopy") or passes_gradients(node):
            for parent, place, _ in parents:
                self._follow_stack(parent, place, flipped != flip, expert)
        elif name in ("Select", "Unbind") and axis_of(node._saved_dim, 3) == 0:
            if name == "Select" and int(node._saved_index) != expert:
                return
            wanted = 0 if name == "Select" else expert
            numbers = Numbers(self._target.shape, "transposed" if flipped else "same")
            for parent, place, arriving in parents:
                if arriving == wanted:
                    self._follow(parent, place, numbers)
        else:
            # Rows times columns [d, m].
            fits = operand == 1 and flipped != self._target.transposed
            use = None
            if fits and name == "GroupedMm":
                use = self._group(node, expert)
            elif fits and name == "Bmm":
                use = _expert_of_batch(node, expert)
            if use is None:
                self._other(node)
            elif use.rows:
                self._found.uses.append(use)

    def _group(self, node: Any, expert: int) -> WeightUse | None:
        """An expert's rows of x [S, d], which stand in groups."""
        x, shape = node._saved_self, output_shape(node)
        if x is None or x.dim() != 2 or shape is None or node._saved_offs is None:
            return None
        if node not in self._ends:
            self._ends[node] = node._saved_offs.tolist()
        ends = self._ends[node]
        begin, end = ends[expert - 1] if expert else 0, ends[expert]
        return WeightUse(
            node, x.detach()[begin:end], (end - begin, shape[-1]), window=slice(begin, end)
        )

    def _other(self, node: Any) -> None:
        """Notes an operation that is no linear call, where the outputs depend on it."""
        if node not in self._living:
            return
        if self._target.lookups and kind(node) in _LOOKUPS:
            self._found.looked_up = True
        else:
            self._found.other = f"acts through {kind(node)}, which is no linear call by it"

    def _check_bias(self, bias: GradientEdge) -> None:
        """The bias must be added to each of the weight's calls, and to nothing else."""
        calls = {use.node for use in self._found.uses}
        added: list[Any] = []
        pending = [(bias.node, bias.output_nr)]
        while pending:
            node, number = pending.pop()
            for parent, operand, arriving in self._parents.get(node, ()):
                if arriving != number:
                    continue
                if kind(parent) in ("Alias", "Clone", "ToCopy"):
                    pending.append((parent, 0))
                    continue
                call = _added_to(parent, operand, calls)
                if call is None:
                    self._found.other = f"has a bias that acts through {kind(parent)} as well"
                    return
                added.append(call)
        if self._found.uses and (len(added) != len(calls) or set(added) != calls):
            self._found.other = "is also called without its bias"
        if any(use.part is not None for use in self._found.uses):
            self._found.other = "is called in parts, with parts of its bias"


def _expert_of_batch(node: Any, expert: int) -> WeightUse | None:
    """An expert's rows of x [E, C, d]."""
    x, shape = node._saved_self, output_shape(node)
    if x is None or shape is None or x.layout != torch.strided:
        return None
    window = slice(expert * shape[1], (expert + 1) * shape[1])
    return WeightUse(node, x.detach()[expert], shape[1:], window=window)


def _added_to(node: Any, operand: int, calls: set[Any]) -> Any:
    """The call whose every row a node adds its operand, the bias [m], to; None if there is none."""
    name = kind(node)
    if node in calls and (name, operand) in (("Addmm", 0), ("Linear", 2), ("Convolution", 2)):
        return node if getattr(node, "_saved_beta", 1) == 1 else None
    if name != "Add" or getattr(node, "_saved_alpha", 1) != 1 or len(node.next_functions) != 2:
        return None
    other, number = node.next_functions[1 - operand]
    if other is None or output_shape(other, number) != output_shape(node):
        return None
    m = (output_shape(node) or (0,))[-1]
    while other not in calls and kind(other) in ("ReshapeAlias", "UnsafeView", "View", "ToCopy"):
        # Rows stay rows as long as their axis is the last one.
        if (output_shape(other) or (0,))[-1] != m:
            return None
        other = other.next_functions[0][0]
    fits = other in calls and kind(other) != "Convolution"
    return other if fits and (output_shape(other) or (0,))[-1] == m else None


def _columns(numbers: Numbers, target: Target) -> tuple[bool, slice | None]:
    """Whether an operand [(B,) d, m] holds rows of the weight [m, d], and which; None for all."""
    if len(target.shape) != 2:
        return False, None
    wanted = "same" if target.transposed else "transposed"
    if numbers.plain:
        return numbers.plain == wanted, None
    whole = torch.arange(product(target.shape), device="cpu").reshape(target.shape)
    if target.transposed:
        whole = whole.t()
    m, d = whole.shape
    found = numbers.tensor
    while found.dim() > 2:
        if not found.shape[0] or not bool((found == found[:1]).all()):
            return False, None
        found = found[0]
    if found.dim() != 2 or found.shape[0] != d or not found.numel():
        return False, None
    first = int(found[0, 0]) // (1 if target.transposed else d)
    count = found.shape[1]
    if first + count > m or not torch.equal(found.t(), whole[first : first + count]):
        return False, None
    return True, None if count == m else slice(first, first + count)


def _product_call(node: Any, operand: int, numbers: Numbers, target: Target) -> WeightUse | None:
    """x W^T as Addmm, Mm or Bmm."""
    name = kind(node)
    left = "_saved_mat1" if name == "Addmm" else "_saved_self"
    place = 2 if name == "Addmm" else 1
    if target.convolution or operand != place or getattr(node, "_saved_alpha", 1) != 1:
        return None
    fits, part = _columns(numbers, target)
    shape = output_shape(node)
    if not fits or shape is None:
        return None
    x = getattr(node, left)
    if x is None or x.layout != torch.strided:
        return None
    return WeightUse(node, x.detach(), shape, part)


def _linear_call(node: Any, operand: int, numbers: Numbers, target: Target) -> WeightUse | None:
    """x W^T as one operation."""
    if target.convolution or target.transposed or operand != 1 or numbers.plain != "same":
        return None
    shape = output_shape(node)
    x = getattr(node, "_saved_input", getattr(node, "_saved_self", None))
    if shape is None or x is None:
        return None
    return WeightUse(node, x.detach(), shape)


def _convolution_call(
    node: Any, operand: int, numbers: Numbers, target: Target
) -> WeightUse | None:
    if not target.convolution or operand != 1 or numbers.plain != "same":
        return None
    shape = output_shape(node)
    if node._saved_transposed or shape is None or node._saved_input is None:
        return None
    axes = len(target.shape) - 2
    settings = (
        per_axis(node._saved_stride, axes),
        per_axis(node._saved_padding, axes),
        per_axis(node._saved_dilation, axes),
        (int(node._saved_groups),),
    )
    return WeightUse(node, node._saved_input.detach(), shape, None, settings)


def linear_call(node: Any, operand: int, numbers: Numbers, target: Target) -> WeightUse | None:
    """A node that takes what the numbers tell as an operand, as a linear call; None if it is none.

    Raises:
        RuntimeError: torch's, where an input was overwritten in place after it had been used.
    """
    rule = _CALLS.get(kind(node))
    return None if rule is None else rule(node, operand, numbers, target)


_CALLS = {
    "Addmm": _product_call,
    "Bmm": _product_call,
    "Convolution": _convolution_call,
    "Linear": _linear_call,
    "Mm": _product_call,
}
