"""The rows of one batch that count in a layer's input covariance, and how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.input_sums import InputSums
from hesskern.graph.nodes import product
from hesskern.ops.reference import unfold
from hesskern.passes.batches import Batch, halves
from hesskern.passes.input_capture import Call, InputCapture
from hesskern.passes.input_masks import rows_follow
from hesskern.passes.layers import LayerSpec, unfolded
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
    """

    calls: list[Tensor]
    column: Tensor
    squares: Tensor
    positions: float

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Those of several calls."""
        column, squares = parts[0].column, parts[0].squares
        for part in parts[1:]:
            column, squares = column + part.column, squares + part.squares
        calls = [call for part in parts for call in part.calls]
        return Rows(calls, column, squares, sum(part.positions for part in parts))

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
        ops.input_covariance_(block, part)


@dataclass(frozen=True)
class BatchRows:
    """Takes layers' inputs of one batch as rows.

    Attributes:
        samples: N.
        weight: [N] weights of the samples on the model's device, or None if all are one.
        mask: [N, T] bool there, True where a position is data, or None if all are.
    """

    samples: int
    weight: Tensor | None
    mask: Tensor | None

    @property
    def by_sample(self) -> bool:
        """Whether it matters which rows are whose."""
        return self.weight is not None or self.mask is not None

    @property
    def count(self) -> float:
        """Weighted number of samples."""
        return float(self.samples) if self.weight is None else float(self.weight.sum())

    def of(self, spec: LayerSpec, x: Tensor) -> Rows | str:
        """The rows of one call of a layer of this geometry, or why they cannot be told."""
        if self.by_sample and x.shape[0] % self.samples:
            return (
                f"was given inputs {list(x.shape)} in a batch of {self.samples} samples: it cannot "
                "be told which rows are whose, as masks and weights ask for"
            )
        return self._of_rows(spec, x) if spec.kind == "linear" else self._of_images(spec, x)

    def _of_rows(self, spec: LayerSpec, x: Tensor) -> Rows:
        d = spec.weight_inputs
        weight = self.weight
        if self.mask is not None and rows_follow(x.shape, self.mask):
            # [N, T, ..., d] or [N T, d]: the positions that are data, one after another.
            kept = self.mask.to(x.device)
            x = x.reshape(*kept.shape, -1, d)[kept]
            inner = x.shape[1]
            counts = kept.sum(1)
            if weight is not None:
                weight = weight.to(x.device).repeat_interleave(counts)
                positions = float(weight.sum()) * inner
            else:
                positions = float(product(x.shape[:-1]))
        elif weight is not None:
            weight = weight.to(x.device)
            positions = self.count * (product(x.shape[:-1]) // self.samples)
            x = x.reshape(self.samples, -1, d)
        else:
            positions = float(product(x.shape[:-1]))
        return self._weighted(x, weight, positions, d)

    def _weighted(self, x: Tensor, weight: Tensor | None, positions: float, columns: int) -> Rows:
        """Rows [..., columns], weighted along the first axis."""
        dtype = accumulator_dtype(x.dtype)
        if weight is None:
            rows = x.reshape(-1, columns)
            return Rows([rows], rows.sum(0, dtype=dtype), _squares(rows), positions)
        shape = (-1,) + (1,) * (x.dim() - 1)
        root = weight.to(dtype).sqrt().reshape(shape)
        x = x.to(dtype) * root
        rows, total = x.reshape(-1, columns), (x * root).reshape(-1, columns).sum(0)
        return Rows([rows], total, _squares(rows), positions)

    def _of_images(self, spec: LayerSpec, x: Tensor) -> Rows:
        dtype = accumulator_dtype(x.dtype)
        images, weight = x.shape[0] // max(self.samples, 1), self.weight
        if self.mask is not None and len(spec.kernel_size) == 1 and images == 1:
            columns = unfold(x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
            if columns.shape[2] == self.mask.shape[1]:
                kept = self.mask.to(x.device)
                rows = columns.transpose(1, 2)[kept]
                if weight is not None:
                    weight = weight.to(x.device).repeat_interleave(kept.sum(1))
                count = len(rows) if weight is None else float(weight.sum())
                return self._weighted(rows, weight, float(count), rows.shape[1])
        if weight is not None:
            root = weight.to(x.device, dtype).sqrt().repeat_interleave(images)
            root = root.reshape((-1,) + (1,) * (x.dim() - 1))
            x = x.to(dtype) * root
            total = (x * root).sum(0)
        else:
            total = x.sum(0, dtype=dtype)
        # Every image has the same number of columns.
        patches = unfolded(spec, total)
        count = self.count * images if self.by_sample else float(x.shape[0])
        return Rows([x], patches.sum(1), _squares(x), count * patches.shape[1])


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
