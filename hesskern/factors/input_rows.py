"""The rows of one batch that count in a layer's input covariance, and how much."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.input_sums import InputSums
from hesskern.graph.nodes import product
from hesskern.ops.reference import unfold
from hesskern.passes.batches import Batch, halves, sample_count
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layer_uses import positions_of_image
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.passes.masks import LayerMasks
from hesskern.passes.position_mask import PositionMask
from hesskern.passes.roots import accumulator_dtype

__all__ = ["BatchRows", "Held", "LastSample", "Rows", "out_of_order"]

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


@dataclass(frozen=True)
class Rows:
    """What a layer, and all that share its inputs, were given in a batch.

    Attributes:
        calls: rows [R, d] or images [B, C, (H,) W], times the square roots of their weights.
        column: [g d] weighted sum over samples and positions.
        squares: 0-dim, the sum of all squared entries: finite only if all sums will be.
        positions: weighted sum of positions per sample.
        last: per call where it mattered which rows are whose, the last sample's part, if nothing
            else tells that rows come sample after sample.
    """

    calls: list[Tensor]
    column: Tensor
    squares: Tensor
    positions: float
    last: list[LastSample]

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


class Held:
    """Inputs of one run of the model, and those of the run before.

    Those are let go one by one as others come: an allocator may hand the memory of many that go at
    once back to the system, only to ask for it again.

    Attributes:
        copy: whether inputs are copied, because the model overwrites some of them in place.
    """

    def __init__(self) -> None:
        self.copy = False
        self._before: list[Tensor] = []
        self._now: list[Tensor] = []
        self._versions: list[int] = []

    def begin(self) -> None:
        """A new run: what is held from now on is its."""
        self._before, self._now, self._versions = self._now[::-1], [], []

    def take(self, x: Tensor) -> Tensor:
        """The input as it is now, for as long as :attr:`overwritten` is False."""
        if self._before:
            self._before.pop()
        # Tensors of inference_mode do not count their changes.
        x = x.clone() if self.copy or x.is_inference() else x
        if x.is_inference():
            return x
        self._now.append(x)
        self._versions.append(x._version)
        return x

    @property
    def overwritten(self) -> bool:
        """Whether an input was changed since it was taken."""
        return any(x._version != v for x, v in zip(self._now, self._versions, strict=True))


class BatchRows:
    """Takes layers' inputs of one run of the model as rows.

    The same rows are given for layers of one geometry and mask whose input is one tensor.

    Args:
        samples: N.
        weight: [N] weights of the samples on the model's device, or None if all are one.
        masks: of the batch.
        held: takes them; those of the run before are needed no more.
        ordered: layers whose rows are known to come sample after sample.
    """

    def __init__(
        self,
        samples: int,
        weight: Tensor | None,
        masks: LayerMasks,
        held: Held,
        ordered: Collection[str],
    ) -> None:
        self._samples, self._weight, self._masks = samples, weight, masks
        self._count = float(samples) if weight is None else float(weight.sum())
        self._held, self._ordered = held, ordered
        self._taken: dict[Hashable, Rows | str] = {}
        held.begin()

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
        last: list[LastSample] = []
        # Where all rows count alike, their order does not matter.
        whose = weight is not None or mask is not None
        if whose and n > 1 and spec.name not in self._ordered:
            keep = None if mask is None else mask.on(x.device)[-1]
            last = [LastSample(spec, x, n, keep)] if x.numel() else []
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
            x = self._held.take(x)
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
