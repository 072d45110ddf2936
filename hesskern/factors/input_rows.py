"""The rows of one batch that count in a layer's input covariance, and how much."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.input_sums import InputSums
from hesskern.graph.nodes import product
from hesskern.ops.reference import unfold
from hesskern.passes.batches import Batch, halves
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layer_uses import positions_of_image
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.passes.masks import LayerMasks
from hesskern.passes.position_mask import PositionMask
from hesskern.passes.roots import accumulator_dtype

__all__ = ["BatchRows", "Buffers", "Rows", "out_of_order", "sample_count"]

# Relative to the largest entry, what a sample's inputs may differ by when it is run alone.
_ALONE = {torch.float64: 1e-8, torch.float32: 1e-3}
_ALONE_NARROW = 5e-2


@dataclass(frozen=True)
class Rows:
    """What a layer, and all that share its inputs, were given in a batch.

    Attributes:
        calls: rows [R, d] or images [B, C, (H,) W], times the square roots of their weights.
        column: [g d] weighted sum over samples and positions.
        squares: 0-dim, the sum of all squared entries: finite only if all sums will be.
        positions: weighted sum of positions per sample.
        last: per call where it mattered which rows are whose, the last sample's input, if nothing
            else tells that rows come sample after sample.
    """

    calls: list[Tensor]
    column: Tensor
    squares: Tensor
    positions: float
    last: list[Tensor]

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Those of several calls."""
        column, squares = parts[0].column, parts[0].squares
        for part in parts[1:]:
            column, squares = column + part.column, squares + part.squares
        calls = [call for part in parts for call in part.calls]
        last = [x for part in parts for x in part.last]
        return Rows(calls, column, squares, sum(part.positions for part in parts), last)

    def add_to(self, spec: LayerSpec, sums: InputSums) -> None:
        """Adds them, all but the squares, which the caller has read."""
        for call in self.calls:
            x = call.to(sums.inputs.dtype) if _wider(call, sums.inputs) else call
            if spec.kind == "linear" or x.dim() == 2:
                _add_rows(spec, x, sums.inputs)
            else:
                ops.conv_input_covariance_(
                    sums.inputs,
                    x,
                    spec.kernel_size,
                    spec.stride,
                    spec.padding,
                    spec.dilation,
                    spec.groups,
                )
        sums.column += self.column.to(sums.column.dtype)
        sums.positions += self.positions


def _add_rows(spec: LayerSpec, rows: Tensor, acc: Tensor) -> None:
    """Rows [R, g d], group by group."""
    if spec.groups == 1:
        ops.input_covariance_(acc, rows)
        return
    for block, part in zip(acc, rows.chunk(spec.groups, 1), strict=True):
        ops.input_covariance_(block, part.contiguous())


class Buffers:
    """Memory that copies of inputs lie in, for one batch after the other.

    Inputs that were held instead would keep the model from using their memory again at once, and an
    allocator may hand all of it back to the system behind every batch.
    """

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Tensor]] = {}
        self._used: dict[Hashable, list[Tensor]] = {}

    def begin(self) -> None:
        """From now on, copies that were made before are needed no more."""
        self._free, self._used = self._used, {}

    def copy(self, x: Tensor) -> Tensor:
        """The tensor, contiguous, in memory that is its own until :meth:`begin`."""
        key = x.shape, x.dtype, x.device
        free = self._free.get(key)
        buffer = free.pop() if free else torch.empty_like(x, memory_format=torch.contiguous_format)
        self._used.setdefault(key, []).append(buffer)
        return buffer.copy_(x)


class BatchRows:
    """Takes layers' inputs of one run of the model as rows.

    The same rows are given for layers of one geometry and mask whose input is one tensor.

    Args:
        samples: N.
        weight: [N] weights of the samples on the model's device, or None if all are one.
        masks: of the batch.
        buffers: for the rows; those of the run before are needed no more.
        ordered: layers whose rows are known to come sample after sample.
    """

    def __init__(
        self,
        samples: int,
        weight: Tensor | None,
        masks: LayerMasks,
        buffers: Buffers,
        ordered: Collection[str],
    ) -> None:
        self._samples, self._weight, self._masks = samples, weight, masks
        self._count = float(samples) if weight is None else float(weight.sum())
        self._buffers, self._ordered = buffers, ordered
        self._taken: dict[Hashable, Rows | str] = {}
        buffers.begin()

    def __call__(self, spec: LayerSpec, x: Tensor, number: Hashable) -> Rows | str:
        """The rows of one call of a layer, or why they cannot be told."""
        total = _positions(spec, x)
        count, rest = divmod(total, self._samples)
        mask = None if rest else self._masks.of(spec.name, count)
        key = number, _geometry(spec), id(mask)
        if key not in self._taken:
            whose = self._weight is not None or self._masks.batch.mask is not None
            if whose and (rest or x.shape[0] % self._samples):
                self._taken[key] = (
                    f"was given inputs {list(x.shape)} in a batch of {self._samples} samples: it "
                    "cannot be told which rows are whose, as masks and weights ask for"
                )
            else:
                self._taken[key] = self._rows(spec, x, count, mask)
        return self._taken[key]

    def _rows(self, spec: LayerSpec, x: Tensor, count: int, mask: PositionMask | None) -> Rows:
        n, dtype, weight = self._samples, accumulator_dtype(x.dtype), self._weight
        last: list[Tensor] = []
        whose = weight is not None or (self._masks.batch.mask is not None and count > 1)
        if whose and n > 1 and spec.name not in self._ordered:
            last = [x[x.shape[0] - x.shape[0] // n :].clone()]
        if mask is not None and spec.kind != "linear":
            # Windows of masked positions cannot be taken out of an image.
            x = unfold(x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
            x = x.reshape(n, -1, *x.shape[1:]).transpose(2, 3)
        root = None
        if weight is not None:
            root = weight.to(x.device, dtype).sqrt().reshape(-1, 1, 1, 1)
            x = (x.to(dtype).reshape(n, 1, -1, x.shape[-1]) * root).reshape(x.shape)
        positions = self._count * count
        if mask is not None:
            x = mask.select(x.reshape(n, 1, count, x.shape[-1]))
            root = None if root is None else mask.select(root.expand(n, 1, count, 1))
            counts = mask.counts if weight is None else mask.counts * weight.to(mask.counts)
            positions = float(counts.sum())
        elif spec.kind == "linear":
            x = x.reshape(-1, x.shape[-1])
            if root is not None:
                root = root.reshape(-1, 1).repeat_interleave(len(x) // n, 0)
        elif root is not None:
            root = root.repeat_interleave(len(x) // n, 0).reshape(-1, *(1,) * (x.dim() - 1))
        if root is None and mask is None:
            x = self._buffers.copy(x)
        total = (x if root is None else x * root).sum(0, dtype=dtype)
        column = total if x.dim() == 2 else unfolded(spec, total).sum(1)
        return Rows([x], column, _squares(x), positions, last)


def _positions(spec: LayerSpec, x: Tensor) -> int:
    """Positions of all samples in one call."""
    if spec.kind == "linear":
        return product(x.shape[:-1])
    return x.shape[0] * positions_of_image(spec, x.shape)


def _geometry(spec: LayerSpec) -> Hashable:
    """What of a layer the covariance of given inputs depends on."""
    return (
        spec.weight_inputs,
        spec.groups,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
    )


def _squares(x: Tensor) -> Tensor:
    """0-dim sum of squares; NaN or Inf if an entry is, or its square overflows."""
    if x.dtype in (torch.float32, torch.float64) and x.is_contiguous():
        flat = x.reshape(-1)
        return torch.dot(flat, flat)
    return torch.linalg.vector_norm(x, dtype=accumulator_dtype(x.dtype)).square()


def _wider(x: Tensor, acc: Tensor) -> bool:
    return x.dtype == torch.float64 and acc.dtype != torch.float64


def out_of_order(
    capture: InputCapture, batch: Batch, last: Mapping[str, list[Tensor]]
) -> dict[str, str]:
    """Layers whose rows do not come sample after sample, with the reason.

    The batch's last sample runs alone once more: what its layers are given must be the last rows of
    what they were given in the batch.

    Args:
        capture: of the pass.
        batch: of several samples.
        last: of the layers in question, those rows, by call.
    """
    sample = batch
    while len(parts := halves(sample)) > 1:
        sample = parts[-1]
    again = capture.copies(sample)
    return {
        name: "was given rows that are not those of one sample after another, as masks and weights "
        "ask for"
        for name, calls in last.items()
        if len(again.get(name, ())) != len(calls) or not all(map(_alike, calls, again[name]))
    }


def _alike(last: Tensor, alone: Tensor) -> bool:
    """Whether two inputs differ by no more than rounding."""
    if last.shape != alone.shape or not last.numel():
        return last.shape == alone.shape
    last = last.to(accumulator_dtype(last.dtype))
    limit = _ALONE.get(alone.dtype, _ALONE_NARROW) * float(last.abs().max())
    # What is not finite is refused by itself, with a message of its own.
    return not math.isfinite(limit) or float((last - alone).abs().max()) <= limit


def sample_count(batch: Batch) -> int:
    """N, the length of the first tensor's first axis."""
    inputs = batch.inputs
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 1
    for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise TypeError(
        f"batch {batch.index} holds no tensor whose first axis counts the samples (a tokenizer's "
        'lists? pass return_tensors="pt")'
    )
