"""What a convolution's Kronecker form leaves out: where in the image input and gradient meet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.choices import Bias
from hesskern.graph.evidence import Evidence
from hesskern.operators.base import LayerOperator
from hesskern.operators.samples import layer_rows
from hesskern.passes.batches import check_iterable, no_samples
from hesskern.passes.data_pass import RepeatedPass, stored_or_anew, with_less_memory
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec, select_layers
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.roots import BatchRoots, accumulator_dtype
from hesskern.progress import Progress, reporter

__all__ = ["PositionMeanHessian", "position_mean_hessian"]


@dataclass(frozen=True)
class _Chunk:
    """Some samples: M_n [N, m, m], and X_n [N, d, t] or, where smaller, X_n X_n^T [N, d, d]."""

    outputs: Tensor
    inputs: Tensor
    squared: bool

    @property
    def nbytes(self) -> int:
        return self.outputs.nbytes + self.inputs.nbytes


class PositionMeanHessian(LayerOperator):
    """E[M_n (x) X_n X_n^T]: a layer's Hessian with gradients averaged over positions, per sample.

    With positions t a sample's exact share of the Hessian is sum_tt' M_n,tt' (x) x_nt x_nt'^T.
    The Kronecker form of arXiv 2010.04261, section 3, takes two steps away from it:

    1. M_n,tt' is replaced by M_n = (1/T) sum_t M_n,tt for t = t' and dropped for t != t', and
       what is left, sum_t x_nt x_nt^T, is X_n X_n^T: this operator.
    2. The mean of products becomes the product of the means, E[M_n] (x) E[X_n X_n^T].

    ``decoupling_error(H, this)`` is the price of the first step alone. Without positions the first
    step changes nothing, and this is the exact Hessian.

    Attributes:
        layer_shape: (m, d).
        num_samples: weighted number of samples.
        cached: whether the samples are stored; False: every product runs the model again.
    """

    def __init__(
        self,
        spec: LayerSpec,
        chunks: list[_Chunk] | _Pass,
        num_samples: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layer_shape, self.transposed = spec.shape, spec.transposed
        size = spec.outputs * spec.inputs
        self.shape = (size, size)
        self.num_samples = num_samples
        self.dtype, self.device = dtype, device
        self.cached = isinstance(chunks, list)
        self._chunks = chunks

    def _matmul(self, block: Tensor) -> Tensor:
        m, d = self.layer_shape
        total = torch.zeros_like(block)
        with stored_or_anew(self._chunks) as chunks:
            for chunk in chunks:
                for row, out in zip(block, total, strict=True):
                    images = torch.matmul(chunk.outputs, row.reshape(m, d))
                    if chunk.squared:
                        # sum_n A_n C_n as one product: samples and columns are contracted together.
                        stacked = images.transpose(0, 1).reshape(m, -1)
                        out += (stacked @ chunk.inputs.reshape(-1, d)).flatten()
                    else:
                        weights = torch.matmul(images, chunk.inputs).transpose(0, 1).reshape(m, -1)
                        columns = chunk.inputs.transpose(1, 2).reshape(-1, d)
                        out += (weights @ columns).flatten()
        return total / self.num_samples

    def trace(self) -> float:
        with stored_or_anew(self._chunks) as chunks:
            total = sum(
                float((_diagonals(c.outputs).sum(1) * _input_diagonals(c).sum(1)).sum())
                for c in chunks
            )
        return total / self.num_samples

    def diagonal(self) -> Tensor:
        total = torch.zeros(self.layer_shape, dtype=torch.float64, device=self.device)
        with stored_or_anew(self._chunks) as chunks:
            for chunk in chunks:
                total += _diagonals(chunk.outputs).T @ _input_diagonals(chunk)
        return self._outward((total / self.num_samples).flatten()).to(self.dtype)


def _diagonals(matrices: Tensor) -> Tensor:
    """[N, m] float64 of [N, m, m]."""
    return matrices.diagonal(dim1=1, dim2=2).double()


def _input_diagonals(chunk: _Chunk) -> Tensor:
    """[N, d] float64: diagonals of X_n X_n^T."""
    if chunk.squared:
        return _diagonals(chunk.inputs)
    return chunk.inputs.square().sum(2, dtype=torch.float64)


def position_mean_hessian(
    model: nn.Module,
    data: Iterable[Any],
    loss: Any,
    layer: str,
    *,
    bias: Bias = "none",
    sample_weight: Tensor | None = None,
    output_root: Callable[..., Tensor] | None = None,
    memory_budget: int | None = None,
    position_mask: Callable[[Any], Any] | None = None,
    progress: bool | Progress = False,
) -> PositionMeanHessian:
    """E[M_n (x) X_n X_n^T] of one layer, in one pass; see :class:`PositionMeanHessian`.

    Args:
        model, data, loss, bias, sample_weight, output_root: as in :func:`hesskern.layer_hessians`;
            the weights must not change while this is in use, where the samples exceed
            ``memory_budget``.
        layer: name of a Linear or Conv2d layer with one group.
        memory_budget: bytes of M_n and X_n kept; above it every product runs the model again. None
            for 4 GiB, on a GPU for a quarter of its free memory; where that runs out, the pass
            begins anew with a quarter of the budget.
        position_mask: which positions are data, as in :func:`hesskern.kronecker_factors`; M_n is
            the mean over those of sample n.
        progress: True for a bar with the time left, or a callback.

    Raises:
        ValueError: the layer is unknown or not reached, data is empty, or its samples exceed the
            budget and it can be iterated only once.
        NotImplementedError: the layer is a grouped convolution.
    """
    check_iterable(data)
    resolved = resolve_loss(loss, output_root)
    specs, _ = select_layers(model, [layer], bias)
    spec = specs[layer]
    if spec.groups > 1:
        raise NotImplementedError(
            f"layer {layer!r} has {spec.groups} groups and no single input covariance"
        )
    report, evidence, mask = reporter(progress), Evidence(), checked_mask(position_mask)

    def attempt(budget: int) -> tuple[_Pass, list[_Chunk] | None]:
        given = model, data, resolved, specs, sample_weight, evidence
        source = _Pass(*given, budget, position_mask=mask)
        whose = f"the samples of layer {layer!r}"
        return source, source.within_budget(source(report), lambda chunk, _: chunk.nbytes, whose)

    source, chunks = with_less_memory(attempt, memory_budget, model, data)
    if not source.count > 0:
        raise no_samples()
    if chunks is not None and not chunks:
        raise ValueError(f"layer {layer!r} was not reached")
    return PositionMeanHessian(
        spec,
        source if chunks is None else chunks,
        source.count,
        source.dtype,
        model_device(model),
    )


@dataclass
class _Pass(RepeatedPass):
    """One pass over the data: M_n and X_n of a batch at a time.

    Attributes:
        count: weighted number of samples, after a pass.
        dtype: of what is kept of them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.name,) = self.specs
        self.count = 0.0
        self.dtype = torch.float32

    def _what(self) -> str:
        return f"the operator of layer {self.name!r}"

    def __call__(self, progress: Progress | None = None) -> Generator[_Chunk, None, None]:
        with self.run(progress, f"samples of {self.name}") as run:
            for _, roots in run:
                if self.name in roots.uses:
                    self.dtype = accumulator_dtype(roots.uses[self.name][0].x.dtype)
                    chunk = _chunk(self.specs, roots, self.budget)
                    if chunk is not None:
                        yield chunk
        self.count = run.count


def _chunk(specs: dict[str, LayerSpec], roots: BatchRoots, budget: int) -> _Chunk | None:
    """M_n and X_n of one batch."""
    outputs, inputs = None, None
    (name,) = specs
    positions = roots.sample_positions(name)
    if isinstance(positions, Tensor):
        # A sample of masked positions alone has nothing to be averaged.
        positions = positions.clamp(min=1)
    for _, rows in layer_rows(specs, roots, budget, keep_positions=True):
        s = rows.s if rows.s.dim() == 4 else rows.s.unsqueeze(3)
        inputs = rows.x if rows.x.dim() == 3 else rows.x.unsqueeze(2)
        # [N, m, r t]: all root rows and positions of a sample beside each other.
        beside = s.transpose(1, 2).flatten(2)
        part = torch.matmul(beside, beside.transpose(1, 2)).div_(positions)
        outputs = part if outputs is None else outputs + part
    if outputs is None or inputs is None:
        return None
    d, t = inputs.shape[1:]
    if t >= d:
        return _Chunk(outputs, torch.matmul(inputs, inputs.transpose(1, 2)), True)
    return _Chunk(outputs, inputs.contiguous(), False)
