"""EKFAC's eigenvalues: one pass that adds every sample's curvature along given eigenvectors.

S_ij = 1/N sum_n sum_c (u_i^T R_nc v_j)^2 with R_nc = sum_t s_nct x_nt^T, the rows that the layer's
Hessian is made of (George et al. 2018, arXiv 1806.03884). No sample is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hesskern import ops
from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.operators.corrected import CorrectedOperator
from hesskern.operators.samples import LayerColumns
from hesskern.ops import foreach
from hesskern.passes.batches import Batch
from hesskern.passes.data_pass import DataPass, whole_or_halves
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layer_uses import LayerUse, positions_of
from hesskern.passes.layers import LayerSpec
from hesskern.passes.roots import BatchRoots, check_finite

__all__ = ["Corrections"]

# Inputs and gradients that must be put together are so in parts of about this many bytes.
_TOGETHER_BYTES = 2**25


class Corrections:
    """Adds a pass's curvature along eigenvectors.

    Args:
        run: the pass, not yet begun; says which rows.
        layers: by name, eigenvectors and the sums that are added to, their ``values``.
        budget: bytes for root rows kept at a time beyond one row per layer.
    """

    def __init__(self, run: DataPass, layers: Mapping[str, CorrectedOperator], budget: int) -> None:
        self._run, self._layers, self._budget = run, layers, budget
        self._bases = {name: _stacked_bases(layer) for name, layer in layers.items()}

    def add(self, checkpoint: Checkpoint | None = None) -> float:
        """Makes the pass.

        Args:
            checkpoint: of the call, at the stage of this pass; kept on the way.

        Returns:
            weighted number of samples.

        Raises:
            ValueError: NaN or Inf in the data; names layer and batch.
            torch.OutOfMemoryError: for halves of a batch as well.
        """
        run = self._run
        count: float | Tensor = 0.0
        if checkpoint is not None and checkpoint.state is not None:
            count = self._restore(checkpoint.state["pass"])
        with run:
            for batch in run.batches():
                count = count + self._add(batch)
                run.checks.close()
                if checkpoint is not None and checkpoint.due:
                    run.settle()
                    checkpoint.keep({"pass": self._state(count)})
            run.checks.settle()
        return float(count)

    def _state(self, count: float | Tensor) -> dict[str, Any]:
        """All that the rest of the pass depends on, between two batches."""
        return {
            "values": {name: layer.values for name, layer in self._layers.items()},
            "count": count,
            "run": self._run.state(),
            "budget": self._budget,
        }

    def _restore(self, state: Mapping[str, Any] | None) -> float | Tensor:
        """Takes over what :meth:`_state` gave, if it did; the number of samples."""
        if state is None:
            return 0.0
        for name, layer in self._layers.items():
            layer.values.copy_(state["values"][name])
        self._run.restore(state["run"])
        self._budget = state["budget"]
        count = state["count"]
        if isinstance(count, Tensor):
            return count.to(model_device(self._run.model))
        return float(count)

    def _add(self, batch: Batch) -> float | Tensor:
        """Adds a batch as a whole; its weighted number of samples."""
        count: float | Tensor = 0.0
        undo = self._run.checks.drop
        for sums, number in whole_or_halves(batch, lambda part, _: self._sums_of(part), undo):
            foreach.add_([self._layers[name].values for name in sums], list(sums.values()))
            count = count + number
        return count

    def _sums_of(self, batch: Batch) -> tuple[dict[str, Tensor], float | Tensor]:
        """Per layer that the batch reaches its sum [m, d], and the weighted number of samples."""
        run = self._run
        roots = run.roots(batch, run.output, run.mc_samples)
        sums: dict[str, Tensor] = {}
        for name, samples, gradients in self._pieces(roots):
            if name not in sums:
                # Not before the model's activations are given back.
                sums[name] = torch.zeros_like(self._layers[name].values)
            self._add_rows(run.specs[name], roots.uses[name], samples, gradients, sums[name])
        for name, total in sums.items():
            what = f"squared gradients of layer {name!r}"
            check_finite(run.checks, total, what, batch.index)
        return sums, roots.count

    def _pieces(self, roots: BatchRoots) -> Iterator[tuple[str, slice, list[Tensor | None]]]:
        """(layer, samples, gradients [n, r, ...] per use); whoever takes them lets go at once."""
        blocks = roots.blocks(self._budget)
        if blocks is not None:
            for samples, _, gradients in blocks:
                for name in list(gradients):
                    yield name, samples, gradients.pop(name)
            return
        kept: list[dict[str, list[Tensor | None]]] = []
        for gradients in roots.gradients():
            kept.append(gradients)
            # Rows that go together rotate the inputs once; they are held twice while put together.
            if 2 * (len(kept) + 1) * _nbytes(gradients) > self._budget // 8:
                yield from _stacked(kept)
        yield from _stacked(kept)

    def _add_rows(
        self,
        spec: LayerSpec,
        uses: list[LayerUse],
        samples: slice,
        gradients: list[Tensor | None],
        total: Tensor,
    ) -> None:
        """Adds sum_n sum_r (U^T R_nr V)^2 of some samples and root rows."""
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            return
        left, right = self._bases[spec.name]
        (n, rows), use = given[0].shape[:2], uses[0]
        begin = samples.indices(len(use.x))[0]
        alone = len(uses) == 1 and use.mask is None
        if alone and spec.kind == "conv":
            geometry = spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.groups
            x, g = _one_dtype(use.x[begin : begin + n], given[0])
            ops.conv_eigen_correction_(total, g, x, left, right, *geometry, ones=spec.joint)
            return
        step = max(1, n) if alone else _step(spec, uses, rows)
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            columns = LayerColumns(spec, uses, slice(begin + part.start, begin + part.stop))
            cut = [None if gradient is None else gradient[part] for gradient in gradients]
            x, g = _one_dtype(columns.x, columns.gradients(cut, part.stop - part.start, rows))
            ops.eigen_correction_(total, g, x, left, right, ones=spec.joint)


def _step(spec: LayerSpec, uses: list[LayerUse], rows: int) -> int:
    """How many samples' inputs and gradients are put together at a time."""
    positions = sum(positions_of(spec, use) for use in uses)
    size = positions * (spec.groups * spec.inputs + rows * spec.outputs)
    return max(1, _TOGETHER_BYTES // max(1, size * uses[0].x.element_size()))


def _one_dtype(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and gradients in the wider dtype of both, as autocast may have made them differ."""
    if x.dtype == g.dtype:
        return x, g
    dtype = torch.promote_types(x.dtype, g.dtype)
    return x.to(dtype), g.to(dtype)


def _stacked_bases(layer: CorrectedOperator) -> tuple[Tensor, Tensor]:
    """U and V, [m, m] and [d, d], or [groups, m/g, m/g] and [groups, d, d]."""
    left, right, _ = layer.eigenbases
    if layer.groups == 1:
        return left[0], right[0]
    return torch.stack(left), torch.stack(right)


def _nbytes(gradients: dict[str, list[Tensor | None]]) -> int:
    return sum(g.nbytes for layer in gradients.values() for g in layer if g is not None)


def _stacked(
    kept: list[dict[str, list[Tensor | None]]],
) -> Iterator[tuple[str, slice, list[Tensor | None]]]:
    """Root rows' gradients side by side, layer by layer; nothing is kept behind it."""
    for name in list(kept[0]) if kept else []:
        by_use = list(zip(*[rows.pop(name) for rows in kept], strict=True))
        gradients: list[Tensor | None] = []
        for rows in by_use:
            first = next((row for row in rows if row is not None), None)
            if first is None:
                gradients.append(None)
            elif len(rows) == 1:
                gradients.append(first.unsqueeze(1))
            else:
                filled = [torch.zeros_like(first) if row is None else row for row in rows]
                gradients.append(torch.stack(filled, 1))
        del by_use
        yield name, slice(None), gradients
    kept.clear()
