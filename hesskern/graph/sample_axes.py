"""Which rows of a layer's call belong to which sample, as the graph proves it.

A sample is an entry of the outputs' first axis. A row of a call belongs to sample n if outputs n,
and no others, depend on it. Every operation between the call and the outputs that is known to act
on samples alone says where in its operands they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hesskern.graph.nodes import axis_of, kind, output_shape, passes_gradients, product
from hesskern.graph.routed_rows import RoutedRows, merged_owners, regular, scattered

__all__ = ["Arrangement", "Proved", "prove"]


@dataclass(frozen=True)
class Arrangement:
    """Rows [outer, samples, inner], flattened: row r belongs to sample (r // inner) % samples.

    Attributes:
        outer, samples, inner: sizes.
    """

    outer: int
    samples: int
    inner: int

    @property
    def positions(self) -> int:
        """Rows of a sample."""
        return self.outer * self.inner

    def by_sample(self, rows: Tensor) -> Tensor:
        """[samples, positions, ...] of rows [outer samples inner, ...]; a view if it can be."""
        if self.outer == 1:
            return rows.reshape(self.samples, self.inner, *rows.shape[1:])
        shaped = rows.reshape(self.outer, self.samples, self.inner, *rows.shape[1:])
        return shaped.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Axis:
    """Samples within an axis of a tensor: index i of the axis belongs to (i // inner) % N.

    Attributes:
        owners: [size of the axis] int64, the sample that each index belongs to instead, where a
            selection by numbers has moved them; -1 for those on which no output depends.
    """

    axis: int
    inner: int
    owners: Tensor | None = None

    def same(self, other: _Axis) -> bool:
        """Whether both say the same, as far as the sizes alone tell."""
        whole = self.owners is None and other.owners is None
        return whole and (self.axis, self.inner) == (other.axis, other.inner)


@dataclass(frozen=True)
class Proved:
    """What the graph says.

    Attributes:
        arrangements: for every call, or None where operations are not known to keep samples apart.
        steady: whether what they do to the samples is the same in all batches. A selection by
            numbers, or a product with an input, may move other rows in the next one; a sum over
            samples shows where the gates behind it are open.
        selected: calls whose rows are taken from those of a larger tensor.
        placed: calls whose rows become some of those of a larger tensor, along the samples' axis.
    """

    arrangements: list[Arrangement | RoutedRows | None]
    steady: bool
    selected: frozenset[Any] = frozenset()
    placed: frozenset[Any] = frozenset()


def prove(
    outputs: Tensor,
    alive: list[Any],
    calls: list[Any],
    windows: list[slice | None] | None = None,
    trusted: Collection[Any] = (),
) -> Proved:
    """Arrangements that the graph proves.

    Args:
        outputs: [N, ...] with N >= 1.
        alive: the nodes that they depend on, by :func:`hesskern.graph.nodes.behind`.
        calls: nodes of the graph with one result each, rows in front: [..., m], or [B, m, ...] for
            convolutions.
        windows: per call, which of its rows are asked about; None for all.
        trusted: calls that are known to act on some rows of a larger tensor.

    Returns:
        :class:`Proved`.
    """
    if not alive:
        return Proved([None] * len(calls), True)
    proof = _Proof(outputs, alive, calls, trusted)
    arrangements = proof.arrangements(windows or [None] * len(calls))
    placed = frozenset(node for node in calls if proof.placed.get((node, 0)))
    return Proved(arrangements, proof.steady(), frozenset(proof.selected), placed)


class _Proof:
    def __init__(
        self, outputs: Tensor, alive: list[Any], calls: list[Any], trusted: Collection[Any]
    ) -> None:
        self._samples = len(outputs)
        self._calls = calls
        wanted = set(calls)
        needed: set[Any] = set()
        for node in alive:
            if node in wanted or any(f in needed for f, _ in node.next_functions):
                needed.add(node)
        self._needed = needed
        self._mixed = self._moved = False
        self._selections: set[Any] = set()
        self.selected: set[Any] = set()
        # By the same keys: whether what lies there goes into a larger tensor on all its ways.
        self.placed: dict[tuple[Any, int], bool] = {}
        self._trusted = trusted
        self._device = outputs.device
        # By node and number of its output: where samples are, or None for what is not known.
        self._axes: dict[tuple[Any, int], _Axis | None] = {
            (alive[-1], outputs.output_nr): _Axis(0, 1)
        }
        for node in reversed(alive):
            if node in needed:
                self._pass_on(node)

    def _pass_on(self, node: Any) -> None:
        numbers = [n for n in range(len(node._input_metadata)) if (node, n) in self._axes]
        for number in numbers:
            here = self._axes[node, number]
            for operand, (follower, arriving) in enumerate(node.next_functions):
                if follower not in self._needed:
                    continue
                there = None
                key = follower, arriving
                if here is not None:
                    there = self._step(node, number, operand, follower, arriving, here)
                placed = self._is_placed(node, number, operand, key, here)
                self.placed[key] = placed and self.placed.get(key, True)
                if key in self._axes:
                    there = self._merged(self._axes[key], there, output_shape(follower, arriving))
                self._axes[key] = there

    def _is_placed(
        self, node: Any, number: int, operand: int, key: tuple[Any, int], here: _Axis | None
    ) -> bool:
        """Whether an operand goes into a larger tensor, here or behind."""
        name = kind(node)
        if name in _PUTS and operand == 1:
            return True
        shape, source = output_shape(node, number), output_shape(*key)
        if here is None or shape is None or source is None:
            return False
        if name == "Cat" and len(shape) == len(source):
            axis = axis_of(node._saved_dim, len(shape))
            if axis == here.axis and shape[axis] > source[axis]:
                return True
        # Behind a selection lies the larger tensor.
        return node not in self._selections and self.placed.get((node, number), False)

    def _merged(
        self, one: _Axis | None, other: _Axis | None, shape: tuple[int, ...] | None
    ) -> _Axis | None:
        """What two operations say of the same tensor."""
        if one is None or other is None or shape is None:
            return None
        if one.same(other):
            return one
        for this, that in ((one, other), (other, one)):
            if this.owners is not None and bool((this.owners < 0).all()):
                return that
        if one.axis != other.axis:
            return None
        owners = merged_owners(
            *(_owners(axis, shape[one.axis], self._samples, self._device) for axis in (one, other))
        )
        return None if owners is None else self._tidy(_Axis(one.axis, 1, owners))

    def _tidy(self, there: _Axis) -> _Axis:
        """The same without numbers, where the samples are in order again."""
        if there.owners is None:
            return there
        self._moved = True
        inner = regular(there.owners, self._samples)
        return there if inner is None else _Axis(there.axis, inner)

    def _step(
        self, node: Any, number: int, operand: int, follower: Any, arriving: int, here: _Axis
    ) -> _Axis | None:
        shape, source = output_shape(node, number), output_shape(follower, arriving)
        if shape is None or source is None:
            return None
        name = "Alias" if passes_gradients(node) else kind(node)
        rule = _RULES.get(name)
        if rule is None:
            return None
        try:
            there = rule(
                _Step(node, operand, shape, source, here, self._samples, self._device, number)
            )
        except (AttributeError, IndexError, TypeError):
            # An operation of this name with other attributes than the rule knows.
            return None
        if there is not None and 0 <= there.axis < len(source):
            if there.owners is not None:
                if name in _SELECTIONS:
                    self._selections.add(node)
                if len(there.owners) == source[there.axis]:
                    return self._tidy(there)
                self._mixed = True
                return None
            period = there.inner * self._samples
            if period and source[there.axis] and source[there.axis] % period == 0:
                return there
        self._mixed = True
        return None

    def steady(self) -> bool:
        """Whether no operation moves or mixes rows by values."""
        if self._mixed or self._moved:
            return False
        return all(self._is_steady(node) for node in self._needed)

    def _is_steady(self, node: Any) -> bool:
        if passes_gradients(node) or node in self._calls:
            return True
        here = [
            self._axes[node, number]
            for number in range(len(node._input_metadata))
            if (node, number) in self._axes
        ]
        if here and None not in here and None not in self._after(node):
            return True
        if kind(node) in ("Add", "Sub"):
            shape = output_shape(node)
            return all(
                output_shape(follower, number) == shape
                for follower, number in node.next_functions
                if follower is not None
            )
        return kind(node) in _STEADY

    def _after(self, node: Any) -> list[_Axis | None]:
        """Where samples are in the operands that gradients go on to."""
        return [
            self._axes.get((follower, number))
            for follower, number in node.next_functions
            if follower in self._needed
        ]

    def arrangements(
        self, windows: Iterable[slice | None]
    ) -> list[Arrangement | RoutedRows | None]:
        return [
            self._arrangement(node) if window is None else self._part(node, window)
            for node, window in zip(self._calls, windows, strict=True)
        ]

    def _part(self, node: Any, window: slice) -> Arrangement | RoutedRows | None:
        """Of some rows of a call."""
        here, shape = self._axes.get((node, 0)), output_shape(node)
        if here is None or shape is None or not product(shape) or here.axis == len(shape) - 1:
            return None
        return self._routed(self._row_owners(here, shape)[window], True)

    def _row_owners(self, here: _Axis, shape: tuple[int, ...]) -> Tensor:
        """[R] of rows [..., m]."""
        owners = _owners(here, shape[here.axis], self._samples, self._device)
        owners = owners.repeat_interleave(product(shape[here.axis + 1 : -1]))
        return owners.repeat(product(shape[: here.axis]))

    def _selects(self, node: Any, rows: int) -> bool:
        """Whether the graph shows that a call's rows were taken from those of a larger tensor."""
        pending, done = [node], {node}
        while pending:
            for follower, number in pending.pop().next_functions:
                shape = None if follower is None else output_shape(follower, number)
                axis = self._axes.get((follower, number))
                if follower in done or axis is None or shape is None or shape[axis.axis] != rows:
                    continue
                if follower in self._selections:
                    return True
                done.add(follower)
                pending.append(follower)
        return False

    def _routed(self, owners: Tensor, selected: bool) -> Arrangement | RoutedRows | None:
        inner = regular(owners, self._samples)
        if inner is not None:
            return Arrangement(len(owners) // (inner * self._samples), self._samples, inner)
        if not len(owners) or bool((owners < 0).any()):
            return None
        rows = RoutedRows(owners, self._samples)
        if not selected and bool((rows.counts == rows.positions).all()):
            # As many rows of each sample: they may all have been moved to other samples.
            return None
        return rows

    def _arrangement(self, node: Any) -> Arrangement | RoutedRows | None:
        here, shape = self._axes.get((node, 0)), output_shape(node)
        if here is None or shape is None or not product(shape):
            return None
        by_rows = kind(node) != "Convolution" and here.axis < len(shape) - 1
        if self._selections and by_rows and self._selects(node, shape[here.axis]):
            self.selected.add(node)
        if here.owners is not None:
            if not by_rows:
                return None
            owners = self._row_owners(here, shape)
            return self._routed(owners, node in self._trusted or node in self.selected)
        if kind(node) == "Convolution":
            rows, inner = shape[0], here.inner
            if here.axis != 0:
                return None
        else:
            rows = product(shape[:-1])
            if here.axis == len(shape) - 1:
                return None
            inner = here.inner * product(shape[here.axis + 1 : -1])
        return Arrangement(rows // (inner * self._samples), self._samples, inner)


@dataclass(frozen=True)
class _Step:
    """From an operation's result to one of its operands.

    Attributes:
        node, operand: which.
        shape, source: of the result and of the operand.
        here: samples in the result.
        samples: N.
        device: of the outputs.
        number: of the result among those of the operation.
    """

    node: Any
    operand: int
    shape: tuple[int, ...]
    source: tuple[int, ...]
    here: _Axis
    samples: int
    device: torch.device
    number: int = 0

    def at(self, axis: int) -> _Axis:
        return replace(self.here, axis=axis)

    @property
    def owners(self) -> Tensor:
        """[size of the axis] of the result."""
        return _owners(self.here, self.shape[self.here.axis], self.samples, self.device)

    def dim(self, axis: int) -> int:
        """An axis of the result, counted from 0."""
        return axis_of(axis, len(self.shape))


_Rule = Callable[[_Step], "_Axis | None"]


def _owners(here: _Axis, size: int, samples: int, device: torch.device) -> Tensor:
    """[size] the sample that every index of an axis belongs to."""
    if here.owners is not None:
        return here.owners
    return torch.arange(size, device=device) // here.inner % samples


def _elementwise(step: _Step) -> _Axis | None:
    axis = step.here.axis - (len(step.shape) - len(step.source))
    if axis < 0 or step.source[axis] != step.shape[step.here.axis]:
        # One value for several samples.
        return None
    return step.at(axis)


def _reshaped(step: _Step) -> _Axis | None:
    if product(step.shape) != product(step.source) or not product(step.shape):
        return None
    if step.here.owners is not None:
        return _reshaped_owners(step, step.here.owners)
    inner = step.here.inner * product(step.shape[step.here.axis + 1 :])
    stride = 1
    found = None
    for axis in range(len(step.source) - 1, -1, -1):
        size = step.source[axis]
        if inner % stride == 0 and size % (inner // stride * step.samples) == 0 and size > 0:
            found = _Axis(axis, inner // stride)
            if step.samples > 1:
                break
            # Of one sample alone it may be any axis: the first is where others would be.
        stride *= size
    return found


def _reshaped_owners(step: _Step, owners: Tensor) -> _Axis | None:
    """An axis whose entries, several neighbours or equal parts at a time, have one owner each."""
    axis = step.here.axis
    inner = product(step.shape[axis + 1 :])
    block = len(owners) * inner

    def size(axis: int) -> int:
        return product(step.source[axis + 1 :])

    # Axes of the same entries first, then those of finer ones, then those that join some.
    axes = range(len(step.source))
    for there in sorted(axes, key=lambda i: 0 if size(i) == inner else 1 + (size(i) > inner)):
        within = size(there)
        if step.source[there] * within != block:
            continue
        if inner % within == 0:
            return _Axis(there, 1, owners.repeat_interleave(inner // within))
        if within % inner == 0:
            groups = owners.reshape(step.source[there], within // inner)
            joined = groups.amax(1)
            if bool(((groups == joined.unsqueeze(1)) | (groups < 0)).all()):
                return _Axis(there, 1, joined)
    return None


def _permuted(step: _Step) -> _Axis | None:
    name, dim = kind(step.node), len(step.shape)
    order = list(range(dim))
    if name == "Permute":
        order = [axis_of(axis, dim) for axis in step.node._saved_dims]
    else:
        a, b = 0, 1
        if name == "Transpose":
            a, b = axis_of(step.node._saved_dim0, dim), axis_of(step.node._saved_dim1, dim)
        elif dim != 2:
            return None
        order[a], order[b] = b, a
    return step.at(order[step.here.axis])


def _along(attribute: str) -> _Rule:
    """An operation that mixes the entries along one axis, and keeps that axis."""

    def rule(step: _Step) -> _Axis | None:
        if step.dim(getattr(step.node, attribute)) == step.here.axis:
            return None
        return _elementwise(step) if len(step.shape) == len(step.source) else None

    return rule


def _reduction(step: _Step) -> _Axis | None:
    """Sums, means, extremes over axes."""
    dim = len(step.source)
    if not hasattr(step.node, "_saved_dim") or step.operand != 0:
        return None
    axes = step.node._saved_dim
    axes = [axes] if isinstance(axes, int) else list(axes or ())
    gone = {axis_of(axis, dim) for axis in axes}
    if not gone:
        return None
    if step.node._saved_keepdim:
        return None if step.here.axis in gone else step.at(step.here.axis)
    kept = [axis for axis in range(dim) if axis not in gone]
    return step.at(kept[step.here.axis])


def _layer_norm(step: _Step) -> _Axis | None:
    trailing = len(step.node._saved_normalized_shape)
    if step.operand != 0 or step.here.axis >= len(step.shape) - trailing:
        return None
    return step.at(step.here.axis)


def _batch_norm(step: _Step) -> _Axis | None:
    """With its own statistics (instance norm, too), every channel is normalized by itself."""
    if step.operand != 0 or (step.node._saved_training and step.here.axis != 1):
        return None
    return step.at(step.here.axis)


def _first_axis(step: _Step) -> _Axis | None:
    """Convolutions, pools and their like act on every entry of axis 0 alone."""
    if step.operand != 0 or step.here.axis != 0 or step.shape[0] != step.source[0]:
        return None
    return step.at(0) if len(step.shape) == len(step.source) else None


def _images(step: _Step) -> _Axis | None:
    return _first_axis(step) if len(step.shape) in (4, 5) else None


def _row_product(step: _Step) -> _Axis | None:
    """Addmm and Mm: rows of the left operand, columns of the right one."""
    name = kind(step.node)
    left = 1 if name == "Addmm" else 0
    if name == "Addmm" and step.operand == 0:
        return _elementwise(step)
    if step.operand == left + step.here.axis:
        return step.at(step.here.axis)
    return None


def _batched_product(step: _Step) -> _Axis | None:
    if step.here.axis == 0 or step.operand == step.here.axis - 1:
        return step.at(step.here.axis)
    return None


def _added_batched_product(step: _Step) -> _Axis | None:
    if step.operand == 0:
        return _elementwise(step)
    return _batched_product(replace(step, operand=step.operand - 1))


def _numbers(step: _Step, shape: tuple[int, ...]) -> list[tuple[int, Tensor]]:
    """Numbers along axes of a tensor of this shape that stand next to each other, or nothing."""
    given: list[tuple[int, Tensor]] = []
    for axis, t in enumerate(step.node._saved_indices):
        if t is None:
            continue
        if t.dtype in (torch.bool, torch.uint8):
            # A mask is the numbers of its ones, along as many axes as it has.
            given += [(axis + i, numbers) for i, numbers in enumerate(t.nonzero(as_tuple=True))]
            if t.dim() > 1:
                # The axes behind count on.
                if any(other is not None for other in step.node._saved_indices[axis + 1 :]):
                    return []
                break
        else:
            given.append((axis, t))
    if not given or any(b[0] != a[0] + 1 for a, b in pairwise(given)):
        return []
    sizes = torch.broadcast_shapes(*(t.shape for _, t in given))
    return [(axis, t.expand(sizes) % shape[axis]) for axis, t in given]


def _indexed(step: _Step) -> _Axis | None:
    """A selection by numbers along axes next to each other."""
    given = _numbers(step, step.source)
    if not given:
        return None
    first, last, dim = given[0][0], given[-1][0], given[0][1].dim()
    if len(step.source) - (last - first + 1) + dim != len(step.shape):
        return None
    here = step.here.axis
    if not first <= here < first + dim:
        # Another axis than the selection's.
        return step.at(here if here < first else here - dim + (last - first + 1))
    around = [1] * dim
    around[here - first] = -1
    owners = step.owners.reshape(around).expand(given[0][1].shape).reshape(-1)
    return _taken(step, owners, [(axis, t.reshape(-1)) for axis, t in given])


def _taken(step: _Step, owners: Tensor, given: list[tuple[int, Tensor]]) -> _Axis | None:
    """Along which axis the entries that were taken belong to one sample each."""
    for axis, numbers in given:
        there = scattered(owners, numbers.to(owners.device), step.source[axis])
        if there is not None:
            return _Axis(axis, 1, there)
    return None


def _put(step: _Step) -> _Axis | None:
    """Values [..] written or added where numbers say; what they are written to."""
    if step.operand == 0:
        return _elementwise(step)
    given = _numbers(step, step.shape)
    here = step.here.axis
    found = [numbers for axis, numbers in given if axis == here]
    if step.operand != 1 or not found or found[0].dim() != 1:
        return None
    first, joined = given[0][0], len(given)
    if len(step.source) != len(step.shape) - joined + 1:
        return None
    if step.source[first] != len(found[0]):
        return None
    return _Axis(first, 1, step.owners[found[0].to(step.device)])


def _index_select(step: _Step) -> _Axis | None:
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    if step.operand != 0 or len(step.source) != len(step.shape):
        return None
    if axis != here:
        return step.at(here)
    return _taken(step, step.owners, [(axis, step.node._saved_index.reshape(-1))])


def _index_add(step: _Step) -> _Axis | None:
    """Rows of the second operand are added to, or written over, some of the first."""
    if step.operand == 0:
        return _elementwise(step)
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    if step.operand != 1 or len(step.source) != len(step.shape):
        return None
    if axis != here:
        return step.at(here) if step.source[here] == step.shape[here] else None
    return _Axis(axis, 1, step.owners[step.node._saved_index.reshape(-1).to(step.device)])


def _same_for_rows(index: Tensor, axis: int) -> Tensor | None:
    """[R] of numbers that are the same for all other axes than this one."""
    rows = index.movedim(axis, 0).reshape(index.shape[axis], -1)
    if not rows.numel() or not bool((rows == rows[:, :1]).all()):
        return None
    return rows[:, 0]


def _gather(step: _Step) -> _Axis | None:
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    if step.operand != 0 or len(step.source) != len(step.shape):
        return None
    if axis != here:
        return step.at(here) if step.source[here] == step.shape[here] else None
    numbers = _same_for_rows(step.node._saved_index, axis)
    return None if numbers is None else _taken(step, step.owners, [(axis, numbers)])


def _scatter(step: _Step) -> _Axis | None:
    if step.operand == 0:
        return _elementwise(step)
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    index = step.node._saved_index
    if step.operand != 1 or len(step.source) != len(step.shape):
        return None
    if tuple(index.shape) != step.source:
        return None
    if axis != here:
        return step.at(here) if step.source[here] == step.shape[here] else None
    numbers = _same_for_rows(index, axis)
    return None if numbers is None else _Axis(axis, 1, step.owners[numbers.to(step.device)])


def _grouped_rows(step: _Step) -> _Axis | None:
    """Rows [S, d] in groups, each times a matrix of its own."""
    if step.operand != 0 or len(step.shape) != 2 or len(step.source) != 2 or step.here.axis != 0:
        return None
    return step.at(0)


def _linear(step: _Step) -> _Axis | None:
    last = len(step.shape) - 1
    return step.at(step.here.axis) if step.operand == 0 and step.here.axis != last else None


def _attention(step: _Step) -> _Axis | None:
    """Scaled dot products [B, heads, L, e] of queries, keys and values."""
    axis = step.here.axis
    if step.operand > 2 or axis > 1 or len(step.shape) != 4 or len(step.source) != 4:
        return None
    return step.at(axis) if step.source[axis] == step.shape[axis] else None


def _concatenation(step: _Step) -> _Axis | None:
    axis = step.dim(step.node._saved_dim)
    if len(step.source) != len(step.shape):
        return None
    if axis != step.here.axis:
        return step.at(step.here.axis)
    shapes = [
        None if operand is None else output_shape(operand, number)
        for operand, number in step.node.next_functions
    ]
    before, behind = shapes[: step.operand], shapes[step.operand + 1 :]
    # The sizes of operands without gradients are not known.
    if None not in before:
        begin = sum(shape[axis] for shape in before if shape)
    elif None not in behind:
        begin = step.shape[axis] - step.source[axis] - sum(s[axis] for s in behind if s)
    else:
        return None
    return _Axis(axis, 1, step.owners[begin : begin + step.source[axis]])


def _slice(step: _Step) -> _Axis | None:
    axis, node = step.dim(step.node._saved_dim), step.node
    if axis != step.here.axis or len(step.source) != len(step.shape):
        return _elementwise(step) if len(step.source) == len(step.shape) else None
    begin = int(node._saved_start or 0)
    end = step.source[axis] if node._saved_end is None else int(node._saved_end)
    if begin < 0 or end < 0:
        return None
    return _cut(step, axis, slice(begin, min(end, step.source[axis]), int(node._saved_step)))


def _split(step: _Step) -> _Axis | None:
    axis, node = step.dim(step.node._saved_dim), step.node
    if axis != step.here.axis or len(step.source) != len(step.shape):
        return _elementwise(step) if len(step.source) == len(step.shape) else None
    if kind(node) == "Split":
        begin = step.number * int(node._saved_split_size)
    else:
        begin = sum(int(size) for size in node._saved_split_sizes[: step.number])
    return _cut(step, axis, slice(begin, begin + step.shape[axis]))


def _cut(step: _Step, axis: int, part: slice) -> _Axis | None:
    """The axis that a part of was taken of; nothing depends on the rest."""
    owners = torch.full((step.source[axis],), -1, device=step.device)
    if len(owners[part]) != step.shape[axis]:
        return None
    if len(owners) == len(step.owners) and part.step in (None, 1):
        # All of it.
        return step.at(axis)
    owners[part] = step.owners
    return _Axis(axis, 1, owners)


def _stack(step: _Step) -> _Axis | None:
    axis = step.dim(step.node._saved_dim)
    if axis == step.here.axis:
        return None
    return step.at(step.here.axis - int(axis < step.here.axis))


def _selection(step: _Step) -> _Axis | None:
    """Select and Unbind: an axis of the operand is gone."""
    axis = axis_of(step.node._saved_dim, len(step.source))
    return step.at(step.here.axis + int(axis <= step.here.axis))


def _padding(step: _Step) -> _Axis | None:
    padded = len(step.node._saved_pad) // 2
    if step.here.axis >= len(step.shape) - padded:
        return None
    return step.at(step.here.axis)


def _as_strided(step: _Step) -> _Axis | None:
    """What torch's pooling to one pixel makes of its mean: the same numbers."""
    node = step.node
    pixel = len(step.shape) == 4 and step.shape[2:] == (1, 1) and step.shape == step.source
    stride = tuple(int(size) for size in node._saved_stride)
    fresh = kind(node.next_functions[0][0]) == "Mean"
    if not pixel or not fresh or stride[:2] != (step.shape[1], 1):
        return None
    return step.at(step.here.axis) if not int(node._saved_storage_offset or 0) else None


def _over_axes(attribute: str) -> _Rule:
    """Flip and roll."""

    def rule(step: _Step) -> _Axis | None:
        axes = {step.dim(axis) for axis in getattr(step.node, attribute)}
        return None if not axes or step.here.axis in axes else step.at(step.here.axis)

    return rule


_RULES: dict[str, _Rule] = {
    "Addmm": _row_product,
    "AsStrided": _as_strided,
    "Baddbmm": _added_batched_product,
    "Bmm": _batched_product,
    "Cat": _concatenation,
    "ConstantPadNd": _padding,
    "Convolution": _first_axis,
    "CudnnBatchNorm": _batch_norm,
    "Cumsum": _along("_saved_dim"),
    "Expand": _elementwise,
    "Flip": _over_axes("_saved_dims"),
    "Glu": _along("_saved_dim"),
    "Gather": _gather,
    "GroupedMm": _grouped_rows,
    "Index": _indexed,
    "IndexAdd": _index_add,
    "IndexCopy": _index_add,
    "IndexPut": _put,
    "IndexSelect": _index_select,
    "Linear": _linear,
    "LogSoftmax": _along("_saved_dim"),
    "Mm": _row_product,
    "NativeBatchNorm": _batch_norm,
    "NativeGroupNorm": _first_axis,
    "NativeLayerNorm": _layer_norm,
    "Roll": _over_axes("_saved_dims"),
    "ScaledDotProductEfficientAttention": _attention,
    "ScaledDotProductFlashAttention": _attention,
    "ScaledDotProductFlashAttentionForCpu": _attention,
    "SafeSoftmax": _along("_saved_dim"),
    "Scatter": _scatter,
    "ScatterAdd": _scatter,
    "Select": _selection,
    "Slice": _slice,
    "Softmax": _along("_saved_dim"),
    "Sort": _along("_saved_dim"),
    "Split": _split,
    "SplitWithSizes": _split,
    "Stack": _stack,
    "Topk": _along("_saved_dim"),
    "Unbind": _selection,
}
# Their second operand's rows are some of the result's.
_PUTS = frozenset("IndexAdd IndexCopy IndexPut Scatter ScatterAdd".split())
# Their results are rows of a larger operand.
_SELECTIONS = frozenset("Gather Index IndexSelect Slice Split SplitWithSizes".split())
_RULES.update(dict.fromkeys(("Permute", "T", "Transpose"), _permuted))
_RULES.update(dict.fromkeys("ReshapeAlias Squeeze UnsafeView Unsqueeze View".split(), _reshaped))
_RULES.update(
    dict.fromkeys(
        (
            "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Norm Prod Std"
            " Sum Var"
        ).split(),
        _reduction,
    )
)
_RULES.update(
    dict.fromkeys(
        (
            "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices MaxUnpool2D"
            " ReflectionPad2D ReplicationPad2D UpsampleBicubic2D UpsampleBilinear2D"
            " UpsampleNearest2D"
        ).split(),
        _images,
    )
)
_RULES.update(
    dict.fromkeys(
        (
            "Abs Add Addcdiv Addcmul Alias Celu Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp"
            " Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid"
            " MaskedFill Maximum Minimum Mish Mul Neg Pow PreluKernel Reciprocal Relu Rsqrt Rsub"
            " Sigmoid Silu Sin Softplus Softshrink Sqrt Sub Tanh Threshold ToCopy Where"
        ).split(),
        _elementwise,
    )
)

# Where samples are not known to be, these cannot move or mix rows in another way in another batch
# of the same shapes. All others can: by a mask, a gate, an adjacency, a list of numbers.
_STEADY = frozenset(
    (
        "Abs Alias AsStrided Celu Clamp Clone Convolution CudnnRnn Elu Exp Expand Gelu Hardsigmoid"
        " Hardswish Hardtanh LeakyRelu LogSigmoid Mean Mish MkldnnRnnLayer NativeLayerNorm Neg"
        " Permute PixelShuffle PixelUnshuffle Relu ReshapeAlias Select Sigmoid Silu Slice Softplus"
        " Split SplitWithSizes Squeeze Stack T Tanh ThnnFusedGruCell ThnnFusedLstmCell ToCopy"
        " Transpose Trilinear Unbind Unfold UnsafeView Unsqueeze View"
    ).split()
)
