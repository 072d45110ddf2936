"""Root rows of a batch for every layer: what factors and Hessians both accumulate from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesskern.choices import Output, check_choice
from hesskern.devices import on_host, sent
from hesskern.ops.reference import unfold
from hesskern.passes.batches import Batch
from hesskern.passes.capture import Capture
from hesskern.passes.checks import Checks, check_dense
from hesskern.passes.diagonal_uses import DiagonalUse
from hesskern.passes.draws import Draws, check_seed
from hesskern.passes.layer_uses import LayerUse, positions_of
from hesskern.passes.layers import LayerSpec
from hesskern.passes.losses import Loss, Rows
from hesskern.passes.masks import masked_diagonals, masked_uses
from hesskern.passes.position_mask import PositionMask

__all__ = [
    "BatchRoots",
    "accumulator_dtype",
    "check_finite",
    "check_fraction",
    "check_output",
    "checked_targets",
    "given_weights",
    "positions_last",
    "sample_weights",
]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything below."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_finite(
    checks: Checks,
    tensor: Tensor,
    what: str,
    batch: int,
    total: Tensor | None = None,
    place: int | None = None,
) -> None:
    """Requires that a tensor holds no NaN or Inf, at the price of its sum or extremes.

    Args:
        checks: of the pass.
        tensor: any shape; on a device it must keep its values until ``checks`` has looked at it.
        what: for the message, e.g. "inputs of layer 'fc1'".
        batch: index of the batch, for the message.
        total: sums of the tensor's entries, where the caller has them.
        place: of the condition among those of the batch.

    Raises:
        ValueError: an entry is NaN or Inf, and the tensor lies on the host.
    """
    if not tensor.numel():
        return

    def message() -> str:
        return (
            f"data: {what} contain NaN or Inf in batch {batch}; nothing of this batch was "
            "accumulated"
        )

    if not on_host(tensor):
        checks.require_finite(tensor, message, place)
        return
    # A sum is finite only if every entry is; it may also overflow: a bad one is looked into.
    total = tensor.sum() if total is None else total.sum()
    if not math.isfinite(total.item()):
        checks.require(torch.isfinite(tensor).all(), message)


def checked_targets(loss: Loss, outputs: Tensor, batch: Batch, checks: Checks) -> Any:
    """The batch's targets on the outputs' device, checked where they came from.

    Raises:
        ValueError, TypeError: they do not fit the outputs [N, ...].
    """
    given = loss.check(outputs, batch.given_targets, checks)
    return given if batch.given_targets is batch.targets else batch.targets


def given_weights(batch: Batch, samples: int, checks: Checks) -> Tensor | None:
    """[N] weights of a batch's samples as they were given, where they came from, or None.

    Args:
        batch: with its weights.
        samples: N.
        checks: of the pass.

    Raises:
        TypeError: the weights are no floating-point numbers, or sparse.
        ValueError: the weights are not [N], or not finite and non-negative.
    """
    weight = batch.weight
    if weight is None:
        return None
    if isinstance(weight, Tensor):
        _check_weight_type(weight)
    if not isinstance(weight, Tensor) or weight.shape != (samples,):
        found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"sample_weight must be [N] = [{samples}] per batch, got {found}")
    if samples:
        least, most = weight.aminmax()
        checks.require(
            # Written so that NaN, which both are if one weight is, fails.
            (least >= 0) & (most < math.inf),
            lambda least, most: (
                "sample_weight must be finite and non-negative, got "
                f"{most if least >= 0 else least} in batch {batch.index}"
            ),
            least,
            most,
        )
    return weight


def sample_weights(
    batch: Batch, outputs: Tensor, loss: Loss, checks: Checks
) -> tuple[Tensor | None, float | Tensor]:
    """Weights of a batch's samples, and their sum.

    Args:
        batch: with its weights [N], or None.
        outputs: [N, ...] of the model.
        loss: says which samples count.
        checks: of the pass.

    Returns:
        [N] weights on the outputs' device, 0 for samples that do not count, or None if all are one;
        their sum, a 0-dim float64 tensor there where the host cannot tell it.

    Raises:
        TypeError: the weights are no floating-point numbers, or sparse.
        ValueError: the weights are not [N], or not finite and non-negative.
    """
    n, dtype = outputs.shape[0], accumulator_dtype(outputs.dtype)
    weight = given_weights(batch, n, checks)
    if weight is not None:
        weight = weight.to(dtype)
    counted = loss.counted(outputs, batch.given_targets)
    if (
        counted is not None
        and not loss.weighs
        and weight is None
        and on_host(counted)
        and bool(counted.all())
    ):
        counted = None
    if counted is not None:
        mask = counted.to(dtype)
        if weight is not None and weight.device != mask.device:
            weight, mask = (sent(t, outputs.device) for t in (weight, mask))
        weight = mask if weight is None else weight * mask
    if weight is None:
        return None, float(n)
    total = weight.sum(dtype=torch.float64)
    count = float(total) if on_host(total) else total
    return sent(weight, outputs.device), count


def _check_weight_type(weight: Tensor) -> None:
    check_dense(weight, "sample_weight")
    if weight.is_floating_point():
        return
    if weight.dtype == torch.bool:
        likeness = "which looks like a mask; a mask as weights 0 and 1 is mask.double()"
    elif weight.is_complex():
        likeness = "which is no weight; pass its real part"
    else:
        likeness = (
            "which looks like indices, groups or a second target; whole-number weights are "
            "weight.double()"
        )
    raise TypeError(
        "sample_weight, or the third element of a batch, must be floating point [N], got "
        f"{weight.dtype} {list(weight.shape)}, {likeness}. Let the data yield (inputs, targets) "
        "where it is none"
    )


class BatchRoots:
    """Forward pass of one batch, checked, with its rows ready to run backwards.

    Attributes:
        count: weighted number of samples that count (sum of the weights); a 0-dim float64 tensor
            where only the device knows it.
        uses: per reached layer, its calls with inputs in the model's dtype.
        diagonal_uses: per parameter that is no matrix, the operations that it acts through.
        weight_root: [N] square roots of the sample weights, or None if all are one.
        examines: whether it is looked for what makes a layer's block another than its Hessian.
        masked_gradients: per layer, whether its gradients at masked positions were not zero, 0-dim
            bool; filled by whoever keeps rows of a batch that ``examines``.
    """

    def __init__(
        self,
        capture: Capture,
        batch: Batch,
        loss: Loss,
        output: Output,
        samples: int,
        draws: Draws,
        checks: Checks,
        sums_follow: bool = False,
    ) -> None:
        self._capture, self._batch, self._checks = capture, batch, checks
        self.outputs, uses = capture.forward(batch)
        self.uses = masked_uses(batch, uses, capture.specs, self.outputs, capture.model, checks)
        self.diagonal_uses, left_out = masked_diagonals(
            batch, capture.diagonal_uses, capture.specs, self.outputs, capture.model, checks
        )
        if capture.diagonals is not None:
            # The graph is let go of with the rows.
            capture.diagonal_uses = {}
            capture.diagonals.leave_out(left_out)
            capture.diagonals.reached.update(self.diagonal_uses)
        self._targets = checked_targets(loss, self.outputs, batch, checks)
        # Before the inputs, whose weighted sums are not finite where a weight is not.
        weight, self.count = sample_weights(batch, self.outputs, loss, checks)
        # A mask is its own square root.
        self._masked = batch.weight is None and not loss.weighs
        self.weight_root = weight if weight is None or self._masked else weight.sqrt()
        self._shaped: dict[tuple[int, torch.dtype], Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._places: dict[str, int] = {}
        self._row_root: dict[tuple[int, torch.dtype], Tensor] = {}
        self._positions: dict[int, float | Tensor] = {}
        self.examines = capture.examine
        self.masked_gradients: dict[str, Tensor] = {}
        total = self.outputs.sum() if on_host(self.outputs) else None
        self._finite_outputs = total is not None and math.isfinite(total.item())
        for name, layer in self.uses.items():
            for use in layer:
                self._check_use(name, use, sums_follow)
        self._check_outputs(loss, total)
        self._rows = self._make_rows(loss, output, samples, draws)

    def _check_use(self, name: str, use: LayerUse, sums_follow: bool) -> None:
        total, x = None, use.x
        host, masked = on_host(x), use.mask is not None and not use.convolution
        if host and masked:
            if sums_follow and self._finite_outputs:
                # What is not finite would show in the outputs, or does in the sums.
                self._places.setdefault(name, 0)
                return
            x = self._zeroed(use)
        elif host:
            total = self._sums[id(use)] = x.sum(0, dtype=accumulator_dtype(x.dtype))
        elif sums_follow and (masked or use.mask is None):
            # Sums are finite only if all inputs are.
            self._places.setdefault(name, self._checks.place())
            return
        elif masked:
            x = self._zeroed(use)
        check_finite(self._checks, x, f"inputs of layer {name!r}", self._batch.index, total)

    def _check_outputs(self, loss: Loss, total: Tensor | None) -> None:
        """Requires outputs without NaN and Inf, but at masked positions without a label."""
        if self._finite_outputs:
            return
        looked_at, batch = self.outputs, self._batch
        unread = loss.unread(self.outputs, self._targets)
        mask = batch.mask
        if unread is not None and isinstance(mask, Tensor) and mask.shape == unread.tokens.shape:
            hidden = unread.tokens & (sent(mask, self.outputs.device) == 0)
            # One number for each token: NaN or Inf if one of its outputs is.
            largest = torch.linalg.vector_norm(self.outputs.detach(), math.inf, dim=unread.axis)
            looked_at, total = largest.masked_fill(hidden, 0), None
        check_finite(self._checks, looked_at, "the model's outputs", batch.index, total)

    @staticmethod
    def _zeroed(use: LayerUse) -> Tensor:
        """[N, T, d] inputs of a masked linear call, with zeros where there are no data."""
        assert use.mask is not None
        x = use.x if use.x.dim() == 3 else use.x.unsqueeze(1)
        return use.mask.zeroed(x.unsqueeze(1))[:, 0]

    def add_input_sum(self, name: str, use: LayerUse, x: Tensor, out: Tensor) -> None:
        """Writes a use's inputs, weighted and summed over samples, to ``out``, and checks them.

        Args:
            name: of the layer.
            use: one of its uses.
            x: :meth:`inputs` of it.
            out: [d], [t, d] or [C, (H,) W] in the accumulators' dtype.
        """
        total = self._sums.get(id(use))
        if self.weight_root is None and total is not None:
            out.copy_(total)
        elif self._masked:
            torch.sum(x, 0, dtype=out.dtype, out=out)
        else:
            assert self.weight_root is not None
            weight = self.weight_root.to(out.dtype).square()
            torch.mm(weight[None], use.x.to(out.dtype).flatten(1), out=out.view(1, -1))
        if name in self._places:
            what = f"inputs of layer {name!r}"
            check_finite(self._checks, out, what, self._batch.index, place=self._places[name])

    def data_rows(self, spec: LayerSpec, use: LayerUse) -> Tensor:
        """[R, d] inputs of a masked use at the positions that are data, for all samples.

        Times the square roots of the sample weights; d counts all groups of a convolution. Where
        only a device knows the mask there is a row for every position, of zeros where it is masked.
        """
        assert use.mask is not None
        if use.convolution:
            x = unfold(use.x, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
            x = x.transpose(1, 2)
        else:
            x = use.x if use.x.dim() == 3 else use.x.unsqueeze(1)
        rows = use.mask.select(x.unsqueeze(1))
        # They are a copy, which may change.
        return (
            rows if self.weight_root is None else rows.mul_(self._row_roots(use.mask, rows.dtype))
        )

    def weighted_again(self, use: LayerUse, rows: Tensor) -> Tensor:
        """:meth:`data_rows` times the weights of the samples, not their square roots."""
        assert use.mask is not None
        if self.weight_root is None or self._masked:
            return rows
        return rows * self._row_roots(use.mask, rows.dtype)

    def _row_roots(self, mask: PositionMask, dtype: torch.dtype) -> Tensor:
        """[R, 1] square roots of the weights of the samples that rows belong to."""
        assert self.weight_root is not None
        key = id(mask), dtype
        if key not in self._row_root:
            root = self.weight_root.to(dtype)[:, None, None, None]
            self._row_root[key] = mask.select(root.expand(-1, 1, mask.length, 1))
        return self._row_root[key]

    def add_data_sum(self, spec: LayerSpec, use: LayerUse, rows: Tensor, out: Tensor) -> None:
        """:meth:`add_input_sum` of a masked use.

        Args:
            spec: of the layer.
            use: one of its uses.
            rows: :meth:`data_rows` of it.
            out: [T, d], [d] where T = 1, or [C, W] of a convolution that sees one pixel at a time.
        """
        assert use.mask is not None
        image = out.T if use.convolution else out.reshape(use.mask.length, -1)
        if on_host(rows):
            use.mask.sum_samples(self.weighted_again(use, rows), image)
        else:
            x = use.x.transpose(1, 2) if use.convolution else use.x
            x = use.mask.zeroed(x.reshape(len(x), 1, *image.shape))[:, 0].to(out.dtype)
            if self.weight_root is None:
                torch.sum(x, 0, out=image)
            else:
                weight = self.weight_root.to(out.dtype).square()
                torch.sum(x * weight[:, None, None], 0, out=image)
        if spec.name in self._places:
            what, place = f"inputs of layer {spec.name!r}", self._places[spec.name]
            check_finite(self._checks, out, what, self._batch.index, place=place)

    def positions(self, mask: PositionMask) -> float | Tensor:
        """sum_n w_n P_n, weighted positions that are data; 0-dim float64 where a device knows."""
        key = id(mask)
        if key not in self._positions:
            counts = mask.counts
            if self.weight_root is not None:
                counts = sent(counts, self.outputs.device)
                weight = self.weight_root.double()
                counts = counts * (weight if self._masked else weight.square())
            total = counts.sum()
            self._positions[key] = float(total) if on_host(total) else total
        return self._positions[key]

    def sample_positions(self, name: str) -> int | Tensor:
        """A sample's positions in a layer that are data, P_n: [N, 1, 1] where there are masks."""
        total: int | Tensor = 0
        for use in self.uses[name]:
            if use.mask is None:
                total = total + positions_of(self._capture.specs[name], use)
            else:
                total = total + sent(use.mask.counts, use.x.device)
        return total if isinstance(total, int) else total[:, None, None]

    def _make_rows(self, loss: Loss, output: Output, samples: int, draws: Draws) -> Rows:
        targets = self._targets
        if output == "exact":
            return loss.exact(self.outputs, targets)
        if output == "mc":
            numbers = self._batch.numbers
            if len(numbers) != len(self.outputs):
                # Inputs that count the samples elsewhere than in their first axis.
                numbers = numbers.inside(len(self.outputs))
            return loss.sampled(self.outputs, targets, samples, draws.of(numbers))
        return loss.empirical(self.outputs, targets)

    @property
    def _all(self) -> Mapping[str, Sequence[LayerUse | DiagonalUse]]:
        return {**self.uses, **self.diagonal_uses} if self.diagonal_uses else self.uses

    @property
    def rows(self) -> int:
        """Number r of root rows per sample."""
        return self._rows.count

    def _row(self, index: int) -> Tensor:
        """A root row times the square roots of the sample weights."""
        row = self._rows.row(index)
        # Those of samples that do not count are zero.
        return row if self._masked else self._weighted(row)

    def inputs(self, use: LayerUse) -> Tensor:
        """The use's inputs times the square roots of the sample weights; shape of ``use.x``."""
        return self._weighted(use.x)

    def _weighted(self, tensor: Tensor) -> Tensor:
        if self.weight_root is None:
            return tensor
        key = tensor.dim(), tensor.dtype
        if key not in self._shaped:
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            self._shaped[key] = self.weight_root.reshape(shape).to(tensor.dtype)
        return tensor * self._shaped[key]

    def gradients(
        self, begin: int = 0, end: int | None = None
    ) -> Iterator[dict[str, list[Tensor | None]]]:
        """Per root row, every layer's root times Jacobian: per use the output's shape, or None.

        Those of :attr:`diagonal_uses`, [N, t, q], stand among them.

        The rows carry the square roots of the sample weights. Whoever sums them up checks the sums
        with :meth:`check_gradients`. Every row can be had once, and in order.

        Args:
            begin, end: which rows; all by default.
        """
        for j in range(begin, self.rows if end is None else end):
            row = self._row(j)
            yield self._capture.backward(self.outputs, row, self._all, last=j == self.rows - 1)

    def blocks(
        self, budget: int, begin: int = 0, end: int | None = None
    ) -> Iterator[tuple[slice, slice, dict[str, list[Tensor | None]]]] | None:
        """The same in blocks of samples and rows, which come first: per use [n, r, ...], or None.

        Args:
            budget: bytes that a block may take on its way through the model, beyond one row.
            begin, end: which rows; all by default. A block counts its rows from ``begin``.

        Returns:
            an iterator to be used instead of :meth:`gradients`, or None where the model holds
            operations that only autograd knows, or there is one row.
        """
        return self._capture.backward_all(
            self.outputs,
            (self.rows if end is None else end) - begin,
            lambda j: self._row(begin + j),
            self._all,
            budget,
        )

    def check_sums(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        """Requires that a layer's covariance [(g,) d, d] and output Hessian [m, m] are finite.

        Of the latter it may be the diagonal [m].

        One entry of the data that is not finite leaves a diagonal entry of theirs that is not.
        """
        # Finite entries may still have squares that are not.
        sums = (("squared inputs", inputs), ("output gradients", outputs))
        for what, matrix in sums:
            # On a device a diagonal would be an operation of its own.
            whole = not on_host(matrix) or matrix.dim() == 1
            looked_at = matrix if whole else matrix.diagonal(dim1=-2, dim2=-1)
            check_finite(self._checks, looked_at, f"{what} of layer {name!r}", self._batch.index)

    def check_diagonal(self, name: str, diagonal: Tensor) -> None:
        """Requires that sums of squared gradients in a parameter hold no NaN or Inf."""
        what = f"gradients of parameter {name!r}"
        check_finite(self._checks, diagonal, what, self._batch.index)

    def check_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Requires that layers' gradients, of any shape, hold no NaN or Inf."""
        for name, tensor in gradients.items():
            what = f"output gradients of layer {name!r}"
            check_finite(self._checks, tensor, what, self._batch.index)
        # At once: whoever has them may let go of them.
        self._checks.gather()


def positions_last(spec: LayerSpec, tensor: Tensor) -> Tensor:
    """[N, q, t] of conv tensors [N, q, ...] and sequence tensors [N, t..., q]; [N, q] stays.

    A view where the layout permits.
    """
    if spec.kind == "conv":
        return tensor.flatten(2)
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(1, -2).transpose(1, 2)


def check_fraction(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless the argument called ``name`` is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def check_output(output: Any, mc_samples: Any, seed: Any) -> None:
    """Raises ValueError for an unknown ``output`` or a bad number of samples or seed."""
    check_choice("output", output, Output)
    if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 1:
        raise ValueError(f"mc_samples must be a positive integer, got {mc_samples!r}")
    check_seed(seed)
