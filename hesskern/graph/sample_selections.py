"""Where samples are before selections of rows by numbers, and what puts rows somewhere."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hesskern.graph.nodes import kind, output_shape
from hesskern.graph.routed_rows import scattered
from hesskern.graph.sample_layout import elementwise
from hesskern.graph.sample_step import Axis, Step

__all__ = [
    "PUTS",
    "SELECTIONS",
    "concatenation",
    "gather",
    "index_add",
    "index_select",
    "indexed",
    "put",
    "scatter",
    "sliced",
    "split",
]


# Their second operand's rows are some of the result's.
PUTS = frozenset("IndexAdd IndexCopy IndexPut Scatter ScatterAdd".split())
# Their results are rows of a larger operand.
SELECTIONS = frozenset("Gather Index IndexSelect Slice Split SplitWithSizes".split())


def _numbers(step: Step, shape: tuple[int, ...]) -> list[tuple[int, Tensor]]:
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


def indexed(step: Step) -> Axis | None:
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


def _taken(step: Step, owners: Tensor, given: list[tuple[int, Tensor]]) -> Axis | None:
    """Along which axis the entries that were taken belong to one sample each."""
    for axis, numbers in given:
        there = scattered(owners, numbers.to(owners.device), step.source[axis])
        if there is not None:
            return Axis(axis, 1, there)
    return None


def put(step: Step) -> Axis | None:
    """Values [..] written or added where numbers say; what they are written to."""
    if step.operand == 0:
        return elementwise(step)
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
    return Axis(first, 1, step.owners[found[0].to(step.device)])


def index_select(step: Step) -> Axis | None:
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    if step.operand != 0 or len(step.source) != len(step.shape):
        return None
    if axis != here:
        return step.at(here)
    return _taken(step, step.owners, [(axis, step.node._saved_index.reshape(-1))])


def index_add(step: Step) -> Axis | None:
    """Rows of the second operand are added to, or written over, some of the first."""
    if step.operand == 0:
        return elementwise(step)
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    if step.operand != 1 or len(step.source) != len(step.shape):
        return None
    if axis != here:
        return step.at(here) if step.source[here] == step.shape[here] else None
    return Axis(axis, 1, step.owners[step.node._saved_index.reshape(-1).to(step.device)])


def _same_for_rows(index: Tensor, axis: int) -> Tensor | None:
    """[R] of numbers that are the same for all other axes than this one."""
    rows = index.movedim(axis, 0).reshape(index.shape[axis], -1)
    if not rows.numel() or not bool((rows == rows[:, :1]).all()):
        return None
    return rows[:, 0]


def gather(step: Step) -> Axis | None:
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    if step.operand != 0 or len(step.source) != len(step.shape):
        return None
    if axis != here:
        return step.at(here) if step.source[here] == step.shape[here] else None
    numbers = _same_for_rows(step.node._saved_index, axis)
    return None if numbers is None else _taken(step, step.owners, [(axis, numbers)])


def scatter(step: Step) -> Axis | None:
    if step.operand == 0:
        return elementwise(step)
    axis, here = step.dim(step.node._saved_dim), step.here.axis
    index = step.node._saved_index
    if step.operand != 1 or len(step.source) != len(step.shape):
        return None
    if tuple(index.shape) != step.source:
        return None
    if axis != here:
        return step.at(here) if step.source[here] == step.shape[here] else None
    numbers = _same_for_rows(index, axis)
    return None if numbers is None else Axis(axis, 1, step.owners[numbers.to(step.device)])


def concatenation(step: Step) -> Axis | None:
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
    return Axis(axis, 1, step.owners[begin : begin + step.source[axis]])


def sliced(step: Step) -> Axis | None:
    axis, node = step.dim(step.node._saved_dim), step.node
    if axis != step.here.axis or len(step.source) != len(step.shape):
        return elementwise(step) if len(step.source) == len(step.shape) else None
    begin = int(node._saved_start or 0)
    end = step.source[axis] if node._saved_end is None else int(node._saved_end)
    if begin < 0 or end < 0:
        return None
    return _cut(step, axis, slice(begin, min(end, step.source[axis]), int(node._saved_step)))


def split(step: Step) -> Axis | None:
    axis, node = step.dim(step.node._saved_dim), step.node
    if axis != step.here.axis or len(step.source) != len(step.shape):
        return elementwise(step) if len(step.source) == len(step.shape) else None
    if kind(node) == "Split":
        begin = step.number * int(node._saved_split_size)
    else:
        begin = sum(int(size) for size in node._saved_split_sizes[: step.number])
    return _cut(step, axis, slice(begin, begin + step.shape[axis]))


def _cut(step: Step, axis: int, part: slice) -> Axis | None:
    """The axis that a part of was taken of; nothing depends on the rest."""
    owners = torch.full((step.source[axis],), -1, device=step.device)
    if len(owners[part]) != step.shape[axis]:
        return None
    if len(owners) == len(step.owners) and part.step in (None, 1):
        # All of it.
        return step.at(axis)
    owners[part] = step.owners
    return Axis(axis, 1, owners)
