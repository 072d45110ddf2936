"""Diagonal blocks of one batch: squares of parameters' gradients by sample and root row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesskern.passes.diagonal_uses import DiagonalUse, add_rows
from hesskern.passes.roots import accumulator_dtype

__all__ = ["DiagonalSums"]

# Entries of gradients by sample that are held at a time.
_ENTRIES = 2**23


class DiagonalSums:
    """Sums of squared gradients over the samples and root rows of a batch.

    Args:
        uses: by parameter.
        outputs: [N, ...] of the model.

    Attributes:
        sums: by parameter, of its shape.
    """

    def __init__(self, uses: Mapping[str, Sequence[DiagonalUse]], outputs: Tensor) -> None:
        self._uses, self._outputs = uses, outputs
        self.sums: dict[str, Tensor] = {}

    def take(self, gradients: dict[str, list[Tensor | None]], samples: slice, single: bool) -> None:
        """Adds one block, and takes its gradients out of those of all layers.

        Args:
            gradients: per use [n, r, t, q], or [n, t, q] of one root row; None where nothing flows
                back.
            samples: which.
            single: whether there is one root row.
        """
        for name, uses in self._uses.items():
            given = gradients.pop(name)
            present = [
                (use, g.unsqueeze(1) if single else g)
                for use, g in zip(uses, given, strict=True)
                if g is not None
            ]
            if name not in self.sums:
                like = present[0][1] if present else self._outputs
                dtype, shape = accumulator_dtype(like.dtype), uses[0].shape
                self.sums[name] = torch.zeros(shape, dtype=dtype, device=like.device)
            if present:
                self._add(name, present, samples)

    def _add(self, name: str, uses: list[tuple[DiagonalUse, Tensor]], samples: slice) -> None:
        first, gradient = uses[0]
        dtype = accumulator_dtype(gradient.dtype)
        total = self.sums[name].view(-1)
        n, r = gradient.shape[:2]
        begin, _, _ = samples.indices(n if samples.stop is None else samples.stop)
        looked_up = all(use.use.indices is not None for use, _ in uses)
        rows = sum(use.positions for use, _ in uses)
        compact = looked_up and rows < first.shape[0]
        entries = max(1, rows * first.shape[-1] if compact else total.numel())
        row_step = max(1, min(r, _ENTRIES // entries))
        step = max(1, min(n, _ENTRIES // (entries * row_step)))
        for i in range(0, n, step):
            part = slice(begin + i, begin + min(i + step, n))
            for j in range(0, r, row_step):
                block = [
                    (use, use.values(g[i : i + step, j : j + row_step], part, dtype))
                    for use, g in uses
                ]
                if compact:
                    _add_looked_up(total.view(first.shape), block, part)
                else:
                    shape = block[0][1].shape
                    whole = total.new_zeros(*shape[:2], total.numel())
                    for use, values in block:
                        use.add_(whole, values, part)
                    total += whole.square_().sum((0, 1))


def _add_looked_up(total: Tensor, block: list[tuple[DiagonalUse, Tensor]], samples: slice) -> None:
    """Adds squares of the gradients in rows of an embedding, of those rows alone.

    Args:
        total: [V, d], changed.
        block: uses with their values [n, r, t, d].
        samples: which.
    """
    values = torch.cat([values for _, values in block], 2)
    rows = torch.cat([use.rows[samples] for use, _ in block], 1)
    n, r, t, d = values.shape
    # A sample's look-ups of one row share a place among its t.
    ordered, order = rows.sort(dim=1, stable=True)
    fresh = torch.zeros_like(rows)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.empty_like(rows).scatter_(1, order, fresh.cumsum(1))
    begins = torch.arange(n * r, device=rows.device).reshape(n, r, 1) * t
    index = (begins + place.unsqueeze(1)).reshape(-1)
    sums = add_rows(index, values.reshape(n * r * t, d), n * r * t).reshape(n, r, t, d)
    squares = sums.square_().sum(1).reshape(n * t, d)
    # Places that nothing shares hold zeros, whatever row they are said to be.
    owner = torch.zeros_like(rows).scatter_(1, place, rows).reshape(-1)
    total += add_rows(owner, squares, len(total))
