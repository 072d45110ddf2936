"""The sums of one batch for every layer: inputs at once, output Hessians some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hesskern import ops
from hesskern.factors.at_work import AtWork
from hesskern.factors.diagonal_sums import DiagonalSums
from hesskern.factors.layer_sums import BatchSum, Counted, LayerSums, Layout, SumMemory
from hesskern.passes.layer_uses import LayerUse, positions_of
from hesskern.passes.layers import LayerSpec, unfolded
from hesskern.passes.position_mask import PositionMask
from hesskern.passes.roots import BatchRoots, accumulator_dtype, positions_last

__all__ = ["BatchSums"]

# Gradients with fewer rows than this are added several root rows at a time.
_MANY = 4096

# Entries of rows that are squared at a time.
_SQUARES = 2**22


@dataclass(frozen=True)
class BatchSums:
    """Takes batches apart into sums by layer.

    Attributes:
        specs: the layers, by name.
        memory_budget: bytes for root rows kept at a time beyond one row per layer.
        large: layers of whose output Hessian the diagonal is summed alone.
    """

    specs: dict[str, LayerSpec]
    memory_budget: int
    large: frozenset[str] = frozenset()

    @property
    def _joined(self) -> int:
        """Bytes of small gradients that are joined at a time."""
        return self.memory_budget // 16

    def of(self, roots: BatchRoots, names: list[str], memory: SumMemory) -> BatchSum:
        """The batch's sums of the named layers, valid until the memory's next ones.

        Raises:
            ValueError: NaN or Inf on the host.
        """
        layouts = {
            name: _layout(self.specs[name], roots.uses[name], name in self.large) for name in names
        }
        found: BatchSum | None = None
        at_work = AtWork()
        diagonals = DiagonalSums(roots.diagonal_uses, roots.outputs)
        for name, rows in self._output_rows(roots, names, diagonals):
            # Not before the first rows are there: on their way backwards the model's activations
            # are given back, whose memory the sums then take.
            found = memory.zeros(layouts) if found is None else found
            outputs = at_work.of(found.layers[name].outputs, layouts[name].device)
            if name in self.large:
                _add_squares(outputs, rows)
            else:
                ops.output_hessian_(outputs, rows, beta=found.started(name, "outputs"))
        at_work.put_back()
        found = memory.zeros(layouts) if found is None else found
        found.counts += self._counted(roots, names)
        for name, sums in found.layers.items():
            begun = partial(found.started, name, "inputs")
            add = partial(self._add_inputs, self.specs[name], roots, begun)
            at_work.on_inputs(sums, layouts[name].device, add)
        found.fill()
        for name, sums in found.layers.items():
            roots.check_sums(name, sums.inputs, sums.outputs)
        for name, diagonal in diagonals.finished().items():
            roots.check_diagonal(name, diagonal)
            found.diagonals[name] = diagonal
            found.pieces.append(diagonal)
        return found

    def _counted(self, roots: BatchRoots, names: list[str]) -> list[Counted]:
        """The batch's samples and masked positions, and how often they go into each layer's."""
        whole = dict.fromkeys(names, 0)
        masked: dict[int, tuple[PositionMask, dict[str, int]]] = {}
        for name in names:
            for use in roots.uses[name]:
                if use.mask is None:
                    whole[name] += positions_of(self.specs[name], use)
                else:
                    _, times = masked.setdefault(id(use.mask), (use.mask, {}))
                    times[name] = times.get(name, 0) + 1
        return [
            Counted(roots.count, whole),
            *(Counted(roots.positions(mask), times, False) for mask, times in masked.values()),
        ]

    @staticmethod
    def _add_inputs(
        spec: LayerSpec, roots: BatchRoots, begun: Callable[[], float], sums: LayerSums
    ) -> None:
        """Adds the batch's inputs of one layer to ``begun()`` times its covariance so far."""
        uses = roots.uses[spec.name]
        if roots.weight_root is not None and any(use.ambiguous for use in uses):
            raise ValueError(
                f"layer {spec.name!r} sees rows that act on no output in this batch, so that their "
                "samples, whose weights they need, cannot be told; pass larger batches, or leave "
                "the layer out with layers=[...]"
            )
        assert sums.images is not None
        for use, image in zip(uses, sums.images, strict=True):
            if use.mask is not None:
                _add_data(spec, roots, use, begun(), sums, image)
                continue
            x = roots.inputs(use)
            if spec.kind == "linear":
                rows = x if x.dim() == 2 else x.reshape(-1, spec.weight_inputs)
                ops.input_covariance_(sums.inputs, rows, beta=begun())
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

    def _output_rows(
        self, roots: BatchRoots, names: list[str], diagonals: DiagonalSums
    ) -> Iterator[tuple[str, Tensor]]:
        """Rows to be added to layers' output Hessians, as ``ops.output_hessian_`` takes them.

        Some samples or a few root rows at a time; whoever takes them lets go of them at once.
        """
        blocks = roots.blocks(self.memory_budget)
        if blocks is None:
            return self._single_rows(roots, names, diagonals)
        return self._block_rows(roots, blocks, names, diagonals)

    def _block_rows(
        self,
        roots: BatchRoots,
        blocks: Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]],
        names: list[str],
        diagonals: DiagonalSums,
    ) -> Iterator[tuple[str, Tensor]]:
        for samples, _, gradients in blocks:
            diagonals.take(gradients, samples, False)
            for name in names:
                m = self.specs[name].outputs
                for use, grad in zip(roots.uses[name], gradients[name], strict=True):
                    if grad is None:
                        continue
                    if use.mask is not None:
                        yield name, _data_gradients(use, grad, samples)[None]
                    elif self.specs[name].kind == "linear":
                        yield name, grad.reshape(1, -1, m)
                    elif grad.stride(2) == 1:
                        yield name, grad.movedim((1, 2), (-2, -1)).reshape(1, -1, m)
                    else:
                        yield name, grad.flatten(3)

    def _single_rows(
        self, roots: BatchRoots, names: list[str], diagonals: DiagonalSums
    ) -> Iterator[tuple[str, Tensor]]:
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        held = 0
        for grads in roots.gradients():
            diagonals.take(grads, slice(None), True)
            for name in names:
                for use, grad in zip(roots.uses[name], grads[name], strict=True):
                    if grad is not None:
                        if use.mask is not None:
                            grad = _data_gradients(use, grad.unsqueeze(1))
                        kept[name].append(grad)
                        held += grad.numel() * grad.element_size()
            # From now on they are held by what is kept alone.
            grads.clear()
            # What is joined at a time is held twice.
            if held > self.memory_budget - self._joined:
                yield from self._joined_rows(kept)
                held = 0
        yield from self._joined_rows(kept)

    def _joined_rows(self, kept: dict[str, list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """All gradients kept so far, small ones together; nothing is kept any more behind it."""
        for name, grads in kept.items():
            spec = self.specs[name]
            if spec.kind == "linear" and grads:
                small = grads[0].numel() // spec.outputs < _MANY
                step = max(1, self._joined // max(1, grads[0].nbytes)) if small else 1
                for begin in range(0, len(grads), step):
                    # Samples, rows and positions are all rows of one matrix [., m].
                    part = [g.reshape(1, -1, spec.outputs) for g in grads[begin : begin + step]]
                    yield name, part[0] if len(part) == 1 else torch.cat(part, 1)
            else:
                for grad in grads:
                    # Of masked convolutions there are rows [R, m] already.
                    flat = grad.dim() == 2
                    yield name, grad[None] if flat else positions_last(spec, grad).unsqueeze(1)
            grads.clear()


def _add_squares(diagonal: Tensor, rows: Tensor) -> None:
    """Adds to a diagonal [m] the squares of rows [N, r, m] or [N, r, m, t], a few at a time."""
    if rows.dim() == 4:
        for part in rows.flatten(0, 1):
            diagonal += part.to(diagonal.dtype).square().sum(1)
        return
    flat = rows.reshape(-1, rows.shape[-1])
    for part in flat.split(max(1, _SQUARES // max(1, flat.shape[1]))):
        diagonal += part.to(diagonal.dtype).square().sum(0)


def _layout(spec: LayerSpec, uses: list[LayerUse], large: bool) -> Layout:
    """Shapes of a layer's sums."""
    d, m, x = spec.weight_inputs, spec.outputs, uses[0].x
    return Layout(
        (d, d) if spec.groups == 1 else (spec.groups, d, d),
        (m,) if large else (m, m),
        (spec.groups * d,),
        tuple(tuple(use.x.shape[1:]) for use in uses),
        accumulator_dtype(x.dtype),
        x.device,
        (spec.kind == "linear", not large),
    )


def _add_data(
    spec: LayerSpec,
    roots: BatchRoots,
    use: LayerUse,
    begun: float,
    sums: LayerSums,
    image: Tensor,
) -> None:
    """Adds the inputs of one masked use at the positions that are data to ``begun`` times those."""
    rows = roots.data_rows(spec, use)
    if spec.groups == 1:
        ops.input_covariance_(sums.inputs, rows, beta=begun)
    else:
        for covariance, part in zip(sums.inputs, rows.chunk(spec.groups, 1), strict=True):
            ops.input_covariance_(covariance, part.contiguous(), beta=begun)
    pixels = (spec.kernel_size, spec.stride, spec.padding) == ((1,), (1,), (0,))
    if use.convolution and not pixels:
        # What the windows of masked positions hold cannot be taken out of an image.
        sums.images = None
        if spec.joint:
            sums.column += roots.weighted_again(use, rows).sum(0, dtype=sums.column.dtype)
        return
    roots.add_data_sum(spec, use, rows, image)
    if spec.joint:
        sums.column += unfolded(spec, image).sum(1)


def _data_gradients(use: LayerUse, grad: Tensor, samples: slice = slice(None)) -> Tensor:
    """[R, m] rows at the positions that are data of gradients [n, r, ...] of a masked use."""
    assert use.mask is not None
    n, r = grad.shape[:2]
    if use.convolution:
        return use.mask.select(grad.flatten(3).transpose(2, 3), samples)
    return use.mask.select(grad.reshape(n, r, -1, use.outputs), samples)
