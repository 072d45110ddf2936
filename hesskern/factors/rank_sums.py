"""Running sums of all ranks of a group: what one accumulator would hold that had seen all data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hesskern.factors.layer_sums import LayerSums
from hesskern.graph.evidence import Evidence
from hesskern.parallel.ranks import RankError, Ranks
from hesskern.passes.layers import LayerSpec
from hesskern.spill.rooms import Room

__all__ = ["Told", "WholeSums", "whole_sums"]


@dataclass
class Told:
    """What an accumulator knows besides numbers.

    Attributes:
        reasons, unfit, tied: by layer.
        checked: how it is known which rows belong to which samples, by layer.
        precisions: in words, in the order of their first batches.
        unfit_diagonals, diagonal_reasons: by parameter.
    """

    reasons: dict[str, str]
    unfit: dict[str, str]
    tied: dict[str, str]
    checked: dict[str, str]
    precisions: list[str]
    unfit_diagonals: dict[str, str]
    diagonal_reasons: dict[str, str]

    @staticmethod
    def merged(parts: Iterable[Told]) -> Told:
        """What is known of all data; of two reasons for one layer, the earlier rank's."""
        found = Told({}, {}, {}, {}, [], {}, {})
        evidence = Evidence()
        for part in parts:
            for field in fields(Told):
                mine, theirs = getattr(found, field.name), getattr(part, field.name)
                if isinstance(theirs, dict):
                    setattr(found, field.name, {**theirs, **mine})
                else:
                    mine += [word for word in theirs if word not in mine]
            for name, how in part.checked.items():
                evidence.note(name, [how])
        found.checked = evidence.found
        return found


@dataclass
class WholeSums:
    """Sums over all ranks, the same bits on each.

    Attributes:
        count: weighted number of samples.
        layers, diagonals: sums by layer and by parameter.
        told: what is known besides.
    """

    count: float
    layers: dict[str, LayerSums]
    diagonals: dict[str, Tensor]
    told: Told


def whole_sums(
    ranks: Ranks,
    specs: Mapping[str, LayerSpec],
    count: float,
    layers: dict[str, LayerSums],
    diagonals: dict[str, Tensor],
    told: Told,
    parameters: Mapping[str, Any],
    room: Room,
    *,
    last: bool,
) -> WholeSums:
    """Adds up what all ranks hold. A layer that is unfit on one of them is left out.

    Args:
        ranks: all of which call this.
        specs: the layers, by name.
        count: weighted number of this rank's samples.
        layers, diagonals: this rank's sums.
        told: what is known here besides.
        parameters: with ``shape``, by name, of which there may be diagonals.
        room: where the layers' sums are.
        last: whether this rank's sums are not needed any more: they become those of all.

    Raises:
        RankError: a layer is summed in another dtype on another rank, or a rank has failed.
    """
    layouts = {name: _layout(sums) for name, sums in layers.items()}
    kinds = {name: str(total.dtype) for name, total in diagonals.items()}
    found = ranks.told("what the sums are of", [vars(told), layouts, kinds])
    whole = Told.merged(Told(**one[0]) for one in found)
    layer_layouts = _alike("layer", [one[1] for one in found], whole.unfit)
    dtypes = _alike("parameter", [one[2] for one in found], whole.unfit_diagonals)
    summed = {
        name: _own(layers.get(name), layer_layouts[name], room, last)
        for name in specs
        if name in layer_layouts
    }
    own = Room(None, room.device)
    blocks = {
        name: _tensor(diagonals.get(name), parameters[name].shape, dtypes[name], own, last)
        for name in parameters
        if name in dtypes
    }
    positions = [sums.positions for sums in summed.values()]
    numbers = torch.tensor([count, *positions], dtype=torch.float64)
    tensors, upper = [numbers, *blocks.values()], [False] * (1 + len(blocks))
    for sums in summed.values():
        tensors += [sums.inputs, sums.outputs, sums.column, *(sums.images or ())]
        upper += [True, sums.outputs.dim() == 2, False, *(False for _ in sums.images or ())]
    ranks.sum_(tensors, upper)
    total, *positions = numbers.tolist()
    for sums, number in zip(summed.values(), positions, strict=True):
        sums.positions = number
    return WholeSums(total, summed, blocks, whole)


def _layout(sums: LayerSums) -> dict[str, Any]:
    return {
        "dtype": str(sums.inputs.dtype),
        "inputs": list(sums.inputs.shape),
        "outputs": list(sums.outputs.shape),
        "column": list(sums.column.shape),
        "images": None if sums.images is None else [list(image.shape) for image in sums.images],
    }


def _alike(what: str, found: list[dict[str, Any]], unfit: Mapping[str, str]) -> dict[str, Any]:
    """By name what all ranks have that have it, without those that one of them cannot have."""
    known: dict[str, Any] = {}
    owners: dict[str, int] = {}
    for rank, layouts in enumerate(found):
        for name, layout in layouts.items():
            if name in unfit:
                continue
            if name not in known:
                known[name], owners[name] = layout, rank
                continue
            mine = known[name]
            if isinstance(layout, dict) and layout["images"] != mine["images"]:
                # As in one pass over inputs of several shapes.
                mine = known[name] = {**mine, "images": None}
                layout = {**layout, "images": None}
            if layout != mine:
                raise RankError(
                    f"{what} {name!r} is summed as {_words(mine)} on rank {owners[name]} and as "
                    f"{_words(layout)} on rank {rank}"
                )
    return known


def _words(layout: Any) -> str:
    if not isinstance(layout, dict):
        return str(layout)
    return f"{layout['dtype']} {layout['inputs']} and {layout['outputs']}"


def _own(sums: LayerSums | None, layout: dict[str, Any], room: Room, last: bool) -> LayerSums:
    """This rank's sums of a layer, zero where it was never reached here."""
    shapes = layout["images"]
    images: list[Any] = [None] * len(shapes or ())
    if sums is not None and shapes is not None and sums.images is not None:
        images = list(sums.images)

    def tensor(own: Tensor | None, shape: list[int]) -> Tensor:
        return _tensor(own, shape, layout["dtype"], room, last)

    return LayerSums(
        tensor(None if sums is None else sums.inputs, layout["inputs"]),
        tensor(None if sums is None else sums.outputs, layout["outputs"]),
        tensor(None if sums is None else sums.column, layout["column"]),
        None if shapes is None else [tensor(i, s) for i, s in zip(images, shapes, strict=True)],
        0.0 if sums is None else float(sums.positions),
    )


def _tensor(own: Tensor | None, shape: Iterable[int], dtype: str, room: Room, last: bool) -> Tensor:
    if own is None:
        return room.zeros([*shape], getattr(torch, dtype.removeprefix("torch.")))
    return own if last else room.copied(own)
