"""Where samples are before operations that move, join or drop whole axes, or act entry by entry."""

from __future__ import annotations

from torch import Tensor

from hesskern.graph.nodes import axis_of, kind, product
from hesskern.graph.sample_step import Axis, Rule, Step

__all__ = [
    "along",
    "as_strided",
    "elementwise",
    "over_axes",
    "padding",
    "permuted",
    "reduction",
    "reshaped",
    "selected_axis",
    "stack",
]


def elementwise(step: Step) -> Axis | None:
    axis = step.here.axis - (len(step.shape) - len(step.source))
    if axis < 0 or step.source[axis] != step.shape[step.here.axis]:
        # One value for several samples.
        return None
    return step.at(axis)


def reshaped(step: Step) -> Axis | None:
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
            found = Axis(axis, inner // stride)
            if step.samples > 1:
                break
            # Of one sample alone it may be any axis: the first is where others would be.
        stride *= size
    return found


def _reshaped_owners(step: Step, owners: Tensor) -> Axis | None:
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
            return Axis(there, 1, owners.repeat_interleave(inner // within))
        if within % inner == 0:
            groups = owners.reshape(step.source[there], within // inner)
            joined = groups.amax(1)
            if bool(((groups == joined.unsqueeze(1)) | (groups < 0)).all()):
                return Axis(there, 1, joined)
    return None


def permuted(step: Step) -> Axis | None:
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


def along(attribute: str) -> Rule:
    """An operation that mixes the entries along one axis, and keeps that axis."""

    def rule(step: Step) -> Axis | None:
        if step.dim(getattr(step.node, attribute)) == step.here.axis:
            return None
        return elementwise(step) if len(step.shape) == len(step.source) else None

    return rule


def reduction(step: Step) -> Axis | None:
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


def stack(step: Step) -> Axis | None:
    axis = step.dim(step.node._saved_dim)
    if axis == step.here.axis:
        return None
    return step.at(step.here.axis - int(axis < step.here.axis))


def selected_axis(step: Step) -> Axis | None:
    """Select and Unbind: an axis of the operand is gone."""
    axis = axis_of(step.node._saved_dim, len(step.source))
    return step.at(step.here.axis + int(axis <= step.here.axis))


def padding(step: Step) -> Axis | None:
    padded = len(step.node._saved_pad) // 2
    if step.here.axis >= len(step.shape) - padded:
        return None
    return step.at(step.here.axis)


def as_strided(step: Step) -> Axis | None:
    """What torch's pooling to one pixel makes of its mean: the same numbers."""
    node = step.node
    pixel = len(step.shape) == 4 and step.shape[2:] == (1, 1) and step.shape == step.source
    stride = tuple(int(size) for size in node._saved_stride)
    fresh = kind(node.next_functions[0][0]) == "Mean"
    if not pixel or not fresh or stride[:2] != (step.shape[1], 1):
        return None
    return step.at(step.here.axis) if not int(node._saved_storage_offset or 0) else None


def over_axes(attribute: str) -> Rule:
    """Flip and roll."""

    def rule(step: Step) -> Axis | None:
        axes = {step.dim(axis) for axis in getattr(step.node, attribute)}
        return None if not axes or step.here.axis in axes else step.at(step.here.axis)

    return rule
