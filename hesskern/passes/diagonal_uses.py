"""Gradients of parameters by sample, from what arrives at the operations that they act through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesskern.graph.evidence import ArrangedCall
from hesskern.graph.nodes import kind, product
from hesskern.graph.parameter_uses import ParameterUse
from hesskern.graph.routed_rows import RoutedRows
from hesskern.graph.sample_axes import Arrangement
from hesskern.graph.weight_uses import WeightUse
from hesskern.passes.position_mask import PositionMask

__all__ = ["DiagonalUse", "add_rows", "as_call", "diagonal_use", "mask_positions"]


def as_call(use: ParameterUse) -> WeightUse:
    """The use as a call whose rows are to be given to samples."""
    images = () if kind(use.node) == "Convolution" else None
    return WeightUse(use.node, torch.empty(0), use.outputs, settings=images)


@dataclass(frozen=True, eq=False)
class DiagonalUse:
    """One use of a parameter in a forward pass: t rows [q] of every sample.

    Attributes:
        use: what the graph says.
        shape: of the parameter.
        arrangement: which of the result's rows [R, q] belong to which sample; q is its last axis.
        mask: which positions are data; None: all.
        columns: whether the mask's positions are the last axis, q, as in sequences [N, C, T].
        routed: whether the rows are some of a larger tensor's.
    """

    use: ParameterUse
    shape: tuple[int, ...]
    arrangement: Arrangement | RoutedRows
    mask: PositionMask | None = None
    columns: bool = False
    routed: bool = False

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.use.node, 0)

    @property
    def contiguous(self) -> bool:
        """Whether a sample's rows follow one another in the result."""
        return isinstance(self.arrangement, Arrangement) and self.arrangement.outer == 1

    @property
    def positions(self) -> int:
        """Rows of a sample, t."""
        return self.arrangement.positions

    def by_sample(self, gradient: Tensor) -> Tensor:
        """[N, t, q] of a gradient of the result, or of another tensor of its shape."""
        return self.arrangement.by_sample(gradient.reshape(-1, self.use.outputs[-1]))

    def in_block(self, gradient: Tensor) -> Tensor:
        """[n, r, t, q] of [n, r, ...]; samples stand first."""
        return gradient.reshape(*gradient.shape[:2], -1, self.use.outputs[-1])

    @cached_property
    def _factor(self) -> Tensor | None:
        """[N, t, q] that gradients are multiplied with."""
        if self.use.factor is None:
            return None
        return self.by_sample(self.use.factor().expand(self.use.outputs))

    @cached_property
    def rows(self) -> Tensor:
        """[N, t] int64 rows that were looked up."""
        assert self.use.indices is not None
        return self.arrangement.by_sample(self.use.indices.reshape(-1))

    def values(self, gradient: Tensor, samples: slice, dtype: torch.dtype) -> Tensor:
        """[n, r, t, q] in a dtype: gradients of the operand, one for every time it is repeated.

        Zero at masked positions, whatever stands there.

        Args:
            gradient: [n, r, t, q] of the result.
            samples: which.
            dtype: of the accumulators.
        """
        values = gradient.to(dtype)
        if self._factor is not None:
            values = values * self._factor[samples].to(dtype).unsqueeze(1)
        if self.use.scale != 1.0:
            values = values * self.use.scale
        if self.use.padding >= 0:
            dropped = self.rows[samples] == self.use.padding
            values = values.masked_fill(dropped[:, None, :, None], 0)
        if self.mask is None:
            return values
        if self.columns:
            dropped = ~self.mask.on(values.device)[samples]
            return values.masked_fill(dropped[:, None, None, :], 0)
        return self.mask.zeroed(values, samples)

    def add_(self, total: Tensor, values: Tensor, samples: slice) -> None:
        """Adds the gradients in the parameter by sample and root row.

        Args:
            total: [n, r, P], changed.
            values: [n, r, t, q] from :meth:`values`.
            samples: which.
        """
        n, r, t, q = values.shape
        if self.use.indices is not None:
            vocabulary = self.shape[0]
            begins = torch.arange(n * r, device=values.device).reshape(n, r, 1) * vocabulary
            rows = begins + self.rows[samples].unsqueeze(1)
            found = add_rows(rows.reshape(-1), values.reshape(n * r * t, q), n * r * vocabulary)
            total += found.reshape(total.shape)
        elif self.use.x is not None:
            total += self._products(values, samples).reshape(total.shape)
        else:
            self._add_entries(total, self._reduced(values))

    def _products(self, values: Tensor, samples: slice) -> Tensor:
        """[n, r, m, d] sums of outer products with the inputs."""
        assert self.use.x is not None
        x = self.arrangement.by_sample(self.use.x.reshape(-1, self.use.x.shape[-1]))
        x = x[samples].to(values.dtype)
        if self.mask is not None:
            x = self.mask.zeroed(x.unsqueeze(1), samples)[:, 0]
        return torch.matmul(values.mT, x.unsqueeze(1))

    def _reduced(self, values: Tensor) -> Tensor:
        """[n, r, entries of the operand]."""
        n, r, t, _ = values.shape
        lead = _lead(self.use.operand)
        repeated, own = self.use.outputs[lead:], self.use.operand[lead:]
        block = product(repeated[:-1])
        found = values.reshape(n, r, t // block, *repeated).sum(2)
        sizes = enumerate(zip(own, repeated, strict=True))
        axes = [i + 2 for i, (size, full) in sizes if size < full]
        if axes:
            found = found.sum(axes)
        return found.reshape(n, r, -1)

    def _add_entries(self, total: Tensor, entries: Tensor) -> None:
        n, r, count = entries.shape
        if self.use.numbers is None:
            total += entries
            return
        size = total.shape[2]
        numbers = self.use.numbers.to(entries.device)
        # Those without a gradient go behind all others.
        numbers = torch.where(numbers < 0, size, numbers)
        found = add_rows(numbers, entries.reshape(n * r, count).T, size + 1)
        total += found[:size].T.reshape(n, r, size)


def _lead(operand: tuple[int, ...]) -> int:
    """How many axes at the front an operand is repeated along, the last one not among them."""
    lead = next((i for i, size in enumerate(operand) if size != 1), len(operand))
    return min(lead, len(operand) - 1)


def add_rows(index: Tensor, rows: Tensor, size: int) -> Tensor:
    """[size, q] sums of the rows with every index, in an order that is always the same.

    Args:
        index: [R] int64.
        rows: [R, q] float32 or float64.
        size: above every index.
    """
    # What an embedding's gradient is; on every device in a fixed order.
    add = torch.ops.aten.embedding_dense_backward
    found: Tensor = add(rows.contiguous(), index, size, -1, False)
    return found


def diagonal_use(use: ParameterUse, shape: Sequence[int], call: ArrangedCall) -> DiagonalUse | str:
    """A use whose rows belong to samples, or why its gradients cannot be had by sample.

    Args:
        use: from the graph.
        shape: of the parameter.
        call: whose rows are which sample's.
    """
    if call.problem is not None:
        return f"acts through {kind(use.node)} on rows that are no samples: {call.problem}"
    arrangement = call.arrangement
    if kind(use.node) == "Convolution" and isinstance(arrangement, Arrangement):
        inner = arrangement.inner * product(use.outputs[1:-1])
        arrangement = Arrangement(arrangement.outer, arrangement.samples, inner)
    if use.operand:
        lead = _lead(use.operand)
        block = product(use.outputs[lead:-1])
        inner = 1 if isinstance(arrangement, RoutedRows) else arrangement.inner
        if not block or inner % block:
            return (
                f"acts through {kind(use.node)}, where its entries belong to samples or to rows of "
                "several"
            )
    return DiagonalUse(use, tuple(shape), arrangement, routed=call.routed)


def mask_positions(use: DiagonalUse) -> tuple[int, bool]:
    """How many positions a mask would speak of, and whether they are the last axis.

    Images have none, as in layers.
    """
    outputs, operand = use.use.outputs, use.use.operand
    several = any(size > 1 for size in operand)
    if use.use.channels or (several and operand[-1] == 1 and outputs[-1] > 1):
        return (outputs[2], True) if len(outputs) == 3 else (1, False)
    return use.positions, False
