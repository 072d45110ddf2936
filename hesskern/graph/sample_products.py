"""Where samples are before products, norms, convolutions and attention."""

from __future__ import annotations

from dataclasses import replace

from hesskern.graph.nodes import kind
from hesskern.graph.sample_layout import elementwise
from hesskern.graph.sample_step import Axis, Step

__all__ = [
    "added_batched_product",
    "attention",
    "batch_norm",
    "batched_product",
    "first_axis",
    "grouped_rows",
    "images",
    "layer_norm",
    "linear",
    "row_product",
]


def layer_norm(step: Step) -> Axis | None:
    trailing = len(step.node._saved_normalized_shape)
    if step.operand != 0 or step.here.axis >= len(step.shape) - trailing:
        return None
    return step.at(step.here.axis)


def batch_norm(step: Step) -> Axis | None:
    """With its own statistics (instance norm, too), every channel is normalized by itself."""
    if step.operand != 0 or (step.node._saved_training and step.here.axis != 1):
        return None
    return step.at(step.here.axis)


def first_axis(step: Step) -> Axis | None:
    """Convolutions, pools and their like act on every entry of axis 0 alone."""
    if step.operand != 0 or step.here.axis != 0 or step.shape[0] != step.source[0]:
        return None
    return step.at(0) if len(step.shape) == len(step.source) else None


def images(step: Step) -> Axis | None:
    return first_axis(step) if len(step.shape) in (4, 5) else None


def row_product(step: Step) -> Axis | None:
    """Addmm and Mm: rows of the left operand, columns of the right one."""
    name = kind(step.node)
    left = 1 if name == "Addmm" else 0
    if name == "Addmm" and step.operand == 0:
        return elementwise(step)
    if step.operand == left + step.here.axis:
        return step.at(step.here.axis)
    return None


def batched_product(step: Step) -> Axis | None:
    if step.here.axis == 0 or step.operand == step.here.axis - 1:
        return step.at(step.here.axis)
    return None


def added_batched_product(step: Step) -> Axis | None:
    if step.operand == 0:
        return elementwise(step)
    return batched_product(replace(step, operand=step.operand - 1))


def grouped_rows(step: Step) -> Axis | None:
    """Rows [S, d] in groups, each times a matrix of its own."""
    if step.operand != 0 or len(step.shape) != 2 or len(step.source) != 2 or step.here.axis != 0:
        return None
    return step.at(0)


def linear(step: Step) -> Axis | None:
    last = len(step.shape) - 1
    return step.at(step.here.axis) if step.operand == 0 and step.here.axis != last else None


def attention(step: Step) -> Axis | None:
    """Scaled dot products [B, heads, L, e] of queries, keys and values."""
    axis = step.here.axis
    if step.operand > 2 or axis > 1 or len(step.shape) != 4 or len(step.source) != 4:
        return None
    return step.at(axis) if step.source[axis] == step.shape[axis] else None
