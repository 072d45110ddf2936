"""EKFAC of every layer, from data as a whole: factors, their eigenvectors, a second pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.choices import Bias, Output, Precision, check_choice
from hesskern.factors.accumulator import FactorAccumulator
from hesskern.factors.corrections import Corrections
from hesskern.factors.eigenbases import eigenbases
from hesskern.factors.ekfac import EKFAC
from hesskern.factors.precision import precisions
from hesskern.factors.result import Factors, LayerFactors
from hesskern.graph.evidence import Evidence
from hesskern.operators.corrected import CorrectedOperator
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.replicas import checksums, inner_model
from hesskern.parallel.samplers import weights_of_part
from hesskern.passes.batches import check_iterable, no_samples
from hesskern.passes.data_pass import DataPass
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import (
    LayerSpec,
    left_out,
    own_parameters,
    refuse_missing,
    select_layers,
    weight_of,
)
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.memory import budget_for
from hesskern.passes.roots import accumulator_dtype, check_output
from hesskern.passes.sample_numbers import Positions
from hesskern.passes.whole_pass import PassKnowledge, agree_on_pass
from hesskern.progress import Progress, reporter

__all__ = ["ekfac"]


def ekfac(
    model: nn.Module,
    data: Iterable[Any],
    loss: Any = None,
    layers: str | Iterable[str] | None = None,
    output: Output = "mc",
    *,
    factors: Factors | None = None,
    bias: Bias | None = None,
    mc_samples: int = 1,
    seed: int = 0,
    sample_weight: Tensor | None = None,
    output_root: Callable[..., Tensor] | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    max_outputs: int = 8192,
    position_mask: Callable[[Any], Any] | None = None,
    precision: Precision = "float32",
    progress: bool | Progress = False,
    group: Any = None,
) -> EKFAC:
    """EKFAC of every layer (George et al. 2018, arXiv 1806.03884), in two passes over the data.

    The first gives Kronecker factors, whose eigenvectors U and V are kept. The second adds, for
    every layer, S_ij = 1/N sum_n sum_c (u_i^T R_nc v_j)^2 with R_nc = sum_t s_nct x_nt^T, the rows
    that the layer's Hessian is the mean of; no sample is stored. Of all matrices with these
    eigenvectors (U (x) V) diag(S) (U (x) V)^T is the one nearest to that Hessian in the Frobenius
    norm, and its trace is the Hessian's: :func:`hesskern.eigenvalue_corrected` makes the same of
    stored samples.

    Args:
        model: any module; runs in eval mode and comes back as it was.
        data: iterable of (inputs, targets) or (inputs, targets, weight [N]), or of what the loss
            takes apart. It is gone through twice, or once where ``factors`` are given.
        loss, layers, mc_samples, seed, sample_weight, output_root, memory_budget, check,
            max_outputs, position_mask: as in :func:`hesskern.kronecker_factors`.
        output: "mc" (targets drawn from the model), "empirical" (the targets of the data) or
            "exact" (all classes), for the factors and for S. Both passes draw the same targets
            where the data come in the same order.
        factors: Kronecker factors of this model, of these data or others, whose eigenvectors are
            taken; they may have been made with another ``output``. None: they are made here.
        bias: "none" or "joint"; None for that of the factors, "none" without any.
        precision: "float32": the factors of a float32 model are decomposed in float32. U and V are
            then orthogonal up to 1e-5, by which the trace of S differs from the Hessian's, and
            eigenvectors whose eigenvalues differ by less than 1e-6 of the largest may be mixed. S
            is the curvature along the vectors that are kept, whichever they are. "float64": takes
            twice the time and memory for a decomposition.
        progress: True for a bar with the time left, or a callback (description, done, total).
        group: ranks of torch.distributed that all call this, each with its own part of the data,
            as in :func:`hesskern.kronecker_factors`. They share the eigendecompositions out among
            them, the largest first, and all get the whole result, the same bits.

    Returns:
        :class:`EKFAC`, keyed by layer name, in float32 (float64 for a float64 model).

    Raises:
        ValueError: bad arguments, factors of another model, targets out of range, NaN or Inf in the
            data (names layer and batch), no data at all, or data that can be iterated only once.
        TypeError: arguments of a wrong type.
        NotImplementedError: unsupported layers asked for by name, unsupported loss options.
        RankError: with a group, as in :func:`hesskern.kronecker_factors`.

    Warns:
        UserWarning: naming linear layers and convolutions that were left out, and why.
    """
    ranks = Ranks.of(group)
    with section_of(ranks, "EKFAC"):
        check_choice("precision", precision, Precision)
        check_output(output, mc_samples, seed)
        check_iterable(data)
        report, mask = reporter(progress), checked_mask(position_mask)
        if ranks is not None:
            report = ranks.watching("EKFAC", report)
        model = model if ranks is None else inner_model(model)
        resolved = resolve_loss(loss, output_root)
        device = model_device(model)
        budget, now = budget_for(memory_budget, device, 2**30, 1 / 16), precisions(model, device)
        if factors is None:
            if isinstance(data, Iterator):
                raise ValueError(
                    "data can be iterated only once, and EKFAC goes through them twice; pass a "
                    "re-iterable (a DataLoader or a list), or factors="
                )
            accumulator = FactorAccumulator(
                model,
                loss,
                layers,
                output,
                bias="none" if bias is None else bias,
                mc_samples=mc_samples,
                seed=seed,
                output_root=output_root,
                memory_budget=memory_budget,
                check=check,
                max_outputs=max_outputs,
                position_mask=position_mask,
                group=group,
            )
            accumulator.agree()
            if ranks is not None:
                sample_weight = weights_of_part(ranks, data, sample_weight, 2)
            accumulator.consume(data, sample_weight=sample_weight, progress=report)
            made = accumulator.finished(2, last=True)
            evidence = accumulator.evidence
            # Their sums are let go of.
            del accumulator
        else:
            made, evidence = factors, Evidence(check)
        specs = _specs(model, made, layers if factors is not None else None, bias)
        skipped = {**_without_factors(model, made, specs, layers), **made.skipped}
        settings = dict(made.settings)
        chosen = {name: made[name] for name in specs}
        if ranks is not None:
            asked = {"output": output, "mc_samples": mc_samples, "seed": seed}
            ranks.agree("EKFAC", {**asked, "precision": precision})
            if factors is not None:
                agree_on_pass(ranks, "EKFAC", model, specs, resolved, {"factors": _bits(chosen)})
                sample_weight = weights_of_part(ranks, data, sample_weight, 2)
        # From here on nobody but ``chosen`` holds factors that were made here.
        del made
        run = DataPass(
            model,
            data,
            resolved,
            specs,
            sample_weight,
            evidence,
            report,
            "Eigenvalue corrections",
            kept=specs.keys(),
            linear_use=True,
            position_mask=mask,
            output=output,
            mc_samples=mc_samples,
            seed=seed,
            positions=Positions.of(ranks),
        )
        # The result is to be usable whatever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad():
            found = _without_values(model, chosen, specs, precision, ranks)
            run.count = Corrections(run, found, budget).add()
            known = PassKnowledge.of(run, {}).of_all(ranks)
            count, reasons = known.count, known.reasons
            if ranks is not None:
                ranks.sum_([layer.values for layer in found.values()])
            if not count > 0:
                raise no_samples(", so there is no EKFAC")
            refuse_missing(specs, reasons)
            result = {name: layer for name, layer in found.items() if name not in reasons}
            for layer in result.values():
                layer.values /= count
        own = {
            "output": output,
            "bias": settings.get("bias", "none"),
            "mc_samples": mc_samples,
            "seed": seed,
            "precision": "; ".join(now),
            "checked": {name: known.checked.get(name, "graph") for name in result},
            "eigenvectors": _decomposed(result, precision),
            "factors": settings,
        }
        skipped = left_out(model, {**skipped, **reasons}, [specs[name] for name in result], None)
        return EKFAC(result, specs, count, skipped, own)


def _bits(factors: dict[str, LayerFactors]) -> dict[str, int]:
    """Checksums of factors."""
    tensors = {f"E[M] of {n}": layer.output_hessian for n, layer in factors.items()}
    inputs = {f"E[x x^T] of {n}": layer.input_covariance for n, layer in factors.items()}
    return checksums({**tensors, **inputs})


def _decomposed(layers: dict[str, CorrectedOperator], precision: Precision) -> str:
    """In which precision the layers' factors were decomposed."""
    found = {"float64" if layer.dtype == torch.float64 else precision for layer in layers.values()}
    return "; ".join(sorted(found))


def _without_factors(
    model: nn.Module,
    factors: Factors,
    specs: dict[str, LayerSpec],
    layers: str | Iterable[str] | None,
) -> dict[str, str]:
    """Reasons for layers that nobody left out and the factors lack."""
    if layers is not None:
        return {}
    known, unknown = select_layers(model, None, factors.settings.get("bias", "none"))
    missing = {name: _absent(name, factors) for name in known if name not in specs}
    return {**unknown, **missing}


def _absent(name: str, factors: Factors) -> str:
    """Why factors lack a layer of the model."""
    if name in factors.large:
        return "has the diagonal of E[M] alone among the factors, which gives no eigenvectors"
    return "is not among the factors"


def _specs(
    model: nn.Module, factors: Any, layers: str | Iterable[str] | None, bias: Bias | None
) -> dict[str, LayerSpec]:
    """The layers that the factors are for, as the model has them.

    Raises:
        TypeError: ``factors`` are none.
        ValueError: there are none of any layer, they are those of other layers, or made with
            another ``bias``.
    """
    if not isinstance(factors, Factors):
        raise TypeError(
            f"factors must be Factors, as kronecker_factors gives, got {type(factors).__name__}"
        )
    if not factors:
        large = f"; those of {', '.join(factors.large)} have no eigenvectors" * bool(factors.large)
        raise ValueError(f"factors must hold at least one layer's E[M] and E[x x^T]{large}")
    own = factors.settings.get("bias", "none")
    if bias is not None and bias != own:
        raise ValueError(f"bias is {bias!r}, but the factors were made with bias={own!r}")
    known, _ = select_layers(model, None, own)
    for name, layer in factors.items():
        if name not in known:
            raise ValueError(
                f"factors must be those of this model, which has no layer {name!r}; its layers are "
                f"{', '.join(known)}"
            )
        if known[name] != layer.spec:
            raise ValueError(
                f"factors must be those of this model: layer {name!r} is {_geometry(layer.spec)} "
                f"in them, {_geometry(known[name])} in the model"
            )
    if layers is None:
        return {name: known[name] for name in known if name in factors}
    picked, _ = select_layers(model, layers, own)
    for name, spec in picked.items():
        if spec.required and name not in factors:
            reason = factors.skipped.get(name)
            if name in factors.large:
                reason = _absent(name, factors)
            raise ValueError(
                f"layers: there are no factors of {name!r}" + (f": it {reason}" if reason else "")
            )
    found = {name: spec for name, spec in picked.items() if name in factors}
    if not found:
        raise ValueError(f"layers: there are factors of none; there are {', '.join(factors)}")
    return found


def _geometry(spec: LayerSpec) -> str:
    """A layer's geometry in words."""
    m, d = spec.shape
    text = f"{spec.kind} (m, d) = ({m}, {d})"
    if spec.kind == "conv":
        text += (
            f" with kernel {spec.kernel_size}, stride {spec.stride}, padding {spec.padding}, "
            f"dilation {spec.dilation}, groups {spec.groups}"
        )
    return text + (" and a bias" if spec.joint else "") + (", transposed" * spec.transposed)


def _without_values(
    model: nn.Module,
    factors: dict[str, LayerFactors],
    specs: dict[str, LayerSpec],
    precision: Precision,
    ranks: Ranks | None,
) -> dict[str, CorrectedOperator]:
    """Every layer's operator with S = 0; empties the factors."""
    modules, device = dict(model.named_modules()), model_device(model)
    devices, dtypes = {}, {}
    for name in factors:
        module, attribute = weight_of(modules, name)
        weight = own_parameters(module).get(attribute)
        devices[name] = device if weight is None else weight.device
        dtypes[name] = factors[name].output_hessian.dtype
        if weight is not None:
            dtypes[name] = accumulator_dtype(weight.dtype)
    bases = eigenbases(factors, precision, devices, dtypes, ranks)
    found = {}
    for name in list(bases):
        layer = bases.pop(name)
        values = torch.zeros(specs[name].shape, dtype=dtypes[name], device=devices[name])
        found[name] = CorrectedOperator.of_bases(
            layer.left, layer.right, values, transposed=specs[name].transposed, name=name
        )
    return found
