"""A layer's factors from its sums."""

from __future__ import annotations

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
    inputs = _there(_inputs(spec, sums, count), room)
    outputs = _there(ops.mirror_(sums.outputs / _positions(sums)), room)
    images = None
    if sums.images is not None:
        images = tuple(_there(image / count, room) for image in sums.images)
    positions = float(sums.positions) / count
    return LayerFactors(spec, inputs, outputs, count, positions, images, tied)


def large_layer_means(
    spec: LayerSpec, sums: LayerSums, count: float, tied: str | None, room: Room
) -> LargeLayerFactors:
    """The same of a layer whose outputs' diagonal [m] alone was summed."""
    inputs, diagonal = _there(_inputs(spec, sums, count), room), sums.outputs / _positions(sums)
    return LargeLayerFactors(spec, inputs, diagonal, count, float(sums.positions) / count, tied)


def _there(mean: Tensor, room: Room) -> Tensor:
    """A mean that was made where its sum is."""
    return room.taken(mean) if room.place == "disk" else mean


def _positions(sums: LayerSums) -> float:
    # Samples without a position in this layer have none to be averaged over.
    return float(sums.positions) or 1.0


def _inputs(spec: LayerSpec, sums: LayerSums, count: float) -> Tensor:
    inputs = ops.mirror_(sums.inputs / count)
    if not spec.joint:
        return inputs
    return bordered(inputs, sums.column / count, float(sums.positions) / count)
