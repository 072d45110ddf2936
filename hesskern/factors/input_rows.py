"""The rows of one batch that count in a layer's input covariance, and how much."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.input_sums import InputSums
from hesskern.graph.nodes import product
from hesskern.ops.reference import unfold
from hesskern.passes.batches import Batch, halves
from hesskern.passes.input_capture import Call, InputCapture
from hesskern.passes.layer_uses import positions_of_image
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.passes.masks import LayerMasks
from hesskern.passes.position_mask import PositionMask
from hesskern.passes.roots import accumulator_dtype

__all__ = ["BatchRows", "Rows", "out_of_order", "sample_count"]

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
        whose: whether it mattered which rows are whose.
    """

    calls: list[Tensor]
    column: Tensor
    squares: Tensor
    positions: float
    whose: bool

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Those of several calls."""
        column, squares = parts[0].column, parts[0].squares
        for part in parts[1:]:
            column, squares = column + part.column, squares + part.squares
        calls = [call for part in parts for call in part.calls]
        whose = any(part.whose for part in parts)
        return Rows(calls, column, squares, sum(part.positions for part in parts), whose)

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


class BatchRows:
    """Takes layers' inputs of one run of the model as rows.

    The same rows are given for layers of one geometry and mask whose inputs are one tensor: as long
    as the run's inputs exist, which others cannot lie where they do.

    Args:
        samples: N.
        weight: [N] weights of the samples on the model's device, or None if all are one.
        masks: of the batch.
    """

    def __init__(self, samples: int, weight: Tensor | None, masks: LayerMasks) -> None:
        self._samples, self._weight, self._masks = samples, weight, masks
        self._count = float(samples) if weight is None else float(weight.sum())
        self._taken: dict[Hashable, Rows | str] = {}

    def __call__(self, spec: LayerSpec, x: Tensor) -> Rows | str:
        """The rows of one call of a layer, or why they cannot be told."""
        total = _positions(spec, x)
        count, rest = divmod(total, self._samples)
        mask = None if rest else self._masks.of(spec.name, count)
        there = x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.device
        key = there, _geometry(spec), id(mask)
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
        if mask is not None and spec.kind != "linear":
            # Windows of masked positions cannot be taken out of an image.
            x = unfold(x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
            x = x.reshape(n, -1, *x.shape[1:]).transpose(2, 3)
        root = None
        if weight is not None:
            root = weight.to(x.device, dtype).sqrt().reshape(-1, 1, 1, 1)
            x = (x.to(dtype).reshape(n, 1, -1, x.shape[-1]) * root).reshape(x.shape)
        if mask is not None:
            flat = mask.select(x.reshape(n, 1, count, x.shape[-1]))
            again = flat
            if root is not None:
                again = flat * mask.select(root.expand(n, 1, count, 1))
            counts = mask.counts if weight is None else mask.counts * weight.to(mask.counts)
            positions = float(counts.sum())
            return Rows([flat], again.sum(0, dtype=dtype), _squares(flat), positions, True)
        positions = self._count * count
        # Of rows in one matrix, it is not plain that they are those of one sample after another.
        whose = weight is not None or (self._masks.batch.mask is not None and count > 1)
        if spec.kind == "linear":
            flat = x.reshape(-1, x.shape[-1])
            again = (
                flat if root is None else (x.reshape(n, 1, -1, x.shape[-1]) * root).flatten(0, 2)
            )
            return Rows([flat], again.sum(0, dtype=dtype), _squares(flat), positions, whose)
        again = x if root is None else (x.reshape(n, 1, -1, x.shape[-1]) * root).reshape(x.shape)
        columns = unfolded(spec, again.sum(0, dtype=dtype))
        return Rows([x], columns.sum(1), _squares(x), positions, whose)


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
    capture: InputCapture, batch: Batch, found: Mapping[str, list[Call]], samples: int
) -> dict[str, str]:
    """Layers whose rows do not come sample after sample, with the reason.

    The batch's last sample runs alone once more: what its layers are given must be the last rows of
    what they were given in the batch.

    Args:
        capture: of the pass.
        batch: of ``samples`` > 1.
        found: calls of the layers in question, in the batch.
        samples: N.
    """
    last = batch
    while len(parts := halves(last)) > 1:
        last = parts[-1]
    again = capture.alone(last)
    reasons = {}
    for name, calls in found.items():
        alone = again.get(name, [])
        if len(alone) != len(calls) or not all(
            _last_rows(call.x, one.x, samples) for call, one in zip(calls, alone, strict=True)
        ):
            reasons[name] = (
                "was given rows that are not those of one sample after another, as masks and "
                "weights ask for"
            )
    return reasons


def _last_rows(x: Tensor, alone: Tensor, samples: int) -> bool:
    if x.shape[0] != samples * alone.shape[0] or x.shape[1:] != alone.shape[1:]:
        return False
    last = x[x.shape[0] - alone.shape[0] :].to(accumulator_dtype(x.dtype))
    if not last.numel():
        return True
    limit = _ALONE.get(x.dtype, _ALONE_NARROW) * float(last.abs().max())
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
