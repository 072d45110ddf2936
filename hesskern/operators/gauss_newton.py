"""The Gauss-Newton matrix over all layers at once, cross-layer blocks included."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.choices import Bias
from hesskern.devices import sent
from hesskern.graph.evidence import Evidence
from hesskern.operators.base import CurvatureOperator, Layout
from hesskern.operators.samples import SampleRows, added_bytes, layer_rows
from hesskern.operators.stacked import StackedGaussNewton
from hesskern.parallel.ranks import Ranks, section_of, telling_of
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_again, whole_model
from hesskern.passes.batches import check_iterable, no_samples
from hesskern.passes.data_pass import RepeatedPass, stored_or_anew, with_less_memory
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import (
    LayerSpec,
    left_out,
    refuse_missing,
    select_layers,
    shared_weights,
)
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.roots import BatchRoots, accumulator_dtype
from hesskern.passes.whole_pass import PassKnowledge, agree_on_pass
from hesskern.progress import Progress, reporter

__all__ = ["GaussNewton"]

Piece = dict[str, SampleRows]
"""By layer, the rows of the same samples and root rows; a layer that was not reached is missing."""


class GaussNewton(CurvatureOperator):
    """G = E[J^T A J] over the weights of all layers, from one pass over the data.

    With r_nc the stacked rows (s_nc^(p) x_n^(p)T)_p of sample n and root row c, G = E[sum_c r r^T];
    its diagonal blocks are the layer-wise Gauss-Newton blocks. For piecewise linear networks these
    are the blocks of the Hessian, which G misses in the blocks between layers only.

    Vectors hold the layers' weights one after the other, each flattened as it is kept; see
    :attr:`slices` and :meth:`split`.

    Args:
        model: runs in eval mode and comes back as it was; must not change while this is in use,
            where the samples exceed ``memory_budget``.
        data: iterable of (inputs, targets) or (inputs, targets, weight [N]), or of what the loss
            takes apart.
        loss: as in :func:`hesskern.kronecker_factors`.
        layers: names from ``model.named_modules()`` or patterns such as ``"*.mlp.*"``, one or
            several; None for all supported.
        bias: "none" (weights only) or "joint" (x~ = [x; 1], d one larger where there is a bias).
        sample_weight: [total samples] non-negative weights, in the order of the data.
        output_root: a custom loss as a function, with ``loss=None``.
        memory_budget: bytes of samples kept; above it every product runs the model again. None for
            4 GiB, on a GPU for a quarter of its free memory; where that runs out, the pass begins
            anew with a quarter of the budget.
        check, position_mask: as in :func:`hesskern.kronecker_factors`.
        progress: True for a bar with the time left, or a callback.
        group: ranks of torch.distributed that all call this, each with its own part of the data,
            as in :func:`hesskern.layer_hessians`.

    Attributes:
        layer_shapes: (m, d) by layer.
        slices: by layer, where its weights stand in a vector.
        num_samples: weighted number of samples.
        cached: whether the samples are stored; with ``ranks``, those of this process.
        ranks: see :class:`hesskern.CurvatureOperator`.
        skipped: modules with parameters that are not part of G, with the reason.
        checked: by layer, how it is known which rows belong to which samples; see
            :class:`hesskern.LayerHessian`.

    Raises:
        ValueError, TypeError, NotImplementedError, RankError: as in
            :func:`hesskern.layer_hessians`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        loss: Any = None,
        layers: str | Iterable[str] | None = None,
        *,
        bias: Bias = "none",
        sample_weight: Tensor | None = None,
        output_root: Callable[..., Tensor] | None = None,
        memory_budget: int | None = None,
        check: bool = True,
        position_mask: Callable[[Any], Any] | None = None,
        progress: bool | Progress = False,
        group: Any = None,
    ) -> None:
        self.ranks = Ranks.of(group)
        with (
            section_of(self.ranks, "the Gauss-Newton matrix"),
            whole_model(self.ranks, model) as model,
        ):
            check_iterable(data)
            specs, self.skipped = select_layers(model, layers, bias)
            for name, owner in shared_weights(model, specs).items():
                # A weight is there once, with all its uses.
                del specs[name]
                self.skipped[name] = f"shares its weight with {owner!r}, which stands for both"
            resolved, report = resolve_loss(loss, output_root), reporter(progress)
            if self.ranks is not None:
                masked = position_mask is not None
                settings = {"bias": bias, "check": check, "position_mask given": masked}
                agree_on_pass(self.ranks, self.described, model, specs, resolved, settings)
                sample_weight = weights_of_part(self.ranks, data, sample_weight, 2)
                report = self.ranks.watching(self.described, report)
            evidence, mask = Evidence(check), checked_mask(position_mask)

            def attempt(budget: int) -> tuple[_Pass, list[Piece] | None]:
                given = model, data, resolved, specs, sample_weight, evidence
                source = _Pass(*given, budget, position_mask=mask, ranks=self.ranks)
                return source, source.within_budget(source(report), _added, "the samples' rows")

            source, pieces = with_less_memory(attempt, memory_budget, model, data)
            known = source.known.of_all(self.ranks)
            if not known.count > 0:
                raise no_samples(", so there is no Gauss-Newton matrix")
            reasons = known.reasons
            refuse_missing(specs, reasons)
            self.skipped.update(reasons)
            reached = [spec for name, spec in specs.items() if name not in reasons]
            if not reached:
                raise ValueError(f"no layer of the model has curvature: {reasons}")
            self.skipped = left_out(model, self.skipped, reached, 2 if layers is None else None)
            source.require(spec.name for spec in reached)
            self.checked = {s.name: known.checked.get(s.name, "graph") for s in reached}
            self.layer_shapes = {spec.name: spec.shape for spec in reached}
            self._transposed = [spec.name for spec in reached if spec.transposed]
            self.slices: dict[str, slice] = {}
            size = 0
            for name, (m, d) in self.layer_shapes.items():
                self.slices[name] = slice(size, size + m * d)
                size += m * d
            self.shape = (size, size)
            self.dtype = torch.float32
            for dtype in known.dtypes.values():
                self.dtype = torch.promote_types(self.dtype, dtype)
            self.device = model_device(model)
            self.num_samples = known.count
            self.cached = pieces is not None
            # Around the model, where a rank runs it again.
            self._whole = whole_again(self.ranks, model, not self.cached)
            self._chunks: list[Piece] | _Pass = source
            if pieces is not None:
                # Without layers that fit here and on another rank not.
                ours = ({n: piece[n] for n in piece if n in self.slices} for piece in pieces)
                self._chunks = [piece for piece in ours if piece]
            self._input_means = self._means(source.input_sums)

    @property
    def described(self) -> str:
        return "the Gauss-Newton matrix"

    @contextmanager
    def _pieces(self) -> Iterator[Iterable[Piece]]:
        """This process's samples; other ranks learn of an error inside the block."""
        with (
            telling_of(self.ranks, self.described),
            self._whole(),
            stored_or_anew(self._chunks) as pieces,
        ):
            yield pieces

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """[d] by layer, E[x] of all data, for the layers that have one input vector per sample."""
        if self.ranks is not None:
            found = self.ranks.told(
                "layers of sums", {name: [len(t), str(t.dtype)] for name, t in sums.items()}
            )
            known = {name: facts for part in found for name, facts in part.items()}
            for name, (size, dtype) in known.items():
                if name not in sums:
                    kind = getattr(torch, dtype.removeprefix("torch."))
                    sums[name] = torch.zeros(size, dtype=kind, device=self.device)
            self.ranks.sum_([sums[name] for name in known])
        return {name: total / self.num_samples for name, total in sums.items()}

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """By layer, the matrices [m, d] of a vector [P], or [k, m, d] of a block [P, k]."""
        return self._matrices(self._inward(vectors.T if vectors.dim() == 2 else vectors))

    def _matrices(self, rows: Tensor) -> dict[str, Tensor]:
        """The same of rows [P] or [k, P], output first."""
        shape = rows.shape[:-1]
        return {
            name: rows[..., part].reshape(*shape, *self.layer_shapes[name])
            for name, part in self.slices.items()
        }

    def _layout(self) -> Layout:
        kept = self._transposed
        return tuple((name, shape, name in kept) for name, shape in self.layer_shapes.items())

    def _inward(self, rows: Tensor) -> Tensor:
        return self._turned(rows, flip=True)

    def _outward(self, rows: Tensor) -> Tensor:
        return self._turned(rows, flip=False)

    def _turned(self, rows: Tensor, flip: bool) -> Tensor:
        """Rows [..., P] with the matrices of weights that are kept [d, m] transposed."""
        if not self._transposed:
            return rows
        rows = rows.clone()
        for name in self._transposed:
            part, (m, d) = rows[..., self.slices[name]], self.layer_shapes[name]
            shape = (d, m) if flip else (m, d)
            part.copy_(part.unflatten(-1, shape).mT.flatten(-2).clone())
        return rows

    def _matmul(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block, memory_format=torch.contiguous_format)
        vectors = self._matrices(block)
        with self._pieces() as pieces:
            for piece in pieces:
                # Layers of a model in several precisions have rows of several.
                along = sum(
                    _along(rows, vectors[name].to(rows.s.dtype)).to(self.dtype)
                    for name, rows in piece.items()
                )
                assert isinstance(along, Tensor)
                for name, rows in piece.items():
                    total[:, self.slices[name]] += _combined(rows, along.to(rows.s.dtype))
            self._of_ranks(total, block=block)
        return total.div_(self.num_samples)

    def trace(self) -> float:
        """Sum of the eigenvalues, exact."""
        with self._pieces() as pieces:
            total = math.fsum(float(r.shares().sum()) for piece in pieces for r in piece.values())
            total = self._number_of_ranks(total)
        return total / self.num_samples

    def diagonal(self) -> Tensor:
        """[P] diagonal, exact."""
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        with self._pieces() as pieces:
            for piece in pieces:
                for name, rows in piece.items():
                    total[self.slices[name]] += rows.diagonal()
            self._of_ranks(total)
        return self._outward(total.div_(self.num_samples))

    def to_dense(self) -> Tensor:
        """[P, P]; for small networks."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        with self._pieces() as pieces:
            for piece in pieces:
                first = next(iter(piece.values()))
                rows = torch.zeros(
                    first.s.shape[0] * first.s.shape[1], self.shape[0], dtype=self.dtype
                ).to(self.device)
                for name, part in piece.items():
                    rows[:, self.slices[name]] = torch.cat(list(part.dense_rows()))
                ops.input_covariance_(total, rows, 1.0 / self.num_samples)
            self._of_ranks(total, upper=True)
        return self._outward_matrix(ops.mirror_(total))

    def stacked(self) -> StackedGaussNewton:
        """G with every layer's inputs replaced by their mean: rank sum of m at the most.

        Raises:
            NotImplementedError: a layer is a convolution or sees sequences.
        """
        sizes = [m for m, _ in self.layer_shapes.values()]
        hessian = torch.zeros(sum(sizes), sum(sizes), dtype=self.dtype, device=self.device)
        means = self._input_means
        for name, (_, d) in self.layer_shapes.items():
            if name in self._transposed:
                raise NotImplementedError(
                    f"layer {name!r} keeps its weight transposed, and has no stacked form"
                )
            if name not in means or means[name].shape != (d,):
                raise NotImplementedError(
                    f"layer {name!r} is a convolution or sees sequences; the stacked output "
                    "Hessian is defined for linear layers with inputs [N, d]"
                )
        with self._pieces() as pieces:
            for piece in pieces:
                first = next(iter(piece.values())).s
                rows = [
                    piece[name].s.to(self.dtype)
                    if name in piece
                    else first.new_zeros(*first.shape[:2], m, dtype=self.dtype)
                    for name, (m, _) in self.layer_shapes.items()
                ]
                stacked = torch.cat(rows, 2).flatten(0, 1)
                ops.input_covariance_(hessian, stacked, 1.0 / self.num_samples)
            self._of_ranks(hessian, upper=True)
        ordered = [means[name] for name in self.layer_shapes]
        return StackedGaussNewton(ops.mirror_(hessian), ordered, sizes)


def _added(piece: Piece, before: Piece | None) -> int:
    """Bytes that keeping a piece takes beside the one before it."""
    return sum(added_bytes(rows, (before or {}).get(name)) for name, rows in piece.items())


def _along(rows: SampleRows, vectors: Tensor) -> Tensor:
    """[N, r, k] inner products <R_nc, V_j> of rows with matrices V [k, m, d]."""
    k = len(vectors)
    if rows.stored:
        return torch.matmul(rows.s, vectors.reshape(k, -1).T) * rows.x.unsqueeze(2)
    if rows.x.dim() == 2:
        images = (rows.x @ vectors.flatten(0, 1).T).unflatten(1, (k, -1))
    else:
        images = torch.matmul(vectors.flatten(0, 1), rows.x).unflatten(1, (k, -1)).flatten(2)
    return torch.matmul(rows.s.flatten(2), images.transpose(1, 2))


def _combined(rows: SampleRows, along: Tensor) -> Tensor:
    """[k, m d] sums of a_ncj R_nc over samples and root rows, for a [N, r, k]."""
    if rows.stored:
        weighted = (along * rows.x.unsqueeze(2)).flatten(0, 1)
        return weighted.T @ rows.s.flatten(0, 1)
    weighted = torch.matmul(along.transpose(1, 2), rows.s.flatten(2))
    n, k = weighted.shape[:2]
    if rows.x.dim() == 2:
        return (weighted.flatten(1).T @ rows.x).reshape(k, -1)
    (m, t), d = rows.s.shape[2:], rows.x.shape[1]
    outputs = weighted.reshape(n, k * m, t).transpose(0, 1).reshape(k * m, n * t)
    inputs = rows.x.transpose(1, 2).reshape(n * t, d)
    return (outputs @ inputs).reshape(k, m * d)


@dataclass
class _Pass(RepeatedPass):
    """One pass over the data: the rows of all layers, piece by piece.

    Attributes:
        known: what the last pass has found out.
        input_sums: [d] by layer, weighted sums of x of layers without positions.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.known: PassKnowledge
        self.input_sums: dict[str, Tensor] = {}

    def _what(self) -> str:
        return "the Gauss-Newton matrix"

    def __call__(self, progress: Progress | None = None) -> Generator[Piece, None, None]:
        sums: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        with self.run(progress, "Gauss-Newton matrix") as run:
            for _, roots in run:
                for name in roots.uses:
                    dtypes[name] = accumulator_dtype(roots.uses[name][0].x.dtype)
                    _add_inputs(sums, self.specs[name], roots)
                yield from self._batch(roots)
        self.input_sums = sums
        self.known = PassKnowledge.of(run, dtypes)

    def _batch(self, roots: BatchRoots) -> Iterator[Piece]:
        piece: Piece = {}
        reached = sum(name in roots.uses for name in self.specs)
        for name, rows in layer_rows(self.specs, roots, self.budget):
            piece[name] = rows
            if len(piece) == reached:
                # Before the next one is begun, which needs the memory.
                yield piece
                piece = {}


def _add_inputs(sums: dict[str, Tensor], spec: LayerSpec, roots: BatchRoots) -> None:
    """Adds a batch's weighted sum of inputs, where the layer has one input vector per sample."""
    uses = roots.uses[spec.name]
    several = len(uses) > 1 or uses[0].x.dim() != 2 or spec.kind != "linear"
    if several or uses[0].mask is not None:
        return
    x = uses[0].x.to(accumulator_dtype(uses[0].x.dtype))
    total = x.sum(0) if roots.weight_root is None else roots.weight_root.square().to(x) @ x
    if spec.joint:
        count = torch.as_tensor(roots.count, dtype=torch.float64)
        total = torch.cat([total, sent(count, total.device).to(total.dtype).reshape(1)])
    sums[spec.name] = sums[spec.name] + total if spec.name in sums else total
