"""Data of which only the models' inputs are wanted: what they are in an element of any form."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hesskern.passes.batches import check_iterable

__all__ = ["InputsOnly"]


class InputsOnly:
    """The data as (inputs, None) or (inputs, None, weight [N]), for a model that gets no labels.

    Labels are left out of dicts: with them a model computes a loss that nobody wants. An
    encoder-decoder model of transformers gets the decoder's inputs that it would make of them. They
    stay where forward() cannot do without.

    Args:
        model: for which the data are.
        data: tensors, dicts, or tuples (inputs,), (inputs, targets), (inputs, targets, weight [N]).
    """

    def __init__(self, model: nn.Module, data: Iterable[Any]) -> None:
        # A dict is a batch, not data.
        check_iterable(None if isinstance(data, Mapping) else data)
        self._model, self._data = model, data
        self._needs_labels = _needs_labels(model)

    def __len__(self) -> int:
        # TypeError where the data have none.
        return len(self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for index, element in enumerate(self._data):
            if isinstance(element, (Tensor, Mapping)):
                yield self._without_labels(element), None
            elif isinstance(element, (tuple, list)) and len(element) in (1, 2, 3):
                yield self._without_labels(element[0]), None, *element[2:]
            else:
                found = type(element).__name__
                if isinstance(element, (tuple, list)):
                    found = f"{found} of {len(element)}"
                raise TypeError(
                    "data must yield tensors, dicts, or tuples (inputs,), (inputs, targets) or "
                    f"(inputs, targets, weight); batch {index} is a {found}"
                )

    def _without_labels(self, inputs: Any) -> Any:
        if not isinstance(inputs, Mapping) or "labels" not in inputs or self._needs_labels:
            return inputs
        kept = {key: value for key, value in inputs.items() if key != "labels"}
        shift: Any = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if callable(shift) and not kept.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            kept["decoder_input_ids"] = shift(labels=inputs["labels"])
        return kept


def _needs_labels(model: nn.Module) -> bool:
    """Whether forward() has labels among its arguments and no default for them."""
    try:
        argument = inspect.signature(model.forward).parameters.get("labels")
    except (TypeError, ValueError):
        return False
    return argument is not None and argument.default is inspect.Parameter.empty
