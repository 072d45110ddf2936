"""A layer's factors from its sums."""

from __future__ import annotations

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.large_layers import LargeLayerFactors
from hesskern.factors.layer_sums import LayerSums, bordered
from hesskern.factors.result import LayerFactors
from hesskern.passes.layers import LayerSpec
from hesskern.spill.rooms import Room

__all__ = ["large_layer_means", "layer_means"]


def layer_means(
    spec: LayerSpec, sums: LayerSums, count: float, tied: str | None, room: Room
) -> LayerFactors:
    """Means of a layer's sums.

    Args:
        spec: the layer.
        sums: over all samples.
        count: weighted number of samples.
        tied: the embedding that shares the weight, or None.
        room: where the means go.
    """
    inputs = _inputs(spec, sums, count, room)
    outputs = ops.mirror_(_mean(sums.outputs, _positions(sums), room))
    images = None
    if sums.images is not None:
        images = tuple(_mean(image, count, room) for image in sums.images)
    positions = float(sums.positions) / count
    return LayerFactors(spec, inputs, outputs, count, positions, images, tied)


def large_layer_means(
    spec: LayerSpec, sums: LayerSums, count: float, tied: str | None, room: Room
) -> LargeLayerFactors:
    """The same of a layer whose outputs' diagonal [m] alone was summed."""
    inputs = _inputs(spec, sums, count, room)
    diagonal = _mean(sums.outputs, _positions(sums), room)
    return LargeLayerFactors(spec, inputs, diagonal, count, float(sums.positions) / count, tied)


def _mean(total: Tensor, number: float, room: Room) -> Tensor:
    """A sum by a number, made where it stays: what would lie in between leaves holes in memory."""
    if room.place != "disk":
        return total / number
    return torch.div(total, number, out=room.zeros(total.shape, total.dtype))


def _positions(sums: LayerSums) -> float:
    # Samples without a position in this layer have none to be averaged over.
    return float(sums.positions) or 1.0


def _inputs(spec: LayerSpec, sums: LayerSums, count: float, room: Room) -> Tensor:
    inputs = ops.mirror_(_mean(sums.inputs, count, room))
    if not spec.joint:
        return inputs
    out = None
    if room.place == "disk":
        d = inputs.shape[-1] + 1
        out = room.zeros((*inputs.shape[:-2], d, d), inputs.dtype)
    return bordered(inputs, sums.column / count, float(sums.positions) / count, out)
