"""EKFAC of every layer, from data as a whole: factors, their eigenvectors, a second pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.choices import Bias, Output, Precision, check_choice
from hesskern.factors.accumulator import FactorAccumulator
from hesskern.factors.corrections import Corrections
from hesskern.factors.ekfac import EKFAC
from hesskern.factors.parts import check_sharded
from hesskern.factors.precision import precisions
from hesskern.factors.rank_stages import ranks_ahead, with_bases_of
from hesskern.factors.result import Factors, LayerFactors
from hesskern.factors.second_pass import SecondPass, contents
from hesskern.graph.evidence import Evidence
from hesskern.operators.corrected import CorrectedOperator
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.replicas import checksums
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_model
from hesskern.passes.batches import check_iterable, no_samples
from hesskern.passes.data_pass import DataPass
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import (
    left_out,
    refuse_missing,
)
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.memory import budget_for
from hesskern.passes.roots import check_output
from hesskern.passes.sample_numbers import Positions
from hesskern.passes.whole_pass import PassKnowledge, agree_on_pass
from hesskern.progress import Progress, reporter

__all__ = ["ekfac"]

_CORRECTIONS = "Eigenvalue corrections"


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
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    exact_resume: bool = True,
    group: Any = None,
    sharded: bool = False,
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
        checkpoint, checkpoint_every, exact_resume: as in :func:`hesskern.kronecker_factors`, for
            both passes; between them the eigenvectors are kept.
        group: ranks of torch.distributed that all call this, each with its own part of the data,
            as in :func:`hesskern.kronecker_factors`. They share the eigendecompositions out among
            them, the largest first, and all get the whole result, the same bits.
        sharded: with a group, whether every rank keeps some layers alone, by their bytes:
            eigenvectors and S, which all ranks hold while the second pass lasts. ``E.part`` says
            which, ``E.save`` writes one part per rank, and :func:`hesskern.load_ekfac` reads them.

    Returns:
        :class:`EKFAC`, keyed by layer name, in float32 (float64 for a float64 model).

    Raises:
        ValueError: bad arguments, factors of another model, targets out of range, NaN or Inf in the
            data (names layer and batch), no data at all, or data that can be iterated only once;
            ``checkpoint`` is damaged, or that of another call, model or data.
        TypeError: arguments of a wrong type.
        NotImplementedError: unsupported layers asked for by name, unsupported loss options.
        OSError: ``checkpoint`` cannot be written; the one before stays.
        RankError: with a group, as in :func:`hesskern.kronecker_factors`.

    Warns:
        UserWarning: naming linear layers and convolutions that were left out, and why.
    """
    ranks = Ranks.of(group)
    with section_of(ranks, "EKFAC"), whole_model(ranks, model) as model:
        check_sharded(sharded, ranks)
        check_choice("precision", precision, Precision)
        check_output(output, mc_samples, seed)
        check_iterable(data)
        report, mask = reporter(progress), checked_mask(position_mask)
        if ranks is not None:
            report = ranks.watching("EKFAC", report)
        resolved = resolve_loss(loss, output_root)
        device = model_device(model)
        budget, now = budget_for(memory_budget, device, 2**30, 1 / 16), precisions(model, device)
        accumulator = None
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
            asked = {
                "output": output,
                "mc_samples": mc_samples,
                "seed": seed,
                "precision": precision,
                "sharded": sharded,
                "position_mask given": mask is not None,
            }
            ranks.agree("EKFAC", {"settings": asked})
        saved = Checkpoint.of(
            checkpoint,
            checkpoint_every,
            exact_resume,
            "ekfac",
            model,
            device,
            {
                "loss": loss,
                "layers": layers if accumulator is None else list(accumulator.specs),
                "geometry": None if accumulator is None else dict(accumulator.specs),
                "output": output,
                "factors": contents(factors),
                "bias": bias,
                "mc_samples": mc_samples,
                "seed": seed,
                "sample_weight": sample_weight,
                "output_root": output_root,
                "memory_budget": memory_budget,
                "check": check,
                "max_outputs": max_outputs,
                "position_mask": position_mask,
                "precision": precision,
            },
            ranks,
        )
        if ranks is not None:
            sample_weight = weights_of_part(ranks, data, sample_weight, 2)
        evidence = Evidence(check) if accumulator is None else accumulator.evidence
        stage = None if saved is None else saved.stage
        ahead = [0] if stage == _CORRECTIONS else []
        if ranks is not None:
            ahead = ranks_ahead(ranks, stage, _CORRECTIONS, accumulator is not None)
        kept = None
        if saved is not None and (0 if ranks is None else ranks.rank) in ahead:
            (kept,) = saved.parts
            evidence.restore(kept["evidence"])
        elif accumulator is not None:
            if saved is None:
                accumulator.consume(data, sample_weight=sample_weight, progress=report)
            else:
                accumulator.go_on(saved, data, sample_weight=sample_weight, progress=report)
        if accumulator is None:
            begun = SecondPass.of(model, factors, layers, False, bias)
            if ranks is not None:
                facts = {"factors": _bits(begun.factors)}
                agree_on_pass(ranks, "EKFAC", model, begun.specs, resolved, facts)
        if ahead:
            if ranks is not None:
                kept = with_bases_of(ranks, ahead, kept, device)
            assert kept is not None
            begun, kept = SecondPass.of_part(kept, model), None
            # The warning of the pass that is over.
            left_out(model, begun.made, begun.specs.values(), 2 if layers is None else None)
        elif accumulator is not None:
            # From here on nobody but ``begun`` holds factors that were made here.
            made = accumulator.finished(2, last=True)
            begun = SecondPass.of(model, made, layers, True, bias)
            del made
        # Nor their sums.
        del accumulator
        specs = begun.specs
        run = DataPass(
            model,
            data,
            resolved,
            specs,
            sample_weight,
            evidence,
            report,
            _CORRECTIONS,
            kept=specs.keys(),
            linear_use=True,
            position_mask=mask,
            output=output,
            mc_samples=mc_samples,
            seed=seed,
            positions=Positions.of(ranks),
            course=None if saved is None else saved.begin(_CORRECTIONS, data),
        )
        # The result is to be usable whatever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad():
            found = begun.operators(model, precision, ranks)
            if saved is not None and saved.state is None:
                saved.keep({"pass": None}, begun.part(found, evidence))
            run.count = Corrections(run, found, budget).add(saved)
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
        settings = begun.settings
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
        covered = [specs[name] for name in result]
        skipped = left_out(model, {**begun.skipped, **reasons}, covered, None)
        made_here = EKFAC(result, specs, count, skipped, own)
        if sharded and ranks is not None:
            made_here = made_here.shard(ranks)
    # When all ranks have it.
    if saved is not None:
        saved.remove()
    return made_here


def _bits(factors: dict[str, LayerFactors]) -> dict[str, int]:
    """Checksums of factors."""
    outputs = {f"E[M] of {n}": layer.output_hessian for n, layer in factors.items()}
    inputs = {f"E[x x^T] of {n}": layer.input_covariance for n, layer in factors.items()}
    return checksums({**outputs, **inputs})


def _decomposed(layers: dict[str, CorrectedOperator], precision: Precision) -> str:
    """In which precision the layers' factors were decomposed."""
    found = {"float64" if layer.dtype == torch.float64 else precision for layer in layers.values()}
    return "; ".join(sorted(found))
