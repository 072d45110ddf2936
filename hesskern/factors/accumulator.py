"""Streaming accumulation of Kronecker factors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.checkpoints.checkpoint import Checkpoint
from hesskern.choices import Bias, Output
from hesskern.factors.accumulator_state import (
    FORMAT,
    check_state,
    diagonals_of_state,
    layers_of_state,
)
from hesskern.factors.batch_sums import BatchSums
from hesskern.factors.layer_sums import (
    BatchSum,
    Counted,
    LayerSums,
    SumMemory,
    add_diagonals,
    add_sums,
    scale_sums,
)
from hesskern.factors.means import large_layer_means, layer_means
from hesskern.factors.precision import precisions
from hesskern.factors.rank_sums import Told, whole_sums
from hesskern.factors.result import Factors
from hesskern.factors.running_counts import DrawsUsed, HeldCounts
from hesskern.graph.evidence import Evidence
from hesskern.ops import foreach
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.parallel.replicas import inner_model
from hesskern.passes.batches import Batch, no_samples
from hesskern.passes.checks import as_weights
from hesskern.passes.data_pass import DataPass, whole_or_halves
from hesskern.passes.diagonals import DiagonalCapture, diagonal_parameters
from hesskern.passes.forward_pass import model_device, refuse_sharded
from hesskern.passes.layers import (
    LayerSpec,
    large_layers,
    left_out,
    limit_outputs,
    own_parameters,
    refuse_missing,
    select_layers,
)
from hesskern.passes.losses import resolve_loss
from hesskern.passes.masks import checked_mask
from hesskern.passes.memory import budget_for
from hesskern.passes.roots import check_fraction, check_output
from hesskern.passes.sample_numbers import Positions
from hesskern.passes.whole_pass import agree_on_pass
from hesskern.portable import Portable
from hesskern.progress import Progress, reporter
from hesskern.spill.rooms import Room, Spill, check_place

__all__ = ["FactorAccumulator"]

# Stands for targets that the batch itself holds; None may be what a loss takes.
_IN_INPUTS: Any = object()


@dataclass(frozen=True)
class _Before:
    """What an accumulator goes back to when a batch turns out bad, whose sums were masked."""

    batches: int
    position: int
    layers: frozenset[str]
    reasons: dict[str, str]
    unfit: dict[str, str]
    precisions: dict[str, None]
    diagonals: frozenset[str]
    unfit_diagonals: dict[str, str]


class FactorAccumulator(Portable):
    """Kronecker factors from a stream of batches.

    >>> acc = FactorAccumulator(model, nn.CrossEntropyLoss())
    >>> for inputs, targets in loader:
    ...     acc.update(inputs, targets)
    >>> factors = acc.factors()

    Args:
        model, loss, layers, output, bias, mc_samples, seed, output_root, check, max_outputs,
            position_mask, diagonal: as in :func:`hesskern.kronecker_factors`. What is found out
            about the samples holds for the batches that follow, as long as the model's graph and
            its shapes stay the same. Batches of :meth:`update` are drawn by the positions of their
            samples among all; every :meth:`consume` draws anew.
        decay: None for means over everything seen; a number in [0, 1) for moving averages over
            batches, ``decay * old + (1 - decay) * new``, with the start-up bias removed.
        memory_budget: bytes for root rows kept at a time beyond one row per layer; None for 1 GiB,
            on a GPU for a sixteenth of its free memory. A batch for which a GPU's memory does not
            suffice is taken in two halves.
        spill: where the sums lie, as in :func:`hesskern.kronecker_factors`; :meth:`state_dict`
            gives copies in memory all the same. A forked process has the same files: there an
            accumulator with sums in them is refused.
        group: ranks of torch.distributed, each with its own part of the data, as in
            :func:`hesskern.kronecker_factors`: :meth:`factors` is then called by all of them, and
            gives the factors of all data. Everything else is a rank's own.

    Attributes:
        evidence: of which rows belong to which samples, for other passes of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any = None,
        layers: str | Iterable[str] | None = None,
        output: Output = "exact",
        *,
        decay: float | None = None,
        bias: Bias = "none",
        mc_samples: int = 1,
        seed: int = 0,
        output_root: Callable[..., Tensor] | None = None,
        memory_budget: int | None = None,
        check: bool = True,
        max_outputs: int = 8192,
        position_mask: Callable[[Any], Any] | None = None,
        diagonal: bool = False,
        group: Any = None,
        spill: Spill | None = None,
    ) -> None:
        self._ranks = Ranks.of(group)
        if self._ranks is not None:
            model = inner_model(model)
        refuse_sharded(model)
        check_output(output, mc_samples, seed)
        if decay is not None:
            check_fraction("decay", decay)
        self._loss = resolve_loss(loss, output_root)
        known, self._skipped = select_layers(model, layers, bias)
        device = model_device(model)
        check_place(spill, device, "sums")
        self._room = Room(spill, device)
        if not isinstance(diagonal, bool):
            raise TypeError(f"diagonal must be True or False, got {type(diagonal).__name__}")
        self._large: frozenset[str] = frozenset()
        if diagonal:
            self._specs, self._large = known, frozenset(large_layers(known, max_outputs))
        else:
            self._specs, large = limit_outputs(known, max_outputs)
            self._skipped.update(large)
        self._parameters = diagonal_parameters(model, self._specs, layers) if diagonal else None
        self._diagonals: dict[str, Tensor] = {}
        self._verified: set[Any] = set()
        self._diagonal_reasons: dict[str, str] = {}
        self._unfit_diagonals: dict[str, str] = {}
        self._by_name = layers is not None
        self._model = model
        self._position_mask = checked_mask(position_mask)
        self._decay = decay
        budget = budget_for(memory_budget, device, 2**30, 1 / 16)
        self._batch_sums = BatchSums(self._specs, budget, self._large)
        self._settings: dict[str, Any] = {
            "output": output,
            "bias": bias,
            "mc_samples": mc_samples,
            "seed": seed,
            "decay": decay,
        }
        if diagonal:
            self._settings["diagonal"] = True
        self._drawn = DrawsUsed()
        self.evidence = Evidence(check)
        self._sums: dict[str, LayerSums] = {}
        self._process = os.getpid()
        self._reasons: dict[str, str] = {}
        self._unfit: dict[str, str] = {}
        self._tied: dict[str, str] = {}
        self._count = 0.0
        self._held = HeldCounts()
        self._batches = 0
        self._precisions: dict[str, None] = {}

    def _given(self) -> dict[str, Any]:
        given = {"model": self._model, "loss": self._loss}
        if self._position_mask is not None:
            given["position_mask"] = self._position_mask
        if self._ranks is not None:
            given["group"] = self._ranks.group
        return given

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._process = os.getpid()
        if self._room.place is not None:
            # Copies lie in memory.
            self._sums = {n: sums.copy(self._room.copied) for n, sums in self._sums.items()}

    def _refuse_forked(self) -> None:
        """Raises RuntimeError where another process has the same files: its sums would change."""
        if not self._sums:
            self._process = os.getpid()
        if self._room.place == "disk" and self._process != os.getpid():
            raise RuntimeError(
                "spill='disk': the sums of this accumulator lie in files of process "
                f"{self._process}, from which this one, {os.getpid()}, was forked, and each would "
                "change those of the other; load what its state_dict() gave before into an "
                "accumulator made here"
            )

    def _about(self) -> str:
        return "a FactorAccumulator, which runs its model (state_dict() holds the sums alone),"

    @property
    def num_samples(self) -> float:
        """Weighted number of samples behind the factors (with decay: of averaged batches)."""
        return self._count

    def update(
        self, inputs: Any, targets: Any = _IN_INPUTS, sample_weight: Tensor | None = None
    ) -> None:
        """Adds one batch.

        Args:
            inputs: what the model takes: a tensor, a tuple of arguments, or a dict of them; the
                batch as a whole for losses that find the targets in it.
            targets: what the loss takes; left out where they are in the batch.
            sample_weight: [N] non-negative weights.

        Raises:
            ValueError: bad targets or weights, NaN or Inf; what was accumulated before stays.
        """
        if targets is _IN_INPUTS:
            self._pass([inputs], sample_weight, update=True)
            return
        element: tuple[Any, ...] = (inputs, targets)
        if sample_weight is not None:
            element = (*element, as_weights(sample_weight))
        self._pass([element], update=True)

    def consume(
        self,
        data: Iterable[Any],
        *,
        sample_weight: Tensor | None = None,
        progress: bool | Progress = False,
    ) -> None:
        """Adds every batch of ``data``, as :meth:`update` does.

        A batch that fails ends it; the batches before it stay. With ``sample_weight``, whose
        entries belong to the data as a whole, all of the data is added or nothing.

        Args:
            data: iterable of (inputs, targets) or (inputs, targets, weight [N]), or of what the
                loss takes apart.
            sample_weight: [total samples] weights in the order of the data.
            progress: True for a bar with the time left, or a callback.

        Raises:
            ValueError: as :meth:`update`, or ``sample_weight`` has another length than the data.
        """
        report = reporter(progress)
        before = None if sample_weight is None else self._accumulated(self._room.copied)
        try:
            self._pass(data, sample_weight, report)
        except BaseException:
            if before is not None:
                self.load_state_dict(before)
            raise

    def go_on(
        self,
        checkpoint: Checkpoint,
        data: Iterable[Any],
        *,
        sample_weight: Tensor | None = None,
        progress: bool | Progress = False,
    ) -> None:
        """Adds the batches of ``data`` that a checkpoint has not seen, which is kept on the way.

        Args:
            checkpoint: of a call that begins with this accumulator, which is empty.
            data, sample_weight, progress: as in :meth:`consume`.

        Raises:
            ValueError: as :meth:`consume`, or the data are not those of the checkpoint.
            OSError: the checkpoint cannot be written.
        """
        checkpoint.begin("Kronecker factors", data)
        if checkpoint.state is not None:
            self._restore(checkpoint.state)
        self._pass(data, sample_weight, reporter(progress), checkpoint=checkpoint)

    def _snapshot(self, run: DataPass) -> dict[str, Any]:
        """All that the rest of a pass depends on, between two batches."""
        return {
            "accumulated": self._accumulated(),
            "held": self._held.state(),
            "run": run.state(),
            "budget": self._batch_sums.memory_budget,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state["accumulated"])
        self._held = HeldCounts.of_state(state["held"], model_device(self._model))
        # That of the free memory may be another now, and with it the order of the sums.
        self._batch_sums = replace(self._batch_sums, memory_budget=state["budget"])

    def _pass(
        self,
        data: Iterable[Any],
        sample_weight: Tensor | None = None,
        progress: Progress | None = None,
        update: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Adds batches until the data ends or one fails; those before it stay."""
        self._refuse_forked()
        batches, drawn = self._batches, replace(self._drawn)
        if checkpoint is None or checkpoint.state is None:
            self._drawn.begin(update)
        try:
            self._walk(data, sample_weight, progress, checkpoint)
        except BaseException:
            if self._batches == batches:
                # As if nothing had been tried.
                self._drawn = drawn
            raise

    def _walk(
        self,
        data: Iterable[Any],
        sample_weight: Tensor | None,
        progress: Progress | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        """:meth:`_pass`, with random numbers of the stream that has been begun."""
        memory = SumMemory(self._room.place)
        # Before the capture, which switches autocast off for all but the model.
        now = precisions(self._model, model_device(self._model))
        given = self._model, data, self._loss, self._specs, sample_weight, self.evidence
        kept, unfit = self._sums.keys(), dict(self._unfit)
        diagonals = None
        if self._parameters is not None:
            unfit_diagonals = dict(self._unfit_diagonals)
            kept_diagonals = self._diagonals.keys()
            diagonals = DiagonalCapture(
                self._parameters, kept_diagonals, unfit_diagonals, verified=self._verified
            )
        run = DataPass(
            *given,
            progress,
            "Kronecker factors",
            kept=kept,
            unfit=unfit,
            position_mask=self._position_mask,
            linear_use=True,
            diagonals=diagonals,
            seed=self._settings["seed"],
            stream=self._drawn.streams - 1,
            positions=Positions.of(self._ranks, self._drawn.position),
            course=None if checkpoint is None else checkpoint.course,
        )
        if checkpoint is not None and checkpoint.state is not None:
            run.restore(checkpoint.state["run"])
        try:
            with run.capture:
                for batch in run.batches():
                    self._add(run, batch, memory)
                    self._precisions.update(dict.fromkeys(now))
                    if checkpoint is not None and checkpoint.due:
                        # What a device has found of the batches so far counts before they do.
                        run.settle()
                        checkpoint.keep(self._snapshot(run))
                if checkpoint is not None and self._ranks is not None:
                    # Others may need long yet, and may fail.
                    run.settle()
                    checkpoint.keep(self._snapshot(run))
        finally:
            try:
                # Also when it was interrupted: what is there stays.
                run.settle()
            finally:
                if run.checks.failed is not None:
                    self._go_back(run.checks.failed)
                self._to_host()

    def _go_back(self, before: _Before) -> None:
        """Undoes what masked batches have changed besides sums."""
        self._batches = before.batches
        self._drawn.position = before.position
        self._sums = {name: sums for name, sums in self._sums.items() if name in before.layers}
        self._reasons, self._unfit = before.reasons, before.unfit
        self._diagonals = {n: d for n, d in self._diagonals.items() if n in before.diagonals}
        self._unfit_diagonals = before.unfit_diagonals
        self._precisions = before.precisions

    def _add(self, run: DataPass, batch: Batch, memory: SumMemory) -> None:
        """Adds one batch as a whole, or nothing at all if anything goes wrong."""
        before = _Before(
            self._batches,
            self._drawn.position,
            frozenset(self._sums),
            dict(self._reasons),
            dict(self._unfit),
            dict(self._precisions),
            frozenset(self._diagonals),
            dict(self._unfit_diagonals),
        )
        try:
            fresh = self._sums_in_memory(run, batch, memory)
        except BaseException:
            run.checks.drop()
            raise
        alive = run.checks.close(before)
        if alive is not None and not self._same_shapes(fresh):
            # The images of the batches before cannot be masked.
            run.checks.settle()
            alive = None
        if alive is not None:
            fresh.mask(alive)
        self._commit(fresh, memory)
        self._drawn.position = run.positions.next
        self._unfit.update(run.capture.unfit)
        self._tied.update(run.capture.tied)
        self._note({**self._reasons, **run.capture.reasons})
        if run.diagonals is not None:
            self._unfit_diagonals.update(run.diagonals.unfit)
            self._diagonal_reasons.update(run.diagonals.reasons)

    def _sums_in_memory(self, run: DataPass, batch: Batch, memory: SumMemory) -> BatchSum:
        """:meth:`_sums_of`, of one half after the other where memory does not suffice."""

        def undo() -> None:
            run.checks.drop()
            memory.let_go()

        def attempt(part: Batch, whole: bool) -> BatchSum:
            return self._sums_of(run, part, memory if whole else SumMemory(self._room.place))

        fresh, *others = whole_or_halves(batch, attempt, undo)
        for other in others:
            fresh.join(other)
        return fresh

    def _same_shapes(self, fresh: BatchSum) -> bool:
        """Whether a batch takes no images away from the layers that are there."""
        return all(
            name not in self._sums or self._sums[name].fits(sums)
            for name, sums in fresh.layers.items()
        )

    def _to_host(self) -> None:
        """Numbers that the device held in the meantime."""
        factor, counts = self._held.read()
        self._held = HeldCounts()
        if factor != 1.0:
            self._count *= factor
            for sums in self._sums.values():
                sums.positions *= factor
        for counted in counts:
            self._count_samples(counted)

    def _sums_of(self, run: DataPass, batch: Batch, memory: SumMemory) -> BatchSum:
        """A batch's sums by layer, and its weighted number of samples."""
        roots = run.roots(
            replace(batch, index=self._batches),
            self._settings["output"],
            self._settings["mc_samples"],
            sums_follow=True,
        )
        names = [n for n in self._specs if n in roots.uses and n not in self._unfit]
        return self._batch_sums.of(roots, names, memory)

    def _note(self, reasons: dict[str, str]) -> None:
        """Keeps the reasons of layers that no batch has reached."""
        merged = {**reasons, **self._unfit}
        self._reasons = {n: reason for n, reason in merged.items() if n not in self._sums}

    def _commit(self, fresh: BatchSum, memory: SumMemory) -> None:
        """Adds a batch's sums to those so far."""
        if self._decay is not None:
            self._average(fresh, self._decay)
        known = {n: sums for n, sums in fresh.layers.items() if n in self._sums}
        add_sums([(self._sums[name], sums) for name, sums in known.items()], fresh.below)
        for name, sums in fresh.layers.items():
            if name not in known:
                self._sums[name] = sums.copy(self._room.copied) if known else sums
                if fresh.below:
                    self._sums[name].clear_below()
        add_diagonals(self._diagonals, fresh.diagonals)
        if not known:
            # It holds the running sums from now on.
            memory.let_go()
        for counted in fresh.counts:
            if isinstance(counted.number, Tensor):
                self._held.add(counted.number, counted)
            else:
                self._count_samples(counted)
        self._batches += 1

    def _count_samples(self, counted: Counted) -> None:
        """Adds what the host knows."""
        number = float(counted.number)
        if counted.samples:
            self._count += number
        for name, times in counted.positions.items():
            if name in self._sums:
                self._sums[name].positions += number * times

    def _average(self, fresh: BatchSum, decay: float) -> None:
        """Scales the sums so far, and those of a batch so that it counts as 1 - decay in all."""
        counts = [counted.number for counted in fresh.counts if counted.samples]
        known = [count for count in counts if not isinstance(count, Tensor)]
        old: float | Tensor
        new: float | Tensor
        everywhere = all(not isinstance(counted.number, Tensor) for counted in fresh.counts)
        if everywhere and not self._held:
            if not sum(known) > 0:
                return
            old, new = decay, (1 - decay) / sum(known)
            self._count *= decay
        else:
            total = self._held.zero([counted.number for counted in fresh.counts])
            for count in counts:
                total = total + count
            seen = total > 0
            old = 1 - (1 - decay) * seen.double()
            new = torch.where(seen, (1 - decay) / total, 0.0)
            self._held.scale(old)
        scale_sums(self._sums.values(), old)
        scale_sums(fresh.layers.values(), new)
        foreach.scale_(list(self._diagonals.values()), old)
        foreach.scale_(list(fresh.diagonals.values()), new)
        fresh.counts = [counted._replace(number=counted.number * new) for counted in fresh.counts]

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Does without some of the layers from now on.

        Args:
            reasons: why, by the layers' names, as :attr:`Factors.skipped` is to say it.

        Raises:
            ValueError: a layer is unknown, or was asked for by its own name.
        """
        for name in reasons:
            if name not in self._specs:
                raise ValueError(f"reasons: there is no layer {name!r} here")
        refuse_missing(self._specs, reasons)
        self._skipped.update(reasons)
        for name in reasons:
            # What makes up the batches' sums knows them by the same mapping.
            del self._specs[name]
            self._sums.pop(name, None)

    def factors(self) -> Factors:
        """The factors of everything seen so far; the accumulator can go on afterwards.

        With a ``group`` of all ranks' batches, the same bits on every rank, and for all of them to
        call.

        Raises:
            ValueError: no samples were seen, or a layer asked for by name was never reached.
            RankError: ranks have other models, weights or settings, or one has failed.

        Warns:
            UserWarning: naming linear layers and convolutions that were left out, and why.
        """
        with section_of(self._ranks, "FactorAccumulator.factors()"):
            self.agree()
            return self.finished(2)

    @property
    def skipped(self) -> dict[str, str]:
        """What :attr:`Factors.skipped` would be; before the first batch what is known then."""
        return self._left_out(None)

    def _left_out(self, stacklevel: int | None) -> dict[str, str]:
        """The same, with a warning ``stacklevel`` calls above; None for none."""
        covered = [spec for name, spec in self._specs.items() if name not in self._reasons]
        skipped = {**self._skipped_modules(), **self._reasons, **self._missing()}
        above = None if stacklevel is None else stacklevel + 1
        return left_out(self._model, skipped, covered, above)

    @property
    def reached(self) -> tuple[str, ...]:
        """The layers that have factors so far, without those that an embedding looks up."""
        return tuple(name for name in self._sums if name not in self._tied)

    @property
    def specs(self) -> Mapping[str, LayerSpec]:
        """The layers that are accumulated, as far as batches reach them."""
        return MappingProxyType(self._specs)

    def agree(self, **more: Any) -> None:
        """Makes sure that all ranks of the group, if any, have the same model and settings.

        Args:
            more: settings of whoever calls, of what JSON can hold.

        Raises:
            RankError: on every rank, where one has others.
        """
        if self._ranks is None:
            return
        settings = {
            **self._settings,
            **more,
            "layers with a diagonal alone": sorted(self._large),
            "position_mask given": self._position_mask is not None,
        }
        given = self._model, self._specs, self._loss, settings
        agree_on_pass(self._ranks, "Kronecker factors", *given)

    def finished(self, stacklevel: int | None, last: bool = False) -> Factors:
        """:meth:`factors` of ranks that agree.

        Args:
            stacklevel: of warnings, in calls above; None for none.
            last: whether this accumulator is not needed any more.
        """
        if self._ranks is None:
            return self._finished(stacklevel)
        told = Told(
            self._reasons,
            self._unfit,
            self._tied,
            self.evidence.found,
            list(self._precisions),
            self._unfit_diagonals,
            self._diagonal_reasons,
        )
        given = self._count, self._sums, self._diagonals, told, self._parameters or {}
        found = whole_sums(self._ranks, self._specs, *given, self._room, last=last)
        whole = copy(self)
        whole._count, whole._sums, whole._diagonals = found.count, found.layers, found.diagonals
        whole._unfit, whole._tied = found.told.unfit, found.told.tied
        whole._unfit_diagonals = found.told.unfit_diagonals
        whole._diagonal_reasons = found.told.diagonal_reasons
        whole._precisions = dict.fromkeys(found.told.precisions)
        whole.evidence = replace(self.evidence, found=found.told.checked)
        whole._note(found.told.reasons)
        return whole._finished(stacklevel)

    def _finished(self, stacklevel: int | None) -> Factors:
        self._refuse_forked()
        stacklevel = None if stacklevel is None else stacklevel + 1
        if not self.num_samples > 0:
            raise no_samples(", so there are no factors")
        refuse_missing(self._specs, self._reasons)
        count = self.num_samples
        layers = {
            name: layer_means(
                self._specs[name], self._sums[name], count, self._tied.get(name), self._room
            )
            for name in self._specs
            if name in self._sums and name not in self._large
        }
        large = {
            name: large_layer_means(
                self._specs[name], self._sums[name], count, self._tied.get(name), self._room
            )
            for name in self._specs
            if name in self._sums and name in self._large
        }
        if not layers and not large:
            reasons = "; ".join(f"{name!r} {reason}" for name, reason in self._reasons.items())
            raise ValueError(f"no layer of the model has factors: {reasons}")
        diagonals = {name: total / self.num_samples for name, total in self._diagonals.items()}
        above = None if self._by_name or stacklevel is None else stacklevel + 1
        skipped = self._left_out(above)
        known = (*layers, *large, *diagonals)
        checked = {name: self.evidence.found.get(name, "graph") for name in known}
        settings = {
            **self._settings,
            "precision": "; ".join(self._precisions),
            "checked": checked,
        }
        return Factors(layers, self.num_samples, skipped, settings, diagonals, large)

    def _missing(self) -> dict[str, str]:
        """Why parameters have no diagonal block, where they were asked for."""
        reasons = {**self._diagonal_reasons, **self._unfit_diagonals}
        return {n: reason for n, reason in reasons.items() if n not in self._diagonals}

    def _skipped_modules(self) -> dict[str, str]:
        """Reasons of modules some of whose parameters have no block at all."""
        if not self._diagonals:
            return dict(self._skipped)
        owners = {id(p): name for name, p in self._model.named_parameters()}
        modules = dict(self._model.named_modules())

        def whole(name: str) -> bool:
            if name not in modules:
                return False
            own = [p for p in own_parameters(modules[name]).values() if p is not None]
            return bool(own) and all(owners.get(id(p)) in self._diagonals for p in own)

        return {name: reason for name, reason in self._skipped.items() if not whole(name)}

    def merge(self, other: FactorAccumulator) -> None:
        """Adds what another accumulator of the same model and settings has seen.

        Raises:
            TypeError: ``other`` is not a FactorAccumulator.
            ValueError: its layers or settings differ, or one of both skips a layer that the other
                has; nothing is added then.
        """
        if not isinstance(other, FactorAccumulator):
            raise TypeError(f"other must be a FactorAccumulator, got {type(other).__name__}")
        self._refuse_forked()
        other._refuse_forked()
        same = {k: v for k, v in self._settings.items() if k != "seed"}
        if same != {k: v for k, v in other._settings.items() if k != "seed"}:
            raise ValueError(
                f"other was made with settings {other._settings}, this one with {self._settings}"
            )
        if self._specs != other._specs or self._large != other._large:
            raise ValueError("other has other layers than this accumulator")
        for one, another in ((self, other), (other, self)):
            for name in one._sums.keys() & another._unfit.keys():
                raise ValueError(
                    f"other does not fit: layer {name!r} {another._unfit[name]} in one of both and "
                    "has factors in the other (leave the layer out with layers=[...])"
                )
        for first, second in ((self, other), (other, self)):
            for name in first._diagonals.keys() & second._unfit_diagonals.keys():
                raise ValueError(
                    f"other does not fit: parameter {name!r} {second._unfit_diagonals[name]} in "
                    "one of both and has a diagonal in the other (diagonal=False leaves all out)"
                )
        shared = [(self._sums[n], sums) for n, sums in other._sums.items() if n in self._sums]
        add_sums(pair for pair in shared if pair[0].device == pair[1].device)
        for mine, sums in shared:
            if mine.device != sums.device:
                # One layer's at a time: of two places one may have no room for all.
                add_sums([(mine, sums.copy(partial(Tensor.to, device=mine.device)))])
        alike = self._room.place is not None or other._room.place is None
        for name, sums in other._sums.items():
            if name not in self._sums:
                self._sums[name] = sums.copy(self._room.copied if alike else self._room.taken)
        add_diagonals(
            self._diagonals,
            {n: d if n in self._diagonals else d.clone() for n, d in other._diagonals.items()},
        )
        self._unfit_diagonals = {**other._unfit_diagonals, **self._unfit_diagonals}
        self._diagonal_reasons = {**other._diagonal_reasons, **self._diagonal_reasons}
        self._count += other._count
        self._batches += other._batches
        self._precisions.update(other._precisions)
        self._unfit = {**other._unfit, **self._unfit}
        self._tied = {**other._tied, **self._tied}
        for name, how in other.evidence.found.items():
            self.evidence.note(name, [how])
        self._note({**other._reasons, **self._reasons})

    def state_dict(self) -> dict[str, Any]:
        """Everything accumulated, as tensors and plain numbers: to stop and go on later."""
        return self._accumulated(torch.clone)

    def _accumulated(self, clone: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """:meth:`state_dict` with copies of the sums; without ``clone`` with themselves."""

        self._refuse_forked()

        def own(sums: LayerSums) -> LayerSums:
            return sums if clone is None else sums.copy(clone)

        return {
            "format": FORMAT,
            "count": self.num_samples,
            "batches": self._batches,
            "reasons": dict(self._reasons),
            "unfit": dict(self._unfit),
            "tied": dict(self._tied),
            "draws": vars(self._drawn).copy(),
            "settings": dict(self._settings),
            "checked": dict(self.evidence.found),
            "precisions": list(self._precisions),
            "layers": {name: vars(own(sums)).copy() for name, sums in self._sums.items()},
            "diagonals": {name: total.clone() for name, total in self._diagonals.items()},
            "unfit_diagonals": dict(self._unfit_diagonals),
            "diagonal_reasons": dict(self._diagonal_reasons),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, in place of what was accumulated here.

        Raises:
            ValueError: the state is none, or belongs to other settings or other layers; what was
                accumulated here then stays.
        """
        check_state(state, self._settings)
        device = model_device(self._model)
        loaded = layers_of_state(state, self._specs, self._large, self._room)
        diagonals = diagonals_of_state(state, self._parameters, device)
        self._drawn = DrawsUsed(**state["draws"])
        self._diagonals = diagonals
        self._unfit_diagonals = dict(state.get("unfit_diagonals", {}))
        self._diagonal_reasons = dict(state.get("diagonal_reasons", {}))
        self._sums, self._process = loaded, os.getpid()
        self._count, self._batches = state["count"], state["batches"]
        self._precisions = dict.fromkeys(state.get("precisions", ()))
        self._reasons, self._unfit = dict(state["reasons"]), dict(state["unfit"])
        self._tied = dict(state.get("tied", {}))
        self.evidence.found = dict(state.get("checked", {}))
