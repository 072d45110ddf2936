"""The data of a pass: batches on the model's device, whatever form they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hesskern.devices import sent
from hesskern.passes.checks import as_weights, check_dense
from hesskern.passes.sample_numbers import NumberedData, Numbers, Positions
from hesskern.progress import Progress

__all__ = [
    "Batch",
    "DataCourse",
    "Parts",
    "batches",
    "check_iterable",
    "halves",
    "mapped",
    "may_count_positions",
    "no_samples",
    "pair",
    "sample_count",
    "samples_of",
    "shape_is_ambiguous",
]

# Entries of a dict whose first axis counts the samples.
_BY_SAMPLE = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
# Ends of names whose values [T] count positions; [N, T] has samples, too.
_BY_POSITION = ("cache_position", "position_ids", "token_type_ids", "attention_mask", "head_mask")


@dataclass(frozen=True)
class Batch:
    """One element of the data.

    Attributes:
        index: position in the data, from 0.
        inputs: tensor, tuple or dict for the model.
        targets: for the loss.
        given_targets: the same where they came from: values on the host can be looked at without
            waiting for a device.
        weight: [N] sample weights where they came from, or None.
        mask: [N, T] where it came from, which positions are data (1 or True), or such masks by
            patterns of layers' names; None: all are.
        numbers: [N] of the samples, which random draws go by; none where nobody has asked.
    """

    index: int
    inputs: Any
    targets: Any
    given_targets: Any
    weight: Tensor | None
    mask: Any = None
    numbers: Numbers = field(default_factory=Numbers.none)


class DataCourse(Protocol):
    """The way through the data of a pass that may have begun before.

    Attributes:
        samples: how many samples the elements so far have had, as far as weights needed it.
        position: number of the next sample, by its position.
    """

    samples: int
    position: int

    def elements(self, given: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """(index, element) of those that were not seen before, with what goes along with each."""
        ...

    def count(self, samples: int, position: int) -> None:
        """Takes the counts behind the last element that was handed out."""
        ...


class Parts(NamedTuple):
    """An element of the data, taken apart by the loss, where it came from.

    Attributes:
        inputs: tensor, tuple or dict for the model.
        targets: for the loss.
        weight: [N] sample weights, or None.
        mask: [N, T], which positions are data (1); None: all are.
        check_mask: raises where that mask is none; not asked where ``position_mask`` gives another.
        of_data: the targets without those that masked positions predict, of targets and the mask
            that counts; None: all of them stay.
    """

    inputs: Any
    targets: Any
    weight: Any = None
    mask: Any = None
    check_mask: Callable[[], None] | None = None
    of_data: Callable[[Any, Any], Any] | None = None


def pair(element: Any, index: int) -> Parts:
    """(inputs, targets) or (inputs, targets, weight [N]) as it is.

    Args:
        element: of the data.
        index: of the batch, for messages.

    Raises:
        TypeError: the element is none of both.
    """
    if not isinstance(element, (tuple, list)) or len(element) not in (2, 3):
        raise TypeError(
            f"data must yield (inputs, targets) or (inputs, targets, weight); "
            f"batch {index} is {_kind(element)}"
        )
    return Parts(*element)


def _kind(element: Any) -> str:
    """What an element is, for messages."""
    if isinstance(element, (tuple, list)):
        return f"a {type(element).__name__} of {len(element)}"
    if isinstance(element, Mapping) and "labels" in element:
        return (
            f"a {type(element).__name__} with labels (the losses for such are hk.CausalLM(), "
            "hk.MaskedLM(), hk.Seq2SeqLM(), hk.TokenClassification(), hk.SequenceClassification())"
        )
    return type(element).__name__


def batches(
    data: Iterable[Any],
    device: torch.device,
    sample_weight: Tensor | None = None,
    progress: Progress | None = None,
    description: str = "data",
    split: Callable[[Any, int], Parts] = pair,
    position_mask: Callable[[Any], Any] | None = None,
    positions: Positions | None = None,
    course: DataCourse | None = None,
) -> Iterator[Batch]:
    """The data's batches on the model's device.

    Args:
        data: iterable of (inputs, targets) or (inputs, targets, weight [N]), or of what ``split``
            takes.
        device: where tensors go.
        sample_weight: [total samples] weights in iteration order, instead of weights in the data.
        progress: callback, told after every batch.
        description: what the progress bar says.
        split: takes an element of the data and its index apart.
        position_mask: gives a batch's mask for its inputs, both where they came from; None for what
            the batch says itself.
        positions: number the samples that the data has no numbers of; None: from 0 on.
        course: which elements are left, where the pass goes on; told how many samples were seen.

    Raises:
        TypeError: data is not iterable, or an element is not such a tuple; ``sample_weight`` is not
            a tensor.
        ValueError: ``sample_weight`` has another length than the data; before the first batch where
            the data is a list or tuple.
    """
    check_iterable(data)
    if sample_weight is not None and not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a tensor, got {type(sample_weight).__name__}")
    if sample_weight is not None and sample_weight.dim() != 1:
        raise ValueError(f"sample_weight must be [total samples], got {list(sample_weight.shape)}")
    total = _length(data)
    if sample_weight is not None:
        sample_weight = as_weights(sample_weight)
        samples = _samples(data)
        if samples is not None and samples != len(sample_weight):
            raise _other_length(sample_weight, f"{samples} samples")
    offset = 0 if course is None else course.samples
    positions = Positions() if positions is None else positions
    source: Any = NumberedData(data)
    given: Any = enumerate(source)
    if course is not None:
        given, positions.next = course.elements(source), course.position
    for index, (element, known) in given:
        parts = split(element, index)
        mapped(parts.inputs, _dense_input)
        inputs, given = _move(parts.inputs, device), _nearby(parts.targets, device)
        weight = _nearby(parts.weight, device)
        mask = None if position_mask is None else _nearby(position_mask(parts.inputs), device)
        # Masks by layers' names say nothing of targets: there the batch's own does.
        predicting = parts.mask if mask is None or isinstance(mask, Mapping) else mask
        if mask is None:
            if parts.check_mask is not None:
                parts.check_mask()
            mask = _nearby(parts.mask, device)
        if sample_weight is not None:
            count = _leading_size(inputs, mask)
            weight = sample_weight[offset : offset + count]
            offset += count
            if len(weight) != count:
                raise _other_length(sample_weight, "more samples")
        if parts.of_data is not None:
            given = parts.of_data(given, predicting)
        batch = Batch(index, inputs, _move(given, device), given, weight, mask)
        numbers = positions.take(_samples_in(batch), known, source.known)
        if course is not None:
            course.count(offset, positions.next)
        yield replace(batch, numbers=numbers)
        if progress is not None:
            progress(description, index + 1, total)
    if sample_weight is not None and offset != len(sample_weight):
        raise _other_length(sample_weight, f"{offset} samples")


def no_samples(consequence: str = "") -> ValueError:
    """The error of a pass over data in which no sample counts.

    Args:
        consequence: e.g. ", so there are no factors".
    """
    return ValueError(
        f"data yielded no samples{consequence}: it is empty, or no sample counts because its "
        "weight is zero or its labels are all masked (-100, or the loss's ignore_index)"
    )


def _other_length(sample_weight: Tensor, found: str) -> ValueError:
    return ValueError(f"sample_weight has {len(sample_weight)} entries but the data has {found}")


def _samples(data: Iterable[Any]) -> int | None:
    """Number of samples in a list of batches; None where it is not known without iterating."""
    if not isinstance(data, (list, tuple)):
        return None
    total = 0
    for element in data:
        if not isinstance(element, (tuple, list, Mapping)) or not element:
            return None
        try:
            total += _leading_size(element if isinstance(element, Mapping) else element[0])
        except (AttributeError, IndexError, TypeError):
            # No batch at all: the pass over the data says so.
            return None
    return total


def check_iterable(data: Any) -> None:
    """Raises TypeError if data cannot be an iterable of batches."""
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of (inputs, targets), got {type(data).__name__}")


def _length(data: Iterable[Any]) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:
        # A DataLoader over an iterable data set has a length only in name.
        return None


def _move(value: Any, device: torch.device) -> Any:
    # To the host without waiting, values would be read before they arrive.
    return mapped(value, lambda tensor: sent(_usable(tensor), device))


def _nearby(value: Any, device: torch.device) -> Any:
    """The value with tensors on the host or on the device."""

    def near(tensor: Tensor) -> Tensor:
        tensor = _usable(tensor)
        return tensor if tensor.device.type == "cpu" else tensor.to(device)

    return mapped(value, near)


def _dense_input(tensor: Tensor) -> Tensor:
    check_dense(tensor, "data: inputs")
    return tensor


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, which must hold values, as one that autograd takes."""
    if tensor.is_meta:
        raise ValueError(
            f"data must hold values, got a tensor {list(tensor.shape)} on the meta device"
        )
    # Autograd refuses tensors made under inference_mode; a clone is a normal one.
    return tensor.clone() if tensor.is_inference() else tensor


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dicts with changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def halves(batch: Batch) -> list[Batch]:
    """The batch in two, or as it is where it has one sample, does not say how many, or has a tensor
    of which it cannot be told whether it counts samples."""
    try:
        count = _leading_size(batch.inputs, batch.mask)
    except (AttributeError, TypeError):
        return [batch]
    if count < 2 or shape_is_ambiguous(batch, count):
        return [batch]
    return [samples_of(batch, slice(0, count // 2)), samples_of(batch, slice(count // 2, count))]


def samples_of(batch: Batch, samples: slice) -> Batch:
    """Some samples of a batch that says how many it has.

    Cut are the tensors whose first axis counts the samples. What has a value for every position
    alone, by its name, stays whole, also where there are as many positions as samples.
    """
    count = _leading_size(batch.inputs, batch.mask)

    def part(value: Any) -> Any:
        return mapped(value, lambda t: t[samples] if t.dim() and len(t) == count else t)

    inputs = part(batch.inputs)
    if isinstance(batch.inputs, Mapping):
        whole = {key: value for key, value in batch.inputs.items() if _by_position(key, value)}
        inputs = {**inputs, **whole}
    targets = part(batch.targets)
    same = batch.given_targets is batch.targets
    return Batch(
        batch.index,
        inputs,
        targets,
        targets if same else part(batch.given_targets),
        part(batch.weight),
        part(batch.mask),
        batch.numbers.of(samples),
    )


def _by_position(key: str, value: Any) -> bool:
    """Whether an argument of a model has one value for every position, the same for all samples."""
    return isinstance(value, Tensor) and value.dim() == 1 and key.endswith(_BY_POSITION)


def _entries(batch: Batch) -> list[tuple[Any, Tensor]]:
    """Tensors with axes among a batch's arguments, by name or place."""
    inputs = batch.inputs
    if isinstance(inputs, Tensor):
        return []
    entries = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [(key, t) for key, t in entries if isinstance(t, Tensor) and t.dim()]


def may_count_positions(batch: Batch, count: int) -> bool:
    """Whether a tensor with as many entries as there are samples may have one for every position.

    By its name it has; or :func:`shape_is_ambiguous`.

    Args:
        batch: that says how many samples it has.
        count: N.
    """
    named = any(
        len(t) == count and isinstance(key, str) and _by_position(key, t)
        for key, t in _entries(batch)
    )
    return named or shape_is_ambiguous(batch, count)


def shape_is_ambiguous(batch: Batch, count: int) -> bool:
    """Whether a tensor may count positions as well as samples, and no name says which.

    It has as many entries as there are samples, and stands beside samples that have as many
    positions: a mask [T, T] beside [N, T, d] with N = T.

    Args:
        batch: that says how many samples it has.
        count: N.
    """
    tensors = _entries(batch)
    named = [t for key, t in tensors if key in _BY_SAMPLE]
    samples = named or [t for _, t in tensors[:1]]
    # What belongs to a single sample is the same for all samples there.
    if count < 2 or not any(count in t.shape[1:] for t in samples):
        return False
    return any(
        len(t) == count
        for key, t in tensors
        if not any(t is sample for sample in samples)
        and not (isinstance(key, str) and t.dim() < 3 and key.endswith(_BY_POSITION))
    )


def sample_count(batch: Batch) -> int:
    """N, the length of the samples' axis.

    Raises:
        TypeError: the inputs have no tensor with such an axis.
        ValueError: their tensors have several lengths, and no name or mask tells which one it is.
    """
    inputs = batch.inputs
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 1
    known = _known_size(inputs, batch.mask)
    if known is not None:
        return known
    found = {}
    for key, value in inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs):
        if isinstance(value, Tensor) and value.dim():
            found[key] = value.shape[0]
            if not isinstance(inputs, Mapping):
                break
    if not found:
        raise TypeError(
            f"batch {batch.index} holds no tensor whose first axis counts the samples (a "
            'tokenizer\'s lists? pass return_tensors="pt")'
        )
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{key!r} has {size}" for key, size in found.items())
        raise ValueError(
            f"it cannot be told how many samples batch {batch.index} has, as the first axes of its "
            f"tensors contradict each other: {listed}; pass the inputs as a tuple of arguments, "
            "whose first tensor counts the samples"
        )
    return next(iter(found.values()))


def _samples_in(batch: Batch) -> int:
    """N as :func:`halves` takes it; 1 where the batch does not say."""
    try:
        return sample_count(batch)
    except (TypeError, ValueError):
        pass
    try:
        return _leading_size(batch.inputs, batch.mask)
    except (AttributeError, IndexError, TypeError):
        return 1


def _known_size(inputs: Any, mask: Any) -> int | None:
    """The number of samples as an entry of a dict with a usual name has it, or the mask."""
    if not isinstance(inputs, Mapping):
        return None
    for name in _BY_SAMPLE:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    for value in (mask, inputs.get("attention_mask")):
        if isinstance(value, Tensor) and value.dim() == 2:
            return value.shape[0]
    return None


def _leading_size(inputs: Any, mask: Any = None) -> int:
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    known = _known_size(inputs, mask)
    if known is not None:
        return known
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
    raise TypeError("inputs must contain a tensor whose first axis counts the samples")
