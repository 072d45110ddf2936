"""Which rows of a layer's call belong to which sample, as the graph proves it.

A sample is an entry of the outputs' first axis. A row of a call belongs to sample n if outputs n,
and no others, depend on it. Every operation between the call and the outputs that is known to act
on samples alone says where in its operands they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesskern.graph.nodes import axis_of, kind, output_shape, passes_gradients, product

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


@dataclass(frozen=True)
class _Axis:
    """Samples within an axis of a tensor: index i of the axis belongs to (i // inner) % N."""

    axis: int
    inner: int


@dataclass(frozen=True)
class Proved:
    """What the graph says.

    Attributes:
        arrangements: for every call, or None where operations are not known to keep samples apart.
        steady: whether what they do to the samples is the same in all batches. A selection by
            numbers, or a product with an input, may move other rows in the next one; a sum over
            samples shows where the gates behind it are open.
    """

    arrangements: list[Arrangement | None]
    steady: bool


def prove(outputs: Tensor, alive: list[Any], calls: list[Any]) -> Proved:
    """Arrangements that the graph proves.

    Args:
        outputs: [N, ...] with N >= 1.
        alive: the nodes that they depend on, by :func:`hesskern.graph.nodes.behind`.
        calls: nodes of the graph with one result each, rows in front: [..., m], or [B, m, ...] for
            convolutions.

    Returns:
        :class:`Proved`.
    """
    if not alive:
        return Proved([None] * len(calls), True)
    proof = _Proof(outputs, alive, calls)
    return Proved(proof.arrangements(), proof.steady())


class _Proof:
    def __init__(self, outputs: Tensor, alive: list[Any], calls: list[Any]) -> None:
        self._samples = len(outputs)
        self._calls = calls
        wanted = set(calls)
        needed: set[Any] = set()
        for node in alive:
            if node in wanted or any(f in needed for f, _ in node.next_functions):
                needed.add(node)
        self._needed = needed
        self._mixed = False
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
                if here is not None:
                    there = self._step(node, number, operand, follower, arriving, here)
                key = follower, arriving
                if key in self._axes and self._axes[key] != there:
                    there = None
                self._axes[key] = there

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
            there = rule(_Step(node, operand, shape, source, here, self._samples))
        except (AttributeError, IndexError, TypeError):
            # An operation of this name with other attributes than the rule knows.
            return None
        if there is not None and 0 <= there.axis < len(source):
            period = there.inner * self._samples
            if period and source[there.axis] and source[there.axis] % period == 0:
                return there
        self._mixed = True
        return None

    def steady(self) -> bool:
        """Whether no operation moves or mixes rows by values."""
        return not self._mixed and all(self._is_steady(node) for node in self._needed)

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

    def arrangements(self) -> list[Arrangement | None]:
        return [self._arrangement(node) for node in self._calls]

    def _arrangement(self, node: Any) -> Arrangement | None:
        here, shape = self._axes.get((node, 0)), output_shape(node)
        if here is None or shape is None or not product(shape):
            return None
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
    """

    node: Any
    operand: int
    shape: tuple[int, ...]
    source: tuple[int, ...]
    here: _Axis
    samples: int

    def at(self, axis: int) -> _Axis:
        return _Axis(axis, self.here.inner)

    def dim(self, axis: int) -> int:
        """An axis of the result, counted from 0."""
        return axis_of(axis, len(self.shape))


_Rule = Callable[[_Step], "_Axis | None"]


def _elementwise(step: _Step) -> _Axis | None:
    axis = step.here.axis - (len(step.shape) - len(step.source))
    if axis < 0 or step.source[axis] != step.shape[step.here.axis]:
        # One value for several samples.
        return None
    return step.at(axis)


def _reshaped(step: _Step) -> _Axis | None:
    if product(step.shape) != product(step.source) or not product(step.shape):
        return None
    inner = step.here.inner * product(step.shape[step.here.axis + 1 :])
    stride = 1
    for axis in range(len(step.source) - 1, -1, -1):
        size = step.source[axis]
        if inner % stride == 0 and size % (inner // stride * step.samples) == 0 and size > 0:
            return _Axis(axis, inner // stride)
        stride *= size
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


def _indexed(step: _Step) -> _Axis | None:
    """One list of numbers along an axis that is not the samples'."""
    given = [(axis, t) for axis, t in enumerate(step.node._saved_indices) if t is not None]
    if len(given) != 1 or len(step.shape) != len(step.source):
        return None
    axis, numbers = given[0]
    if axis == step.here.axis or numbers.dim() != 1 or numbers.dtype == torch.bool:
        return None
    return step.at(step.here.axis)


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
    if axis == step.here.axis or len(step.source) != len(step.shape):
        return None
    return step.at(step.here.axis)


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
    "Index": _indexed,
    "IndexSelect": _along("_saved_dim"),
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
    "Select": _selection,
    "Slice": _along("_saved_dim"),
    "Softmax": _along("_saved_dim"),
    "Split": _along("_saved_dim"),
    "SplitWithSizes": _along("_saved_dim"),
    "Stack": _stack,
    "Unbind": _selection,
}
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
