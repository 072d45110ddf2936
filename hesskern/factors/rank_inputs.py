"""Sums of layers' inputs over all ranks of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hesskern.factors.input_sums import InputSums, SharedSums
from hesskern.parallel.ranks import RankError, Ranks
from hesskern.passes.layers import LayerSpec

__all__ = ["WholeInputs", "whole_inputs"]


@dataclass
class WholeInputs:
    """Sums over all ranks, the same bits on each.

    Attributes:
        count: weighted number of samples.
        sums: by layer.
        unfit: why layers are left out on one rank, and so on all.
        precisions: in words.
    """

    count: float
    sums: SharedSums
    unfit: dict[str, str]
    precisions: list[str]


def whole_inputs(
    ranks: Ranks,
    specs: Mapping[str, LayerSpec],
    own: WholeInputs,
    device: torch.device,
) -> WholeInputs:
    """Adds up what all ranks hold; this rank's sums become those of all.

    Layers have their sums in common where they have on every rank that has them.

    Args:
        ranks: all of which call this.
        specs: the layers, by name.
        own: of this rank's data alone.
        device: of the sums.

    Raises:
        RankError: a layer is summed in another dtype on another rank, or a rank has failed.
    """
    numbers: dict[int, int] = {}
    places = {
        name: [numbers.setdefault(id(sums), len(numbers)), str(sums.inputs.dtype)]
        for name, sums in own.sums.by_layer.items()
    }
    found = ranks.told("what the sums of inputs are of", [places, own.unfit, own.precisions])
    unfit: dict[str, str] = {}
    precisions: dict[str, None] = {}
    for _, reasons, words in found:
        unfit = {**reasons, **unfit}
        precisions.update(dict.fromkeys(words))
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in specs:
        everywhere = [one[0].get(name) for one in found]
        if name not in unfit and any(everywhere):
            _require_one_dtype(name, everywhere)
            key = tuple(None if place is None else place[0] for place in everywhere)
            groups.setdefault(key, []).append(name)
    whole, taken = SharedSums(), set()
    for names in groups.values():
        sums = own.sums.by_layer.get(names[0])
        if sums is None:
            dtype = next(one[0][names[0]][1] for one in found if names[0] in one[0])
            kind = getattr(torch, dtype.removeprefix("torch."))
            sums = InputSums.zeros(specs[names[0]], kind, device)
        elif id(sums) in taken:
            # Together here, and apart on another rank.
            sums = sums.copy()
        taken.add(id(sums))
        whole.by_layer.update(dict.fromkeys(names, sums))
    unique = list({id(sums): sums for sums in whole.by_layer.values()}.values())
    counts = [number for sums in unique for number in (sums.squares, sums.positions)]
    numbers_here = torch.tensor([own.count, *counts], dtype=torch.float64)
    tensors = [tensor for sums in unique for tensor in (sums.inputs, sums.column)]
    ranks.sum_([numbers_here, *tensors], [False, *([True, False] * len(unique))])
    count, *counts = numbers_here.tolist()
    for sums, squares, positions in zip(unique, counts[::2], counts[1::2], strict=True):
        sums.squares, sums.positions = squares, positions
    return WholeInputs(count, whole, unfit, list(precisions))


def _require_one_dtype(name: str, places: list[Any]) -> None:
    dtypes = {place[1]: rank for rank, place in reversed(list(enumerate(places))) if place}
    if len(dtypes) > 1:
        (first, a), (other, b) = list(dtypes.items())[:2]
        raise RankError(
            f"inputs of layer {name!r} are summed in {first} on rank {a} and in {other} on rank {b}"
        )
