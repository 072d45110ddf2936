"""The rows of one batch that count in a layer's input covariance, and how much."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hesskern import ops
from hesskern.graph.nodes import product
from hesskern.ops.reference import unfold
from hesskern.passes.batches import Batch, halves, sample_count
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layer_uses import positions_of_image
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.passes.masks import LayerMasks
from hesskern.passes.position_mask import PositionMask
from hesskern.passes.roots import accumulator_dtype

__all__ = ["BatchRows", "Call", "LastSample", "Rows", "out_of_order"]

# Relative to a feature's largest entry, what a sample's inputs may differ by when it is run alone.
# Of rows in another order some entry differs by about as much as the feature has.
_ALONE = {torch.float64: 1e-7, torch.float32: 1e-2}
_ALONE_NARROW = 0.2
# Entries that are compared at once, so that comparing takes little memory.
_AT_ONCE = 1 << 22


class LastSample:
    """The last sample's part of a call's input, to be compared with the sample run alone.

    Args:
        spec: of the layer.
        x: its input.
        samples: N.
        keep: [T] bool, which of the sample's positions are data; None: all.

    Attributes:
        tells: 0-dim bool, whether rows in another order would show: the sample differs from each
            other one, and from what it would be with positions before samples.
    """

    def __init__(self, spec: LayerSpec, x: Tensor, samples: int, keep: Tensor | None) -> None:
        self._spec, self._windows = spec, keep is not None
        self._shape = torch.Size([x.shape[0] // samples, *x.shape[1:]])
        rows = self._by_sample(x, samples)
        self._rows = rows[-1].clone()
        self._keep = torch.ones_like(self._rows[:, 0], dtype=torch.bool) if keep is None else keep
        self._limit = self._limits()
        across = rows.reshape(-1, samples, rows.shape[2])[:, -1]
        if keep is not None:
            # Padding may be any values, and so is looked at only where the data alone do not tell
            # (the last row of all, for one, is the same in both orders).
            self._keep = keep | ~self._differs(across)
            self._limit = self._limits()
        some = max(1, _AT_ONCE // max(1, self._rows.numel()))
        told = [self._differs(others).all() for others in rows[:-1].split(some)]
        if len(self._rows) > 1:
            told.append(self._differs(across))
        self.tells = torch.stack(told).all()

    def _by_sample(self, x: Tensor, samples: int) -> Tensor:
        """[N, T, features], if rows come sample after sample."""
        spec = self._spec
        if spec.kind != "linear":
            if self._windows:
                x = unfold(x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
            x = x.movedim(1, -1)
        return x.reshape(samples, product(x.shape[:-1]) // samples, x.shape[-1])

    def _limits(self) -> Tensor:
        """[features] what entries may differ by."""
        rows = self._rows.to(accumulator_dtype(self._rows.dtype))
        counts = self._keep.unsqueeze(1) & rows.isfinite()
        scale = torch.where(counts, rows.abs(), 0).amax(0)
        # A feature that is next to nothing here differs by the rounding of what it came from. One
        # large feature does not change the median; those that are zero would.
        usual = scale.masked_fill(scale == 0, torch.nan).nanmedian().nan_to_num(0)
        return _ALONE.get(self._rows.dtype, _ALONE_NARROW) * torch.maximum(scale, usual)

    def _differs(self, rows: Tensor) -> Tensor:
        """Whether rows [..., T, features] are others, by more than rounding, where it counts."""
        dtype = accumulator_dtype(self._rows.dtype)
        mine, rows = self._rows.to(dtype), rows.to(dtype)
        near = (rows - mine).abs() <= self._limit
        near |= (rows == mine) | (rows.isnan() & mine.isnan())
        return (~near & self._keep.unsqueeze(1)).flatten(-2).any(-1)

    def is_like(self, alone: Tensor) -> bool:
        """Whether the layer's input in a run of the sample alone differs only by rounding."""
        if alone.shape != self._shape or not alone.numel():
            return alone.shape == self._shape
        return not bool(self._differs(self._by_sample(alone, 1)[0]))


@dataclass(eq=False, slots=True)
class Rows:
    """What a layer, and all that share its input, were given in one call.

    Attributes:
        x: rows [R, g d] or images [B, C, (H,) W], times the square roots of their weights; it may
            be the model's own, which overwrites it later.
        column: [g d] weighted sum over samples and positions.
        positions: weighted sum of positions per sample.
    """

    x: Tensor
    column: Tensor
    positions: float

    def kept(self) -> Rows:
        """The same, whatever becomes of the model's own tensors."""
        return replace(self, x=self.x.clone())

    def add_to(self, spec: LayerSpec, acc: Tensor, base: Tensor | None = None) -> None:
        """Adds sum x x^T to the upper triangle of ``acc`` [(g,) d, d].

        Args:
            spec: of the layer.
            acc: what is added to.
            base: as ``acc``; what is added to instead, whereupon ``acc`` holds the result.
        """
        x = self.x.to(acc.dtype) if _wider(self.x, acc) else self.x
        if spec.kind != "linear" and x.dim() > 2:
            if base is not None:
                acc.copy_(base)
            ops.conv_input_covariance_(
                acc,
                x,
                spec.kernel_size,
                spec.stride,
                spec.padding,
                spec.dilation,
                spec.groups,
            )
        elif spec.groups == 1:
            ops.input_covariance_(acc, x, base=base)
        else:
            for group, part in enumerate(x.chunk(spec.groups, 1)):
                before = None if base is None else base[group]
                ops.input_covariance_(acc[group], part.contiguous(), base=before)

    def squares(self) -> Tensor:
        """0-dim sum of squared entries; NaN or Inf if an entry is, or its square overflows."""
        x = self.x
        if x.dtype in (torch.float32, torch.float64) and x.is_contiguous():
            flat = x.reshape(-1)
            return torch.dot(flat, flat)
        return torch.linalg.vector_norm(x, dtype=accumulator_dtype(x.dtype)).square()


@dataclass(frozen=True)
class BatchRows:
    """Takes layers' inputs in one batch as rows.

    Attributes:
        samples: N.
        weight: [N] weights of the samples on the model's device, or None if all are one.
        masks: of the batch.
    """

    samples: int
    weight: Tensor | None
    masks: LayerMasks

    @cached_property
    def count(self) -> float:
        """Weighted number of samples."""
        return float(self.samples) if self.weight is None else float(self.weight.sum())

    def call(self, spec: LayerSpec, x: Tensor) -> Call | str:
        """One call of a layer, or why its rows cannot be told."""
        count, rest = divmod(_positions(spec, x), self.samples)
        mask = None if rest else self.masks.of(spec.name, count)
        whose = self.weight is not None or self.masks.batch.mask is not None
        if whose and (rest or x.shape[0] % self.samples):
            return (
                f"was given inputs {list(x.shape)} in a batch of {self.samples} samples: it "
                "cannot be told which rows are whose, as masks and weights ask for"
            )
        return Call(self, spec, x, count, mask)


@dataclass(eq=False, slots=True)
class Call:
    """A layer's input in one call.

    Attributes:
        batch: that it is of.
        spec: of the layer.
        x: as the model gave it.
        count: positions per sample.
        mask: which of them are data; None: all.
    """

    batch: BatchRows
    spec: LayerSpec
    x: Tensor
    count: int
    mask: PositionMask | None

    @property
    def likeness(self) -> Hashable:
        """Is the same for two calls with one tensor only if their rows and sums are alike."""
        spec = self.spec
        return (
            id(self.mask),
            spec.weight_inputs,
            spec.groups,
            spec.kernel_size,
            spec.stride,
            spec.padding,
            spec.dilation,
        )

    def last(self) -> LastSample | None:
        """The last sample's part, where it matters which rows are whose."""
        n = self.batch.samples
        # Where all rows count alike, their order does not matter.
        if (self.batch.weight is None and self.mask is None) or n == 1 or not self.x.numel():
            return None
        keep = None if self.mask is None else self.mask.on(self.x.device)[-1]
        return LastSample(self.spec, self.x, n, keep)

    def rows(self) -> Rows:
        """What counts of the input, and how much."""
        spec, x, count, mask = self.spec, self.x, self.count, self.mask
        n, dtype, weight = self.batch.samples, accumulator_dtype(x.dtype), self.batch.weight
        if mask is not None and spec.kind != "linear":
            # Windows of masked positions cannot be taken out of an image.
            x = unfold(x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
            x = x.reshape(n, -1, *x.shape[1:]).transpose(2, 3)
        root = None
        if weight is not None:
            root = weight.to(x.device, dtype).sqrt().reshape(-1, 1, 1, 1)
            x = (x.to(dtype).reshape(n, 1, -1, x.shape[-1]) * root).reshape(x.shape)
        positions = self.batch.count * count
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
        total = (x if root is None else x * root).sum(0, dtype=dtype)
        column = total if x.dim() == 2 else unfolded(spec, total).sum(1)
        return Rows(x, column, positions)


def _positions(spec: LayerSpec, x: Tensor) -> int:
    """Positions of all samples in one call."""
    if spec.kind == "linear":
        return product(x.shape[:-1])
    return x.shape[0] * positions_of_image(spec, x.shape)


def _wider(x: Tensor, acc: Tensor) -> bool:
    return x.dtype == torch.float64 and acc.dtype != torch.float64


def out_of_order(
    capture: InputCapture, batch: Batch, last: Mapping[str, list[LastSample]]
) -> dict[str, str]:
    """Layers whose rows do not come sample after sample, with the reason.

    The batch's last sample runs alone once more: what its layers are given must be the last rows of
    what they were given in the batch.

    Args:
        capture: of the pass.
        batch: of several samples.
        last: of the layers in question, that sample's part, by call.
    """
    sample = batch
    while len(parts := halves(sample)) > 1:
        sample = parts[-1]
    if sample_count(sample) > 1:
        reason = (
            "has rows of which it cannot be told whose they are, as masks and weights ask for: the "
            "batch has as many samples as positions, and a tensor that may count either"
        )
        return dict.fromkeys(last, reason)
    try:
        again = capture.copies(sample)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (
            "has rows of which it cannot be told whose they are, as masks and weights ask for: the "
            f"model does not run with one sample alone ({str(error).splitlines()[0]})"
        )
        return dict.fromkeys(last, reason)
    return {
        name: "was given rows that are not those of one sample after another, as masks and weights "
        "ask for"
        for name, calls in last.items()
        if len(again.get(name, ())) != len(calls)
        or not all(call.is_like(x) for call, x in zip(calls, again[name], strict=True))
    }
