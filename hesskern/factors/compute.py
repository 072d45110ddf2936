"""Kronecker factors of every layer, from data that are there as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.choices import Bias, Output
from hesskern.factors.accumulator import FactorAccumulator
from hesskern.factors.parts import check_sharded
from hesskern.factors.result import Factors
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.samplers import weights_of_part
from hesskern.parallel.sharded import whole_model
from hesskern.passes.batches import check_iterable
from hesskern.passes.forward_pass import model_device
from hesskern.progress import Progress, reporter
from hesskern.spill.rooms import Spill

__all__ = ["kronecker_factors"]


def kronecker_factors(
    model: nn.Module,
    data: Iterable[Any],
    loss: Any = None,
    layers: str | Iterable[str] | None = None,
    output: Output = "exact",
    *,
    bias: Bias = "none",
    mc_samples: int = 1,
    seed: int = 0,
    sample_weight: Tensor | None = None,
    output_root: Callable[..., Tensor] | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    max_outputs: int = 8192,
    position_mask: Callable[[Any], Any] | None = None,
    diagonal: bool = False,
    progress: bool | Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    exact_resume: bool = True,
    group: Any = None,
    spill: Spill | None = None,
    sharded: bool = False,
) -> Factors:
    """Kronecker factors E[x x^T] and E[M] of every layer, in one pass over the data.

    Args:
        model: any module; runs in eval mode and comes back as it was.
        data: iterable of (inputs, targets) or (inputs, targets, weight [N]); inputs are a tensor, a
            tuple of arguments or a dict of them. Losses of transformers take dicts with the labels
            in them. A pass does not wait for a GPU: a tensor in pinned
            memory must keep its values until it ends (those of a DataLoader do).
        loss: ``nn.CrossEntropyLoss()``, ``nn.MSELoss()``, ``nn.BCEWithLogitsLoss()``, one of
            transformers (:class:`hesskern.CausalLM` and others), or an object with
            ``output_root(outputs, targets) -> [N, r, c]``.
        layers: a name from ``model.named_modules()`` or a pattern such as ``"*.mlp.*"`` (as in
            :mod:`fnmatch`), or several of them; None for all Linear, Conv1d and Conv2d.
        output: "exact" (all classes), "mc" (targets drawn from the model), or "empirical" (the
            targets of the data). All three are scaled as the loss of a sample is, under
            ``reduction="mean"`` the mean over its T labelled tokens (cross-entropy) or outputs:
            E[M] is 1/T times that of the terms' sum. "mc" and "empirical" take the gradient of the
            sum divided by sqrt(T), so that for targets drawn from the model their expectation is
            the exact E[M]. Drawn from the model means class k with probability p_k, 1 with
            probability sigma(f), a normal value around f with variance 1/2 (MSELoss); a custom
            loss's ``per_sample`` is differentiated as it is. "exact" takes as many backward passes
            as a sample has root rows, (c - 1) T or one per output, and is refused above 65,536
            (unless they come from ``output_root``).
        bias: "none": weights only, as in arXiv 2010.04261; "joint": append 1 to x.
        mc_samples: draws per sample for ``output="mc"``.
        seed: of these draws, which are keyed by seed and sample number: the index in the data set
            of a DataLoader, whatever its order and batches (its ``collate_fn`` must leave samples
            in their order); where a sample has no number, its position in the data.
        sample_weight: [total samples] non-negative weights of the samples' losses, in the order of
            the data; means become weighted means.
        output_root: a custom loss as a function, with ``loss=None``.
        memory_budget: bytes for root rows kept at a time beyond one row per layer; None for 1 GiB,
            on a GPU for a sixteenth of its free memory.
        check: whether it is found out which rows of a layer belong to which samples. Mostly the
            graph proves it; where it does not, a batch of two or more samples runs backwards a few
            times more (in float32 twice up to 64 samples, three times up to 4,096): the first of
            its shapes and its route through the model, and each one where values could move or mix
            rows. A layer whose rows are no samples, or act on
            several, is then left out with the reason. False takes the first axis for the samples.
        max_outputs: layers with more outputs, such as heads over a large vocabulary, are left out:
            E[M] is [m, m]. With ``diagonal=True`` they have its diagonal, in ``factors.large``.
        position_mask: which positions are data, where they are not all: a function of a batch's
            inputs that gives a mask [N, T] of zeros and ones, a dict of such masks or None by
            patterns of layers' names ({"encoder.*": mask}; the first that fits counts), or None for
            what the batch says itself. It may lie on the host, which is best for a GPU, too. A
            mask [N, T] speaks of linear layers and Conv1d with T positions; layers with one row per
            sample (poolers, heads on one token) are not masked. A masked position counts nowhere,
            whatever is there.
        diagonal: whether embeddings, norms, biases that no layer's block holds, and other vectors
            get a diagonal block each: ``factors.diagonals``, by parameter, the diagonal of E[M]'s
            counterpart in it, the mean over samples of its squared gradients of all root rows.
            Parameters whose gradients by sample are not known are in ``.skipped`` with the reason.
        progress: True for a bar with the time left, or a callback (description, done, total).
        checkpoint: a file that the pass keeps its state in. The same call goes on from there after
            an interruption, and gives the same bits as a pass that was never interrupted; batches
            that were seen are compared, as far as they are loaded, and do not run. None: none is
            kept. It is removed when the pass is done. With a group every rank has its own, with
            ".rank0of2" before the suffix. README, "Resume", says what it covers.
        checkpoint_every: seconds between two writings of it; 0: behind every batch.
        exact_resume: whether a checkpoint is refused that was written with another version,
            device or number of threads; False goes on with a warning, and may round differently.
        group: ranks of torch.distributed (``torch.distributed.group.WORLD``, or what ``new_group``
            gave) that all call this, each with the same model, plain or in
            DistributedDataParallel, and with its own part of the data, which may be empty. All get
            the factors of all data, the same bits. A DistributedSampler that repeats samples has
            these left out; ``progress`` is told on the first rank. Parameters that ``fully_shard``
            has sharded are whole on every rank while the pass lasts. The group's timeout has to
            cover what one rank's part takes longer than another's.
        spill: where the sums lie, but for the layer's that is added to, and the factors after them:
            "disk" for memory-mapped files below $TMPDIR, which the system reads and writes as they
            are needed and which go with the tensors; "cpu" for pinned memory of the host, from a
            GPU. None: on the model's device. The factors are then tensors of the host, and the
            numbers the same. Diagonals stay on the device.
        sharded: with a group, whether every rank keeps the factors of some layers alone, by their
            bytes, behind a pass that sums those of all: ``factors.part`` says which,
            ``factors.save`` writes one part per rank, and :func:`hesskern.load_factors` reads them.

    Returns:
        :class:`Factors`, keyed by layer name, in float32 (float64 for a float64 model).

    Raises:
        ValueError: bad arguments, targets out of range, NaN or Inf in the data (names layer and
            batch), or no data at all; ``checkpoint`` is damaged, or that of another call, model or
            data.
        TypeError: arguments of a wrong type.
        NotImplementedError: unsupported layers asked for by name, unsupported loss options.
        RankError: with a group, ranks have other models, weights or settings, or another rank has
            failed (its own error goes on there) or ended: within the group's timeout.
        OSError: ``checkpoint`` cannot be written; the one before stays; or there is no room for the
            files of ``spill``.
    """
    ranks = Ranks.of(group)
    with section_of(ranks, "Kronecker factors"), whole_model(ranks, model) as inner:
        check_sharded(sharded, ranks)
        accumulator = FactorAccumulator(
            inner,
            loss,
            layers,
            output,
            bias=bias,
            mc_samples=mc_samples,
            seed=seed,
            output_root=output_root,
            memory_budget=memory_budget,
            check=check,
            max_outputs=max_outputs,
            position_mask=position_mask,
            diagonal=diagonal,
            group=group,
            spill=spill,
        )
        if ranks is not None:
            accumulator.agree(sharded=sharded)
        saved = Checkpoint.of(
            checkpoint,
            checkpoint_every,
            exact_resume,
            "kronecker_factors",
            inner,
            model_device(inner),
            {
                "loss": loss,
                "layers": list(accumulator.specs),
                "geometry": dict(accumulator.specs),
                "output": output,
                "bias": bias,
                "mc_samples": mc_samples,
                "seed": seed,
                "sample_weight": sample_weight,
                "output_root": output_root,
                "memory_budget": memory_budget,
                "check": check,
                "max_outputs": max_outputs,
                "position_mask": position_mask,
                "diagonal": diagonal,
            },
            ranks,
        )
        if ranks is not None:
            sample_weight = weights_of_part(ranks, data, sample_weight, 2)
            progress = ranks.watching("Kronecker factors", reporter(progress))
        if saved is None:
            accumulator.consume(data, sample_weight=sample_weight, progress=progress)
        else:
            check_iterable(data)
            accumulator.go_on(saved, data, sample_weight=sample_weight, progress=progress)
        found = accumulator.finished(2, last=True)
        if sharded and ranks is not None:
            found = found.shard(ranks)
    # When all ranks have it.
    if saved is not None:
        saved.remove()
    return found
