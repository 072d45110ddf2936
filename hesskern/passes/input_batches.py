"""Data of which only the models' inputs are wanted: what they are in an element of any form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hesskern.passes.batches import Parts

__all__ = ["inputs_alone"]


def inputs_alone(model: nn.Module) -> Callable[[Any, int], Parts]:
    """Takes elements of the data apart for a model that gets no labels.

    An element is a tensor, a dict, or a tuple (inputs,), (inputs, targets) or (inputs, targets,
    weight [N]). Labels are left out of dicts: with them a model computes a loss that nobody wants.
    An encoder-decoder model of transformers gets the decoder's inputs that it would make of them.
    They stay where forward() cannot do without. A dict's ``attention_mask`` is the batch's mask.
    """
    needs_labels = _needs_labels(model)

    def split(element: Any, index: int) -> Parts:
        """The parts of one element; a TypeError where it is none of those."""
        weight = None
        if isinstance(element, (tuple, list)) and len(element) in (1, 2, 3):
            weight = element[2] if len(element) == 3 else None
            inputs = element[0]
        elif isinstance(element, (Tensor, Mapping)):
            inputs = element
        else:
            found = type(element).__name__
            if isinstance(element, (tuple, list)):
                found = f"{found} of {len(element)}"
            raise TypeError(
                "data must yield tensors, dicts, or tuples (inputs,), (inputs, targets) or "
                f"(inputs, targets, weight); batch {index} is a {found}"
            )
        mask = None
        if isinstance(inputs, Mapping):
            mask = inputs.get("attention_mask")
            inputs = dict(inputs) if needs_labels else _without_labels(model, inputs)
        return Parts(inputs, None, weight, mask)

    return split


def _without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in inputs.items() if key != "labels"}
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    made = kept.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
    if "labels" in inputs and callable(shift) and not made:
        kept["decoder_input_ids"] = shift(labels=inputs["labels"])
    return kept


def _needs_labels(model: nn.Module) -> bool:
    """Whether forward() has labels among its arguments and no default for them."""
    try:
        argument = inspect.signature(model.forward).parameters.get("labels")
    except (TypeError, ValueError):
        return False
    return argument is not None and argument.default is inspect.Parameter.empty
