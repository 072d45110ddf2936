"""Input covariances of every layer by forward passes alone: the function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.choices import Bias
from hesskern.factors.input_covariances import InputCovariances, overflow
from hesskern.factors.input_pass import InputPass
from hesskern.factors.precision import precisions
from hesskern.factors.rank_inputs import WholeInputs, whole_inputs
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.replicas import model_facts
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_model
from hesskern.passes.batches import batches
from hesskern.passes.forward_pass import model_device
from hesskern.passes.input_batches import inputs_alone
from hesskern.passes.input_capture import InputCapture
from hesskern.passes.layers import LayerSpec, left_out, refuse_missing, select_layers
from hesskern.passes.masks import checked_mask
from hesskern.progress import Progress, reporter

__all__ = ["input_covariances"]

_FUSED = (
    "is one of several matrices of a parameter, whose inputs hooks cannot see; kronecker_factors "
    "finds them in the graph"
)
_UNREACHED = "was never reached in the forward pass"


def input_covariances(
    model: nn.Module,
    data: Iterable[Any],
    layers: str | Iterable[str] | None = None,
    bias: Bias = "none",
    accumulate: InputCovariances | None = None,
    *,
    sample_weight: Tensor | None = None,
    position_mask: Callable[[Any], Any] | None = None,
    progress: bool | Progress = False,
    group: Any = None,
) -> InputCovariances:
    """E[x x^T] of every layer's inputs, by forward passes alone: no loss, no targets, no backward.

    The same as ``kronecker_factors(...)[name].input_covariance`` (but for losses that leave out
    samples without labels, or count tokens), at the price of little more than the model's forward
    pass: for GPTQ, SparseGPT, activation-aware scales, low-rank compression.
    Layers that share one weight have the inputs of all of them; calls whose result gets no gradient
    count as well.

    Inputs are seen by forward hooks. A layer whose weight anything else than its own module's
    forward() multiplies with (a function, ``nn.MultiheadAttention``, a module of another package
    with a forward() of its own) is left out, with the reason in ``.skipped``; that nothing does is
    checked, operation by operation, on the first batch and on each in which a layer is called for
    the first time. It is not checked of weights that are computed from other parameters
    (parametrizations), and looking up rows of a weight (a tied embedding) is no product.

    Args:
        model: any module; runs in eval mode, without gradients, and comes back as it was. What it
            returns does not matter.
        data: iterable of batches: tensors, dicts (also those of ``transformers``), or tuples
            (inputs,), (inputs, targets), (inputs, targets, weight [N]), where inputs are a tensor,
            a tuple of arguments or a dict of them, and targets are ignored. The first axis of the
            inputs' first tensor counts the samples; in a dict, that of ``input_ids`` and other
            usual names, or of the mask. ``labels`` in a dict are left out, as they
            would make the model compute a loss.
        layers: names from ``model.named_modules()`` or patterns such as ``"*.mlp.*"``, one or
            several; None for all that hooks can see.
        bias: "none": weights only; "joint": append 1 to x where the layer has a bias.
        accumulate: what earlier calls with the same layers returned, or ``InputCovariances()``: is
            added to in place and returned. A batch that fails ends the call and is not in it; the
            batches before it are.
        sample_weight: [total samples] non-negative weights of the samples, in the order of the
            data; means become weighted means. With it, all of the data is added or nothing.
        position_mask: which positions are data, as in :func:`hesskern.kronecker_factors`; without
            it the ``attention_mask`` [N, T] of a dict tells. A masked position counts nowhere.
        progress: True for a bar with the time left, or a callback (description, done, total).
        group: ranks of torch.distributed that all call this, each with its own part of the data, as
            in :func:`hesskern.kronecker_factors`; all get the input covariances of all data.
            ``accumulate`` is what earlier calls in the group returned; where one rank fails,
            nothing is added on any.

    Returns:
        :class:`InputCovariances`, keyed by layer name, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: bad arguments; NaN or Inf in a layer's inputs (names layer and batch); a mask of
            another shape, or one that leaves nothing of a batch; no data at all; a layer that was
            asked for by name is never reached, or hooks cannot see its inputs.
        TypeError: arguments of a wrong type, batches of another form.
        NotImplementedError: unsupported layers asked for by name.
        RankError: with a group, ranks have other models, weights or layers, or another rank has
            failed or ended.

    Warns:
        UserWarning: naming linear layers and convolutions that were left out, and why.
    """
    if accumulate is not None and not isinstance(accumulate, InputCovariances):
        raise TypeError(
            f"accumulate must be an InputCovariances or None, got {type(accumulate).__name__}"
        )
    checked_mask(position_mask)
    ranks = Ranks.of(group)
    with section_of(ranks, "input covariances"), whole_model(ranks, model) as inner:
        model = inner
        specs, skipped = select_layers(model, layers, bias)
        # Hooks see what a module is given, not which rows of it go to which of its experts.
        fused = {name: _FUSED for name, spec in specs.items() if spec.expert is not None}
        refuse_missing(specs, fused)
        specs = {name: spec for name, spec in specs.items() if name not in fused}
        skipped.update(fused)
        report = reporter(progress)
        result = InputCovariances() if accumulate is None else accumulate
        result._require_whole()
        result._require_same(specs, bias, "this call has")
        # What is added over ranks is what they have seen now.
        seen = result if ranks is None else InputCovariances()
        if ranks is not None:
            seen._unfit = dict(result._unfit)
            facts = _facts(model, specs, bias, result)
            facts["position_mask given"] = position_mask is not None
            ranks.agree("input covariances", facts)
            sample_weight = weights_of_part(ranks, data, sample_weight, 2)
            report = ranks.watching("input covariances", report)
        before = seen._copy() if sample_weight is not None and len(seen) else None
        device = model_device(model)
        now = precisions(model, device)
        given = data, device, sample_weight, report, "input covariances"
        try:
            with InputCapture(model, specs) as capture:
                run = InputPass(seen, model, capture, specs, device)
                seen._specs, seen._bias = specs, bias
                for batch in batches(*given, inputs_alone(model), position_mask):
                    run.add(batch)
                    seen._precisions.update(dict.fromkeys(now))
        except BaseException:
            if sample_weight is not None:
                seen.__dict__.update((InputCovariances() if before is None else before).__dict__)
            raise
        if ranks is not None:
            result._take(_over_ranks(ranks, seen, capture.unfit, device))
        unfit = capture.unfit if ranks is None else result._unfit
        _finish(result, model, specs, skipped, unfit, layers is not None)
        return result


def _facts(
    model: nn.Module, specs: Mapping[str, LayerSpec], bias: Bias, before: InputCovariances
) -> dict[str, Any]:
    """What all ranks have to have alike."""
    return {
        "layers": list(specs),
        "geometry": [asdict(spec) for spec in specs.values()],
        "bias": bias,
        "samples accumulated before": before.num_samples,
        **model_facts(model),
    }


def _over_ranks(
    ranks: Ranks, seen: InputCovariances, unfit: Mapping[str, str], device: torch.device
) -> InputCovariances:
    """What all ranks have seen; takes the sums of this one."""
    own = WholeInputs(seen.num_samples, seen._sums, dict(unfit), list(seen._precisions))
    found = whole_inputs(ranks, seen._specs, own, device)
    whole = InputCovariances()
    whole.num_samples, whole._sums, whole._unfit = found.count, found.sums, found.unfit
    whole._specs, whole._bias = seen._specs, seen._bias
    whole._precisions = dict.fromkeys(found.precisions)
    for name, sums in whole._sums.by_layer.items():
        dtype = sums.inputs.dtype
        if not sums.squares <= torch.finfo(dtype).max:
            raise ValueError(overflow(name, dtype, "over all ranks"))
    return whole


def _finish(
    result: InputCovariances,
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    skipped: Mapping[str, str],
    unfit: Mapping[str, str],
    by_name: bool,
) -> None:
    """Says what a result lacks.

    Raises:
        ValueError: it has nothing, or lacks a layer that was asked for.
    """
    reasons = {name: unfit.get(name, _UNREACHED) for name in specs if name not in result}
    result.skipped = {**skipped, **reasons}
    if not result.num_samples > 0:
        raise ValueError("data yielded no samples, so there are no input covariances")
    refuse_missing(specs, reasons)
    if not len(result):
        listed = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
        raise ValueError(f"no layer of the model has an input covariance: {listed}")
    covered = [specs[name] for name in result]
    result.skipped = left_out(model, result.skipped, covered, None if by_name else 3)
