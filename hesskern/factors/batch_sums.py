"""The sums of one batch for every layer: inputs at once, output Hessians some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.layer_sums import BatchSum, LayerSums, Layout, SumMemory
from hesskern.graph.nodes import product
from hesskern.passes.layer_uses import LayerUse
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.passes.roots import BatchRoots, accumulator_dtype, positions_last

__all__ = ["BatchSums"]

# Gradients with fewer rows than this are added several root rows at a time.
_MANY = 4096


@dataclass(frozen=True)
class BatchSums:
    """Takes batches apart into sums by layer.

    Attributes:
        specs: the layers, by name.
        memory_budget: bytes for root rows kept at a time beyond one row per layer.
    """

    specs: dict[str, LayerSpec]
    memory_budget: int

    @property
    def _joined(self) -> int:
        """Bytes of small gradients that are joined at a time."""
        return self.memory_budget // 16

    def of(self, roots: BatchRoots, names: list[str], memory: SumMemory) -> BatchSum:
        """The batch's sums of the named layers, valid until the memory's next ones.

        Raises:
            ValueError: NaN or Inf on the host.
        """
        found = memory.zeros({name: _layout(self.specs[name], roots.uses[name]) for name in names})
        positions = {
            name: sum(_positions(self.specs[name], use) for use in roots.uses[name])
            for name in names
        }
        found.counts.append((roots.count, positions))
        for name, sums in found.layers.items():
            self._add_inputs(self.specs[name], roots, sums)
        self._add_outputs(roots, found.layers, positions)
        return found

    @staticmethod
    def _add_inputs(spec: LayerSpec, roots: BatchRoots, sums: LayerSums) -> None:
        """Adds the batch's inputs of one layer."""
        uses = roots.uses[spec.name]
        if roots.weight_root is not None and any(use.ambiguous for use in uses):
            raise ValueError(
                f"layer {spec.name!r} sees rows that act on no output in this batch, so that their "
                "samples, whose weights they need, cannot be told; pass larger batches, or leave "
                "the layer out with layers=[...]"
            )
        assert sums.images is not None
        for use, image in zip(uses, sums.images, strict=True):
            x = roots.inputs(use)
            if spec.kind == "linear":
                rows = x if x.dim() == 2 else x.reshape(-1, spec.weight_inputs)
                ops.input_covariance_(sums.inputs, rows)
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
            roots.add_input_sum(spec.name, use, x, image)
            if spec.joint:
                sums.column += unfolded(spec, image).sum(1)

    def _add_outputs(
        self, roots: BatchRoots, fresh: dict[str, LayerSums], positions: dict[str, int]
    ) -> None:
        """Adds the batch's output Hessians, some samples or a few root rows at a time."""
        share = {name: 1.0 / max(positions[name], 1) for name in fresh}
        blocks = roots.blocks(self.memory_budget)
        if blocks is None:
            self._add_rows(roots, fresh, share)
        else:
            self._add_blocks(blocks, fresh, share)
        for name, sums in fresh.items():
            roots.check_sums(name, sums.inputs, sums.outputs)

    def _add_blocks(
        self,
        blocks: Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]],
        fresh: dict[str, LayerSums],
        share: dict[str, float],
    ) -> None:
        for _, _, gradients in blocks:
            for name, sums in fresh.items():
                m = self.specs[name].outputs
                for grad in gradients[name]:
                    if grad is None:
                        continue
                    if self.specs[name].kind == "linear":
                        rows = grad.reshape(1, -1, m)
                    elif grad.stride(2) == 1:
                        rows = grad.movedim((1, 2), (-2, -1)).reshape(1, -1, m)
                    else:
                        rows = grad.flatten(3)
                    ops.output_hessian_(sums.outputs, rows, alpha=share[name])

    def _add_rows(
        self, roots: BatchRoots, fresh: dict[str, LayerSums], share: dict[str, float]
    ) -> None:
        kept: dict[str, list[Tensor]] = {name: [] for name in fresh}
        held = 0
        for grads in roots.gradients():
            for name in fresh:
                for grad in grads[name]:
                    if grad is not None:
                        kept[name].append(grad)
                        held += grad.numel() * grad.element_size()
            # What is joined at a time is held twice.
            if held > self.memory_budget - self._joined:
                self._flush(kept, fresh, share)
                held = 0
        self._flush(kept, fresh, share)

    def _flush(
        self, kept: dict[str, list[Tensor]], fresh: dict[str, LayerSums], share: dict[str, float]
    ) -> None:
        for name, grads in kept.items():
            spec, target = self.specs[name], fresh[name].outputs
            if spec.kind == "linear" and grads:
                small = grads[0].numel() // spec.outputs < _MANY
                step = max(1, self._joined // max(1, grads[0].nbytes)) if small else 1
                for begin in range(0, len(grads), step):
                    # Samples, rows and positions are all rows of one matrix [., m].
                    part = [g.reshape(1, -1, spec.outputs) for g in grads[begin : begin + step]]
                    block = part[0] if len(part) == 1 else torch.cat(part, 1)
                    ops.output_hessian_(target, block, alpha=share[name])
            else:
                for grad in grads:
                    rows_t = positions_last(spec, grad).unsqueeze(1)
                    ops.output_hessian_(target, rows_t, alpha=share[name])
            grads.clear()


def _layout(spec: LayerSpec, uses: list[LayerUse]) -> Layout:
    """Shapes of a layer's sums."""
    d, m, x = spec.weight_inputs, spec.outputs, uses[0].x
    return Layout(
        (d, d) if spec.groups == 1 else (spec.groups, d, d),
        (m, m),
        (spec.groups * d,),
        tuple(tuple(use.x.shape[1:]) for use in uses),
        accumulator_dtype(x.dtype),
        x.device,
    )


def _positions(spec: LayerSpec, use: LayerUse) -> int:
    """Positions per sample of one use."""
    x = use.x
    if spec.kind == "linear":
        return product(x.shape[1:-1]) if len(x) and x.shape[-1] else 1
    count = 1
    axes = zip(x.shape[2:], spec.kernel_size, spec.stride, spec.padding, spec.dilation, strict=True)
    for size, kernel, stride, padding, dilation in axes:
        count *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return count
