"""Layer-wise Hessians E[M (x) x x^T] of every layer, from one pass over the data."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesskern import ops
from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.choices import Bias, Order, Output, check_choice
from hesskern.graph.evidence import Evidence
from hesskern.operators.base import LayerOperator
from hesskern.operators.eigenbasis import EigenbasisOperator
from hesskern.operators.gathering import GatheredLayer, Gathering
from hesskern.operators.kronecker import KroneckerOperator
from hesskern.operators.packed_inputs import PackedInputs
from hesskern.operators.pruning import kept_samples, prune
from hesskern.operators.samples import SampleRows, join, layer_rows
from hesskern.operators.spilled import SpilledSamples, check_spill
from hesskern.parallel.ranks import Ranks, section_of, telling_of
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_again, whole_model
from hesskern.passes.batches import check_iterable, no_samples
from hesskern.passes.checks import Checks
from hesskern.passes.data_pass import (
    DataPass,
    RepeatedPass,
    stored_or_anew,
    with_less_memory,
)
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec, left_out, refuse_missing, select_layers
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.roots import check_fraction, check_output
from hesskern.passes.sample_numbers import Positions
from hesskern.passes.whole_pass import PassKnowledge, agree_on_pass
from hesskern.progress import Progress, reporter
from hesskern.spill.rooms import Spill

__all__ = ["LayerHessian", "LayerHessians", "layer_hessians"]

# Why a block of such rows is not the Hessian.
_OF_ROWS = {
    "mc": "is made of rows for targets drawn from the model (output='mc')",
    "empirical": "is made of the gradients at the data's own targets (output='empirical')",
}


class LayerHessian(LayerOperator):
    """The layer-wise Hessian H = E[M (x) x x^T] of one layer, in the weight's own order.

    Exact, or of drawn or empirical rows. Made by :func:`layer_hessians`. Products run in fused
    C++/CUDA kernels over stored samples. On a GPU of compute capability 9.0 the samples' inputs are
    kept a second time, in the form that these kernels multiply, from the second product on and
    where there is memory to spare.

    Attributes:
        name: of the layer.
        layer_shape: (m, d) of the weight as a matrix.
        weight_shape: the same, or (d, m) for a weight that is kept transposed (Conv1D of
            transformers); vectors are such matrices, flattened.
        groups: of a convolution, 1 otherwise.
        is_exact: True if this is the Hessian, as double backward has it at these weights: all that
            follows the layer is piecewise linear, and its uses do not follow one another. False: it
            is the Gauss-Newton block, or that of drawn or empirical rows.
        inexact_reason: why ``is_exact`` is False, or None.
        pruning_error: bound on ‖H - H_t‖_2 for what was left out under ``tolerance``; 0 if nothing.
        pruned_trace: tr(H - H_t).
        num_samples: weighted number of samples.
        cached: whether the samples are stored, on the device or where ``spill`` has put them;
            False: every product runs the model again. With ``ranks``, those of this process.
        spilled: whether every product reads them from there.
        ranks: see :class:`hesskern.CurvatureOperator`.
        checked: how it is known which rows belong to which samples: "graph" (proved), "probe"
            (found by backward passes), "not checked" (never two samples in a batch: nothing was
            to be told apart) or "switched off" (``check=False``).
    """

    def __init__(
        self,
        spec: LayerSpec,
        chunks: list[SampleRows] | SpilledSamples | _Rerun,
        num_samples: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        inexact_reason: str | None,
        pruning_error: float,
        pruned_trace: float,
        cached: bool,
        checked: str = "graph",
        ranks: Ranks | None = None,
        whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.ranks = ranks
        # Around the model, where a rank runs it again.
        self._whole = whole
        self.name = spec.name
        self.layer_shape = spec.shape
        self.groups = spec.groups
        self.transposed = spec.transposed
        size = spec.outputs * spec.inputs
        self.shape = (size, size)
        self.dtype, self.device = dtype, device
        self.num_samples = num_samples
        self.inexact_reason = inexact_reason
        self.is_exact = inexact_reason is None
        self.pruning_error = pruning_error
        self.pruned_trace = pruned_trace
        self.cached = cached
        self.checked = checked
        self._chunks = chunks
        self._packed = PackedInputs()

    @property
    def spilled(self) -> bool:
        return isinstance(self._chunks, SpilledSamples)

    @property
    def described(self) -> str:
        return f"the Hessian of layer {self.name!r}"

    @contextmanager
    def _samples(self) -> Iterator[Iterable[SampleRows]]:
        """This process's samples; other ranks learn of an error inside the block."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            telling_of(self.ranks, self.described),
            self._whole(),
            stored_or_anew(self._chunks) as chunks,
        ):
            yield chunks

    def _matmul(self, block: Tensor) -> Tensor:
        alpha = 1.0 / self.num_samples
        with self._samples() as chunks:
            total = torch.zeros_like(block, memory_format=torch.contiguous_format)
            for chunk in chunks:
                m, d = chunk.s.shape[2], chunk.x.shape[1]
                rows = block.reshape(len(block), m, d)
                # Samples that are read or made anew are gone before the next product.
                stays = isinstance(self._chunks, list)
                packed = self._packed.of(chunk.x, len(block) * m) if stays else None
                product = ops.layer_hessian_matmul(chunk.x, chunk.s, rows, alpha, packed)
                total += product.flatten(1)
            return self._of_ranks(total, block=block)

    def operator(self, order: Order = "weight") -> LayerHessian:
        """The same Hessian over flat vectors of one order.

        Args:
            order: "weight" as the weight is kept, which is [d, m] for the Conv1D of transformers
                and [m, d] otherwise; "output" for [m, d] always.

        Returns:
            this Hessian, or one that shares its samples.

        Raises:
            ValueError: ``order`` is another word.
        """
        check_choice("order", order, Order)
        if not self.transposed or order == "weight":
            return self
        same = copy(self)
        same.transposed = False
        return same

    def trace(self) -> float:
        """tr(H), exact; with ``tolerance`` of what was kept (add ``pruned_trace`` for all)."""
        with self._samples() as chunks:
            total = math.fsum(float(chunk.shares().sum()) for chunk in chunks)
            return self._number_of_ranks(total) / self.num_samples

    def diagonal(self) -> Tensor:
        """[P] diagonal, exact."""
        with self._samples() as chunks:
            total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            for chunk in chunks:
                total += chunk.diagonal()
            return self._outward(self._of_ranks(total)) / self.num_samples

    def inner(self, K: KroneckerOperator) -> float:
        """<H, K> = tr(H K) = 1/N sum_nc <R_nc, A R_nc B> with R_nc = sum_t s_nct x_nt^T; exact.

        One pass over the samples, at the price of a few products with H.

        Args:
            K: A (x) B of the layer's shape (m, d), with as many groups.

        Raises:
            TypeError: K is not a KroneckerOperator.
            ValueError: its shape, groups, dtype or device differ.
        """
        with self._samples() as chunks:
            self._check_like(K, KroneckerOperator)
            total = math.fsum(chunk.inner(K) for chunk in chunks)
            return self._number_of_ranks(total) / self.num_samples

    def diagonal_in(self, K: EigenbasisOperator) -> Tensor:
        """[m, d]: (u_i (x) v_j)^T H (u_i (x) v_j) in K's eigenbasis, exact, in one pass.

        Args:
            K: of the layer's shape (m, d), with as many groups.

        Raises:
            TypeError: K has no Kronecker eigenbasis.
            ValueError: its shape, groups, dtype or device differ.
        """
        with self._samples() as chunks:
            self._check_like(K, EigenbasisOperator)
            m, d = self.layer_shape
            total = torch.zeros(m, d, dtype=self.dtype, device=self.device)
            for chunk in chunks:
                total += chunk.diagonal_in(K)
            return self._of_ranks(total) / self.num_samples

    def _check_like(self, K: Any, kind: type[Any]) -> None:
        if not isinstance(K, kind):
            name = "a KroneckerOperator" if kind is KroneckerOperator else f"of {kind.__name__}"
            raise TypeError(f"K must be {name}, got {type(K).__name__}")
        if (K.layer_shape, K.groups) != (self.layer_shape, self.groups):
            raise ValueError(
                f"K must be of shape {self.layer_shape} with groups={self.groups}, got "
                f"{K.layer_shape} with groups={K.groups}"
            )
        if K.transposed != self.transposed:
            raise ValueError(
                f"K must have transposed={self.transposed}, as the layer's weight is kept"
            )
        if K.dtype != self.dtype or K.device != self.device:
            raise ValueError(
                f"K must be {self.dtype} on {self.device}, got {K.dtype} on {K.device}"
            )

    def contract_inputs(self, B: Tensor) -> Tensor:
        """sum_kl H_(ik)(jl) B_kl, [m, m], for a symmetric positive semi-definite B [d, d]."""
        values, vectors = torch.linalg.eigh(B.double())
        root = (vectors * values.clamp(min=0).sqrt()).to(self.dtype)
        return self._contract(root, side=0)

    def contract_outputs(self, A: Tensor) -> Tensor:
        """sum_ij A_ij H_(ik)(jl), [d, d], for a symmetric positive semi-definite A [m, m]."""
        values, vectors = torch.linalg.eigh(A.double())
        root = (vectors * values.clamp(min=0).sqrt()).to(self.dtype)
        return self._contract(root, side=1)

    def _contract(self, root: Tensor, side: int) -> Tensor:
        size = self.layer_shape[side]
        with self._samples() as chunks:
            total = torch.zeros(size, size, dtype=self.dtype, device=self.device)
            for chunk in chunks:
                for rows in chunk.contracted_rows(root, side, self.layer_shape):
                    ops.input_covariance_(total, rows, 1.0 / self.num_samples)
            return ops.mirror_(self._of_ranks(total, upper=True))

    def few_rows(self, limit: int) -> Tensor | None:
        """R [q, P] with H = R^T R, one row for every sample and root row.

        None with more than ``limit`` rows, or where the samples are not stored, or are those of
        several processes.
        """
        chunks = self._chunks
        if self.ranks is not None or not isinstance(chunks, list):
            return None
        if sum(c.s.shape[0] * c.s.shape[1] for c in chunks) > limit:
            return None
        rows = [rows for chunk in chunks for rows in chunk.dense_rows()]
        if not rows:
            return None
        return self._outward(torch.cat(rows)) / self.num_samples**0.5

    def to_dense(self) -> Tensor:
        """[P, P]; for small layers."""
        with self._samples() as chunks:
            total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for chunk in chunks:
                for rows in chunk.dense_rows():
                    ops.input_covariance_(total, rows, 1.0 / self.num_samples)
            return self._outward_matrix(ops.mirror_(self._of_ranks(total, upper=True)))


class LayerHessians(dict[str, LayerHessian]):
    """{name: :class:`LayerHessian`} in the model's order.

    Attributes:
        skipped: modules with parameters that have no Hessian here, with the reason.
    """

    def __init__(self, layers: Mapping[str, LayerHessian], skipped: Mapping[str, str]) -> None:
        super().__init__(layers)
        self.skipped = dict(skipped)

    def __missing__(self, name: str) -> LayerHessian:
        reason = self.skipped.get(name)
        raise KeyError(
            f"no Hessian of layer {name!r}"
            + (f": it {reason}" if reason else f"; there are {', '.join(self)}")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHessians, (dict(self), self.skipped)


def layer_hessians(
    model: nn.Module,
    data: Iterable[Any],
    loss: Any = None,
    layers: str | Iterable[str] | None = None,
    tolerance: float = 0.0,
    *,
    output: Output = "exact",
    bias: Bias = "none",
    mc_samples: int = 1,
    seed: int = 0,
    sample_weight: Tensor | None = None,
    output_root: Callable[..., Tensor] | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    position_mask: Callable[[Any], Any] | None = None,
    progress: bool | Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    exact_resume: bool = True,
    group: Any = None,
    spill: Spill | None = None,
) -> LayerHessians:
    """The layer-wise Hessian of every layer, from one pass over the data.

    Args:
        model: any module; runs in eval mode and comes back as it was. Its weights must not change
            while layers above the memory budget are in use.
        data: iterable of (inputs, targets) or (inputs, targets, weight [N]), or of what the loss
            takes apart.
        loss: as in :func:`hesskern.kronecker_factors`; more than 65,536 root rows per sample are
            refused, unless they come from ``output_root``.
        layers: names from ``model.named_modules()`` or patterns such as ``"*.mlp.*"``, one or
            several; None for all supported.
        tolerance: leave out samples as long as ‖H - H_t‖_2 <= tolerance tr(H) is certain; 0 keeps
            all. tr(M_n)‖x_n‖² bounds a sample's part of the spectrum.
        output: "exact" (all classes), "mc" (targets drawn from the model) or "empirical" (the
            targets of the data), as in :func:`hesskern.kronecker_factors`: H is then the mean of
            the outer products of these rows, and never exact. Layers that run the model again
            draw the same targets each time.
        bias: "none" or "joint" (append 1 to x; P is m (d + 1)).
        mc_samples: draws per sample for ``output="mc"``.
        seed: of these draws, keyed by sample as in :func:`hesskern.kronecker_factors`.
        sample_weight: [total samples] non-negative weights in the order of the data.
        output_root: a custom loss as a function, with ``loss=None``.
        memory_budget: bytes of samples kept for all layers together. Layers above it (largest
            first) run the model again at every product. None for 4 GiB, on a GPU for a quarter of
            its free memory; where that runs out, the pass begins anew with a quarter of the budget.
        check: whether it is found out which rows of a layer belong to which samples where the
            graph does not prove it; see :func:`hesskern.kronecker_factors`.
        position_mask: which positions are data, as in :func:`hesskern.kronecker_factors`. Where the
            outputs depend on masked positions of a layer, its block is not the Hessian.
        progress: True for a bar with the time left, or a callback.
        checkpoint, checkpoint_every, exact_resume: as in :func:`hesskern.kronecker_factors`, for
            the pass that stores samples. They go into files beside ``checkpoint``, each written
            once.
        group: ranks of torch.distributed that all call this, each with its own part of the data,
            as in :func:`hesskern.kronecker_factors`. The samples stay where they are
            (``memory_budget`` is that of a rank), the Hessians are those of all data: whatever
            they are asked for then is asked on all ranks, with the same vectors, and they get the
            same bits. :func:`hesskern.eigsh` and the like know that by themselves.
        spill: where samples of layers above the budget go instead, to be read at every product:
            "disk" for files below $TMPDIR, which go with the Hessians; "cpu" for pinned memory of
            the host, from a GPU. None: they are made anew. Neither with ``tolerance`` nor with
            ``checkpoint``.

    Returns:
        :class:`LayerHessians`, {name: :class:`LayerHessian`} in the model's order. Each is the
        block of the weight, whatever calls it acts in; layers that share a weight share the block.
        Layers that are not supported or not reached, whose weight acts in other than linear calls,
        or whose rows do not belong to single samples are left out, with the reason in
        ``.skipped``, or refused when asked for by name.

    Raises:
        ValueError, TypeError, NotImplementedError, OSError, RankError: as in
            :func:`hesskern.kronecker_factors`.

    Warns:
        UserWarning: naming the layers whose block is not the Hessian, and why; naming linear layers
            and convolutions that were left out, and why.
    """
    ranks = Ranks.of(group)
    with section_of(ranks, "layer Hessians"), whole_model(ranks, model) as model:
        check_fraction("tolerance", tolerance)
        check_output(output, mc_samples, seed)
        check_iterable(data)
        resolved = resolve_loss(loss, output_root)
        specs, skipped = select_layers(model, layers, bias)
        check_spill(spill, model_device(model), tolerance, checkpoint)
        report, evidence, mask = reporter(progress), Evidence(check), checked_mask(position_mask)

        rows: dict[str, Any] = {"output": output, "mc_samples": mc_samples, "seed": seed}
        exact = output == "exact"

        if ranks is not None:
            settings = {**rows, "tolerance": tolerance, "bias": bias, "check": check}
            settings["position_mask given"] = mask is not None
            agree_on_pass(ranks, "layer Hessians", model, specs, resolved, settings)
            report = ranks.watching("layer Hessians", report)
        saved = Checkpoint.of(
            checkpoint,
            checkpoint_every,
            exact_resume,
            "layer_hessians",
            model,
            model_device(model),
            {
                "loss": loss,
                "layers": list(specs),
                "geometry": specs,
                "tolerance": tolerance,
                "output": output,
                "bias": bias,
                "mc_samples": mc_samples,
                "seed": seed,
                "sample_weight": sample_weight,
                "output_root": output_root,
                "memory_budget": memory_budget,
                "check": check,
                "position_mask": position_mask,
            },
            ranks,
        )
        if ranks is not None:
            sample_weight = weights_of_part(ranks, data, sample_weight, 2)
        begun = None if saved is None else saved.state

        def attempt(budget: int) -> tuple[dict[str, GatheredLayer], DataPass, int]:
            given = model, data, resolved, specs, sample_weight, evidence
            run = DataPass(
                *given,
                report,
                "Layer Hessians",
                examine=exact,
                position_mask=mask,
                positions=Positions.of(ranks),
                **rows,
            )
            gathering = Gathering(run, budget, tolerance, saved, spill)
            return gathering.layers(), run, budget

        if begun is not None:
            # That of the free memory may be another now.
            memory_budget = begun["budget"]
        gathered, run, budget = with_less_memory(attempt, memory_budget, model, data)
        found = {name: layer.dtype for name, layer in gathered.items() if layer.dtype is not None}
        known = PassKnowledge.of(run, found).of_all(ranks)
        count, reasons, inexact = known.count, known.reasons, known.inexact
        if not count > 0:
            raise no_samples(", so there are no Hessians")
        refuse_missing(specs, reasons)
        shown = {n: inexact[n] for n in gathered if n in inexact and n not in reasons}
        if shown:
            text = "; ".join(f"{name!r} {reason}" for name, reason in shown.items())
            warnings.warn(
                f"the Gauss-Newton block is not the Hessian for: {text}. AutogradHessian gives the "
                "Hessian of such layers.",
                UserWarning,
                stacklevel=2,
            )
        result = {}
        for name, layer in gathered.items():
            if name in reasons:
                continue
            given = model, data, resolved, {name: layer.spec}, sample_weight, evidence
            rerun = _Rerun(*given, budget, position_mask=mask, ranks=ranks, **rows)
            reason = inexact.get(name) if exact else _OF_ROWS[output]
            result[name] = _finish(layer, rerun, known, tolerance, reason)
        if not result:
            raise ValueError(
                "no layer of the model has a Hessian: "
                + "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
            )
        skipped = {**skipped, **reasons}
        if layers is None:
            skipped = left_out(model, skipped, [specs[name] for name in result], 2)
    # When all ranks have them.
    if saved is not None:
        saved.remove()
    return LayerHessians(result, skipped)


@dataclass
class _Rerun(RepeatedPass):
    """Sample rows of one layer made anew, batch by batch, a few root rows at a time.

    Attributes:
        keep: per batch that reaches the layer, the numbers of the samples that stay; None for all.
        shares: with ``keep``, the samples' shares [N] of the trace when ``keep`` was decided.
    """

    keep: list[Tensor] | None = None
    shares: list[Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.name,) = self.specs
        self.require([self.name])

    def _what(self) -> str:
        return f"the Hessian of layer {self.name!r}"

    def __call__(self) -> Generator[SampleRows, None, None]:
        position = 0
        with self.run() as run:
            for _, roots in run:
                chunks = (chunk for _, chunk in layer_rows(self.specs, roots, self.budget))
                if self.keep is None:
                    yield from chunks
                elif self.name in roots.uses and roots.rows:
                    yield from self._kept(chunks, position, run.checks)
                    position += 1
        if self.keep is not None and position != len(self.keep):
            raise self._other_order()

    def _kept(
        self, chunks: Iterable[SampleRows], position: int, checks: Checks
    ) -> Iterator[SampleRows]:
        """The samples of one batch that stay, if it is the batch that ``keep`` was made for."""
        assert self.keep is not None
        assert self.shares is not None
        if position >= len(self.keep):
            raise self._other_order()
        keep, before = self.keep[position], self.shares[position]
        now = torch.zeros_like(before)
        for chunk in chunks:
            shares = chunk.shares()
            if shares.shape != before.shape:
                raise self._other_order()
            now += shares
            yield chunk.select(keep)
        near = (now - before).abs() <= 1e-3 * before + 1e-6 * before.sum()
        checks.require(near.all(), self._another_order, error=RuntimeError)

    def _other_order(self) -> RuntimeError:
        return RuntimeError(self._another_order())

    def _another_order(self) -> str:
        return (
            "data must come in the same order in every pass (no shuffling, no random augmentation) "
            f"where tolerance > 0 and layer {self.name!r} exceeds memory_budget"
        )


def _finish(
    layer: GatheredLayer,
    rerun: _Rerun,
    known: PassKnowledge,
    tolerance: float,
    reason: str | None,
) -> LayerHessian:
    norm = trace = 0.0
    ranks, name, device = rerun.ranks, layer.spec.name, model_device(rerun.model)
    cached = layer.chunks is not None or layer.spilled is not None
    chunks: list[SampleRows] | SpilledSamples | _Rerun = rerun
    # Where others cannot choose among single rows, whole samples go on all ranks.
    together = (
        ranks is None or tolerance == 0 or all(ranks.gather("whether samples are kept", cached))
    )
    if layer.spilled is not None:
        chunks = layer.spilled
    elif layer.chunks is not None:
        kept = layer.chunks
        if tolerance > 0 and together:
            pruned = prune(kept, layer.shares, tolerance, ranks, device)
            kept, norm, trace = pruned.chunks, pruned.norm, pruned.trace
        elif tolerance > 0:
            masks, trace = kept_samples(layer.shares, tolerance, ranks)
            kept, norm = [c.select(keep) for c, keep in zip(kept, masks, strict=True)], trace
        chunks = join(kept, rerun.budget // 8)
    elif tolerance > 0:
        rerun.shares = layer.shares_by_batch()
        keep, trace = kept_samples(rerun.shares, tolerance, ranks)
        # As numbers of samples: how many a mask keeps is known to the device alone.
        rerun.keep = [mask.nonzero()[:, 0] for mask in keep]
        norm = trace
    return LayerHessian(
        layer.spec,
        chunks,
        known.count,
        known.dtypes.get(name, torch.float32),
        device,
        inexact_reason=reason,
        pruning_error=norm / known.count,
        pruned_trace=trace / known.count,
        cached=cached,
        checked=known.checked.get(name, "graph"),
        ranks=ranks,
        whole=whole_again(ranks, rerun.model, not cached),
    )
