"""What every layer takes: of what a shape run has made, and of one batch's root rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hesskern.devices import on_host
from hesskern.graph.evidence import Evidence
from hesskern.operators.layer_hessian import LayerHessian
from hesskern.passes.batches import batches
from hesskern.passes.data_pass import DataPass
from hesskern.passes.forward_pass import model_device
from hesskern.passes.input_batches import inputs_alone
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layer_uses import LayerUse, positions_of, positions_of_image
from hesskern.passes.layers import LayerSpec, select_layers
from hesskern.passes.losses import resolve_loss
from hesskern.passes.roots import accumulator_dtype
from hesskern.planning.requests import Request
from hesskern.planning.shape_run import KernelCall

__all__ = ["BatchRows", "batch_rows", "held_by", "model_bytes", "total", "workspace_of"]


@dataclass(frozen=True)
class BatchRows:
    """Of one batch.

    Attributes:
        count: root rows per sample.
        positions: by layer, per sample.
        uses: calls of all layers.
        nbytes: by layer, of all root rows at the layer's outputs.
        samples: by layer, of what a Hessian stores of the batch.
        single: whether rows go backwards one by one, through all of the batch.
    """

    count: int
    positions: Mapping[str, int]
    uses: int = 0
    nbytes: Mapping[str, int] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)
    single: bool = False


def batch_rows(request: Request, model: nn.Module, data: Iterable[Any]) -> BatchRows:
    """Layers' positions and root rows in a batch; inside a shape run, or with values.

    Args:
        request: which layers and rows.
        model, data: the model and one batch.
    """
    specs, _ = select_layers(model, request.layers, request.bias)
    if request.what == "inputs":
        return BatchRows(0, _seen_positions(model, data, specs))
    run = DataPass(
        model,
        data,
        resolve_loss(request.loss, request.output_root),
        specs,
        evidence=Evidence(request.check),
        position_mask=request.position_mask,
        linear_use=request.what != "hessians",
        output=request.output,
        mc_samples=request.mc_samples,
    )
    positions, nbytes, samples = {}, {}, {}
    count = calls = 0
    single = False
    with run:
        for _, roots in run:
            count, single = roots.rows, roots.blocks(2**30) is None
            for name, uses in roots.uses.items():
                positions[name] = sum(positions_of(specs[name], use) for use in uses)
                calls += len(uses)
                x = uses[0].x
                rows = sum(_rows_of(specs[name], use) for use in uses)
                nbytes[name] = count * rows * specs[name].outputs * x.element_size()
                samples[name] = _stored(specs[name], uses, positions[name], count)
    return BatchRows(count, positions, calls, nbytes, samples, single)


def _rows_of(spec: LayerSpec, use: LayerUse) -> int:
    """Positions of all samples in a use, but those that are masked."""
    if use.mask is not None and on_host(use.mask.counts):
        return int(use.mask.counts.sum())
    return len(use.x) * positions_of(spec, use)


def _stored(spec: LayerSpec, uses: list[LayerUse], t: int, rows: int) -> int:
    """Bytes of what a Hessian stores of a batch: inputs and gradients, or rows where smaller."""
    (m, d), n = spec.shape, len(uses[0].x)
    if len(uses) == 1 and uses[0].x.dim() == 2:
        numbers = n * (d + rows * m)
    elif spec.groups > 1 or rows * m * d < rows * m * t + d * t:
        numbers = n * (1 + rows * m * d)
    else:
        numbers = n * t * (d + rows * m)
    return numbers * accumulator_dtype(uses[0].x.dtype).itemsize


def _seen_positions(
    model: nn.Module, data: Iterable[Any], specs: dict[str, LayerSpec]
) -> dict[str, int]:
    """Positions per sample of layers, as hooks see their inputs."""

    def take(spec: LayerSpec, x: Tensor, _: Hashable) -> tuple[int, int]:
        if spec.kind == "linear":
            return x.shape[0], x[..., 0].numel()
        return x.shape[0], x.shape[0] * positions_of_image(spec, x.shape)

    split = inputs_alone(model)
    (batch,) = batches(data, model_device(model), split=split)
    with InputCapture(model, specs) as capture:
        found = capture.run(batch, lambda: take)
    samples = min((calls[0][0] for calls in found.values()), default=1) or 1
    return {name: sum(total for _, total in calls) // samples for name, calls in found.items()}


def held_by(what: str, result: Any) -> dict[str, list[Tensor]]:
    """By layer the tensors that a result holds of it; those in common count for the first."""
    found: dict[str, list[Tensor]] = {}
    seen: set[Any] = set()
    for name in result:
        own = []
        for tensor in _tensors(what, result, name):
            storage = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
            if storage not in seen:
                seen.add(storage)
                own.append(tensor)
        found[name] = own
    if what == "factors":
        for name, layer in result.large.items():
            found[name] = [layer.input_covariance, layer.output_diagonal]
    return found


def _tensors(what: str, result: Any, name: str) -> list[Tensor]:
    if what == "inputs":
        sums = result._sums.by_layer[name]
        return [sums.inputs, sums.column]
    layer = result[name]
    if what == "ekfac":
        left, right, _ = layer.eigenbases
        return [*left, *right, layer.values]
    if isinstance(layer, LayerHessian):
        chunks = layer._chunks
        return [t for c in chunks for t in (c.x, c.s)] if isinstance(chunks, list) else []
    return [layer.output_hessian, layer.input_covariance, *(layer.input_images or ())]


def workspace_of(spec: LayerSpec, calls: list[KernelCall]) -> int:
    """The most that kernels took inside for accumulators of the layer's shapes."""
    m, d, g = spec.outputs, spec.weight_inputs, spec.groups
    shapes = {(m, m), (d, d), (g, d, d), (m, spec.inputs)}
    return max((call.workspace for call in calls if call.shape in shapes), default=0)


def model_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def total(tensors: list[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
