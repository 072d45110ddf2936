"""The state of an accumulator: whether it belongs to one, and its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hesskern.factors.layer_sums import LayerSums
from hesskern.passes.layers import LayerSpec
from hesskern.spill.rooms import Room

__all__ = ["FORMAT", "check_state", "diagonals_of_state", "layers_of_state"]

# 2 since output Hessians are summed over positions as well, 3 since draws are keyed by samples'
# numbers.
FORMAT = 3

_KEYS = ("format", "count", "batches", "reasons", "unfit", "draws", "settings", "layers")


def check_state(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no state, or that of an accumulator with other settings."""
    if state.get("format", FORMAT) != FORMAT:
        raise ValueError(f"state has format {state['format']!r}, this version {FORMAT}")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"state must come from state_dict(); it lacks {', '.join(missing)}")
    if state["settings"] != settings:
        raise ValueError(
            f"state was made with settings {state['settings']}, this one with {settings}"
        )


def layers_of_state(
    state: Mapping[str, Any],
    specs: Mapping[str, LayerSpec],
    large: Collection[str],
    room: Room,
) -> dict[str, LayerSums]:
    """The sums of every layer, copied.

    Args:
        state: of an accumulator.
        specs: of the layers that there may be.
        large: those of them with the diagonal of E[M] alone.
        room: where the sums go.

    Raises:
        ValueError: a layer is unknown or has another shape.
    """
    loaded = {name: LayerSums(**sums).copy(room.taken) for name, sums in state["layers"].items()}
    for name, sums in loaded.items():
        spec = specs.get(name)
        if spec is None:
            raise ValueError(f"state has a layer {name!r} that this accumulator lacks")
        if (sums.outputs.dim() == 1) != (name in large):
            raise ValueError(
                f"state has another output factor of layer {name!r} than this accumulator, "
                "whose max_outputs differs"
            )
        found = (sums.outputs.shape[0], sums.inputs.shape[-1])
        if found != (spec.outputs, spec.weight_inputs):
            raise ValueError(
                f"state has layer {name!r} with (m, d) = {found}, the model has "
                f"{(spec.outputs, spec.weight_inputs)}"
            )
    return loaded


def diagonals_of_state(
    state: Mapping[str, Any], parameters: Mapping[str, Any] | None, device: torch.device
) -> dict[str, Tensor]:
    """The diagonal of every parameter that has one, copied.

    Args:
        state: of an accumulator.
        parameters: that may have one; None: none does.
        device: where they go.

    Raises:
        ValueError: a parameter is unknown or has another shape.
    """
    diagonals = {
        name: total.to(device, copy=True) for name, total in state.get("diagonals", {}).items()
    }
    for name, total in diagonals.items():
        own = None if parameters is None else parameters.get(name)
        if own is None or own.shape != total.shape:
            raise ValueError(
                f"state has a diagonal {list(total.shape)} of a parameter {name!r}; the "
                f"model has {'no such one' if own is None else list(own.shape)}"
            )
    return diagonals
