"""Data cut anew: as many samples at a time as the work wants, however the data is batched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesskern.passes.batches import Batch, may_count_positions, sample_count
from hesskern.passes.sample_numbers import Numbers

__all__ = ["Piece", "pieces", "usual_size"]

# Samples that go through the model together: a power of two with about so many tokens, or input
# numbers, but no more samples than the last.
_TOKENS, _NUMBERS, _MOST = 2**12, 2**22, 256


@dataclass(frozen=True)
class Piece:
    """Some consecutive samples of the data.

    Attributes:
        batch: these samples; its index is that of the batch that the first of them came from.
        first: number of its first sample, from 0.
        count: of its samples.
        behind: where the next piece begins: a batch's index, and how many of its samples come
            before that.
    """

    batch: Batch
    first: int
    count: int
    behind: tuple[int, int]


def usual_size(batch: Batch) -> int:
    """Samples at a time for data of this form: it depends on the samples' shapes alone."""
    tensors = [tensor for tensor in _tensors(batch.inputs) if tensor.dim()]
    if not tensors:
        return 1
    largest = max(tensors, key=lambda tensor: math.prod(tensor.shape[1:]))
    total = _NUMBERS if largest.is_floating_point() else _TOKENS
    each = max(1, math.prod(largest.shape[1:]))
    return int(2 ** int(math.log2(min(_MOST, max(1, total // each)))))


def pieces(
    data: Iterable[Batch],
    size: Callable[[Batch], int] = usual_size,
    first: int = 0,
    skip: int = 0,
) -> Iterator[Piece]:
    """The samples of the batches, so many at a time, the last fewer.

    Where batches follow each other whose samples have different shapes (sequences padded to the
    longest of a batch), a piece ends. A batch with a tensor whose first axis does not count its
    samples, or may count positions, is a piece of its own.

    Args:
        data: batches, whose weights are left out.
        size: samples of a piece, of the first batch of that form.
        first: number of the first sample.
        skip: how many samples of the first batch come before that.
    """
    # With the number of a batch's samples that went before.
    held: list[tuple[Batch, int, int]] = []
    form: Any = None
    total = wanted = 0

    def take(count: int) -> Piece:
        nonlocal held, first, total
        parts, rest, left = [], [], count
        for batch, n, before in held:
            if n <= left:
                parts.append(batch)
            else:
                if left:
                    parts.append(_part(batch, slice(0, left)))
                rest.append((_part(batch, slice(left, n)), n - left, before + left))
            left = max(0, left - n)
        behind = (rest[0][0].index, rest[0][2]) if rest else (held[-1][0].index + 1, 0)
        piece = Piece(_joined(parts), first, count, behind)
        held, first, total = rest, first + count, total - count
        return piece

    for batch in data:
        n = sample_count(batch)
        found = _form(batch, n)
        if held and found != form:
            yield take(total)
        if found is None:
            yield Piece(_without_weight(batch), first, n, (batch.index + 1, 0))
            first += n
            continue
        if not n:
            continue
        if found != form:
            form, wanted = found, size(batch)
        if skip:
            batch, n = _part(batch, slice(skip, n)), n - skip
        held.append((batch, n, skip))
        total += n
        skip = 0
        while total >= wanted:
            yield take(wanted)
    if held:
        yield take(total)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _fields(batch: Batch) -> tuple[Any, ...]:
    return batch.inputs, batch.targets, batch.given_targets, batch.mask


def _form(batch: Batch, count: int) -> Any:
    """What two batches must have in common to be joined; None where a batch cannot be cut."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.dim() or len(value) != count:
                raise _Whole
            return value.shape[1:], value.dtype, value.device
        if isinstance(value, Mapping):
            return type(value), tuple((key, of(item)) for key, item in value.items())
        if isinstance(value, (tuple, list)):
            if isinstance(value, list) and not all(isinstance(item, Tensor) for item in value):
                # Of what no tensor holds it cannot be told whether it counts the samples.
                raise _Whole
            return type(value), tuple(of(item) for item in value)
        plain = value is None or isinstance(value, (bool, int, float, str))
        return value if plain else id(value)

    if may_count_positions(batch, count):
        return None
    try:
        # Numbers of another kind cannot stand beside these.
        return batch.numbers.part, *(of(value) for value in _fields(batch))
    except _Whole:
        return None


class _Whole(Exception):
    """A batch that cannot be cut."""


def _mapped(change: Callable[[list[Tensor]], Tensor], values: list[Any]) -> Any:
    """Values of one form as one, with their tensors changed together."""
    first = values[0]
    if isinstance(first, Tensor):
        return change(values)
    if isinstance(first, Mapping):
        return {key: _mapped(change, [value[key] for value in values]) for key in first}
    if isinstance(first, (tuple, list)):
        items = [_mapped(change, list(column)) for column in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


def _changed(
    change: Callable[[list[Tensor]], Tensor],
    join: Callable[[list[Numbers]], Numbers],
    batches: list[Batch],
) -> Batch:
    inputs, targets, given, mask = (
        _mapped(change, list(column)) for column in zip(*map(_fields, batches), strict=True)
    )
    same = all(batch.given_targets is batch.targets for batch in batches)
    numbers = join([batch.numbers for batch in batches])
    return Batch(batches[0].index, inputs, targets, targets if same else given, None, mask, numbers)


def _part(batch: Batch, samples: slice) -> Batch:
    return _changed(
        lambda tensors: tensors[0][samples], lambda numbers: numbers[0].of(samples), [batch]
    )


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return _without_weight(batches[0])
    return _changed(torch.cat, Numbers.joined, batches)


def _without_weight(batch: Batch) -> Batch:
    return replace(batch, weight=None)
