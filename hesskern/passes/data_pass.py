"""One pass over data: what every sum, factor and operator does with a model and its batches.

1. The model is frozen and its layers are captured.
2. A batch goes to the model's device and through the model; its targets, weights and values are
   checked, and its root rows stand ready to run backwards.
3. Whoever makes the pass adds up or keeps what it needs of them; then the conditions on the batch
   are closed, and the next one follows.
4. Behind the last batch, or after an error, all conditions are settled: of two errors the earlier
   batch's counts, which may be found last.

What stores samples begins anew with less where memory runs out, and what exceeds its budget makes
the pass again for every product, as long as the model stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hesskern.choices import Output
from hesskern.graph.evidence import Evidence
from hesskern.parallel.ranks import Ranks
from hesskern.parallel.sharded import gathered_values, is_sharded
from hesskern.passes.batches import Batch, DataCourse, batches, halves
from hesskern.passes.capture import Capture
from hesskern.passes.checks import Checks
from hesskern.passes.diagonals import DiagonalCapture
from hesskern.passes.draws import Draws
from hesskern.passes.forward_pass import model_device
from hesskern.passes.layers import LayerSpec
from hesskern.passes.losses import Loss
from hesskern.passes.memory import budget_for, out_of_memory, release
from hesskern.passes.roots import BatchRoots
from hesskern.passes.sample_numbers import Positions
from hesskern.portable import ModelRun
from hesskern.progress import Progress

__all__ = [
    "DataPass",
    "RepeatedPass",
    "once_only",
    "stored_or_anew",
    "whole_or_halves",
    "with_less_memory",
]

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass
class DataPass:
    """One pass, inside a ``with`` block that freezes the model.

    >>> with DataPass(model, data, loss, specs) as run:
    ...     for batch, roots in run:
    ...         ...  # step 3

    Attributes:
        model, data, sample_weight: as in :func:`hesskern.layer_hessians`.
        loss, specs: what gives the root rows, and the layers by name.
        evidence: of which rows belong to which samples; shared by passes of one model.
        progress, description: told after every batch, and what a bar says.
        examine, kept, unfit, linear_use, diagonals: as in :class:`hesskern.passes.capture.Capture`.
        position_mask, output, mc_samples, seed: as in :func:`hesskern.kronecker_factors`. The same
            rows are drawn in every pass.
        stream: which of several passes that draw independently of each other.
        positions: number the samples that the data has no numbers of.
        ended: called when the model is no longer in use.
        course: where the pass goes on, if it has begun before.
        behind: called behind every batch of an iteration.
        count: weighted number of samples, behind the last batch.
    """

    model: nn.Module
    data: Iterable[Any]
    loss: Loss
    specs: dict[str, LayerSpec]
    sample_weight: Tensor | None = None
    evidence: Evidence = field(default_factory=Evidence)
    progress: Progress | None = None
    description: str = "data"
    examine: bool = False
    kept: Collection[str] = ()
    unfit: dict[str, str] = field(default_factory=dict)
    linear_use: bool = False
    position_mask: Callable[[Any], Any] | None = None
    output: Output = "exact"
    mc_samples: int = 1
    seed: int = 0
    diagonals: DiagonalCapture | None = None
    course: DataCourse | None = None
    stream: int = 0
    positions: Positions = field(default_factory=Positions)
    ended: Callable[[], None] | None = None
    behind: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.draws = Draws(self.seed, self.stream)
        self.count = 0.0
        self._counted: float | Tensor = 0.0
        # Which batch's sample was asked on a device.
        self._asked: int | None = None
        self.checks = Checks()
        self.capture = Capture(
            self.model,
            self.specs,
            self.kept,
            self.examine,
            self.evidence,
            self.loss.run,
            unfit=self.unfit,
            linear_use=self.linear_use,
            diagonals=self.diagonals,
        )

    def state(self) -> dict[str, Any]:
        """What was found of the model so far, as plain values, for a pass that goes on later."""
        return {
            "capture": self.capture.state(),
            "evidence": self.evidence.state(),
            "counted": self._counted,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave; before the ``with`` block."""
        self.capture.restore(state["capture"])
        self.evidence.restore(state["evidence"])
        counted = state["counted"]
        if isinstance(counted, Tensor):
            counted = counted.to(model_device(self.model))
        self._counted = counted

    def __enter__(self) -> DataPass:
        self._open = ExitStack()
        self._open.enter_context(self.checks)
        self._open.enter_context(self.capture)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._open.__exit__(*error)
        finally:
            if self.ended is not None:
                self.ended()

    def __iter__(self) -> Iterator[tuple[Batch, BatchRoots]]:
        for batch in self.batches():
            roots = self.roots(batch, self.output, self.mc_samples)
            self._counted = self._counted + roots.count
            yield batch, roots
            self.checks.close()
            if self.behind is not None:
                self.behind()
        self.settle()
        self.count = float(self._counted)

    def batches(self) -> Iterator[Batch]:
        """The batches alone, for whoever runs the model on parts and closes conditions itself."""
        device = model_device(self.model)
        given = self.data, device, self.sample_weight, self.progress, self.description
        how = self.loss.split_batch, self.position_mask, self.positions, self.course
        return batches(*given, *how)

    def roots(
        self,
        batch: Batch,
        output: Output,
        samples: int,
        sums_follow: bool = False,
    ) -> BatchRoots:
        """Runs the model on a batch; arguments as those of :class:`BatchRoots`."""
        roots = BatchRoots(
            self.capture, batch, self.loss, output, samples, self.draws, self.checks, sums_follow
        )
        # Once more where a batch that ran out of memory comes again, in parts.
        if not self.evidence.compared and self._asked in (None, batch.index):
            self._compare(batch, roots.outputs)
        return roots

    def _compare(self, batch: Batch, outputs: Tensor) -> None:
        """The loss with the model's own, until a batch tells."""
        conditions = self.checks.conditions
        with self.capture.aside():
            self.evidence.compared = self.loss.compare(self.model, batch, outputs, self.checks)
        if self.checks.conditions > conditions:
            # A device, whose answer comes later.
            self._asked = batch.index

    def settle(self) -> None:
        """Behind the last batch: looks at all conditions, or raises the first error among them."""
        self.checks.settle()
        self.evidence.compared |= self._asked is not None


@dataclass
class RepeatedPass(ModelRun):
    """What it takes to make a pass anew at every product, as long as the model stays the same.

    Attributes:
        model, data, loss, specs, sample_weight, evidence: as in :class:`DataPass`.
        budget: bytes of samples that may be kept at a time.
        position_mask, output, mc_samples, seed: as in :class:`DataPass`.
        ranks: whose part of the data this is; None: there are no others.
    """

    model: nn.Module
    data: Iterable[Any]
    loss: Loss
    specs: dict[str, LayerSpec]
    sample_weight: Tensor | None
    evidence: Evidence
    budget: int
    position_mask: Callable[[Any], Any] | None = None
    output: Output = "exact"
    mc_samples: int = 1
    seed: int = 0
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        self.remember()

    def _current(self) -> list[Any]:
        if self.ranks is None or not is_sharded(self.model):
            return super()._current()
        return gathered_values(self.model)

    def _what(self) -> str:
        """What is made of the passes, for messages."""
        raise NotImplementedError

    def _about(self) -> str:
        return (
            f"{self._what()}, which exceeds memory_budget and runs the model again at every "
            "product,"
        )

    def require(self, names: Iterable[str]) -> None:
        """These layers alone from now on: they were fit, and are not to be skipped in silence."""
        self.specs = {name: replace(self.specs[name], required=True) for name in names}

    def run(self, progress: Progress | None = None, description: str = "data") -> DataPass:
        """The pass; a RuntimeError where the model has changed."""
        if self.changed:
            raise RuntimeError(f"the model changed since {self._what()} was made; make it anew")
        given = self.model, self.data, self.loss, self.specs, self.sample_weight, self.evidence
        return DataPass(
            *given,
            progress,
            description,
            position_mask=self.position_mask,
            output=self.output,
            mc_samples=self.mc_samples,
            seed=self.seed,
            ended=self.ran,
            positions=Positions.of(self.ranks),
        )

    def within_budget(
        self, pieces: Iterable[Piece], added: Callable[[Piece, Piece | None], int], whose: str
    ) -> list[Piece] | None:
        """The pieces of a whole pass, or None if they exceed the budget.

        Args:
            pieces: of this pass.
            added: bytes that keeping a piece takes beside the one before it.
            whose: samples these are, for a message.

        Raises:
            ValueError: they exceed the budget, and the data can be iterated only once.
        """
        found: list[Piece] | None = []
        held = 0
        for piece in pieces:
            if found is None:
                continue
            held += added(piece, found[-1] if found else None)
            found.append(piece)
            if held > self.budget:
                if isinstance(self.data, Iterator):
                    raise once_only(self.budget, whose)
                found = None
        return found


@contextmanager
def stored_or_anew(
    pieces: list[Piece] | Callable[[], Generator[Piece, None, None]],
) -> Iterator[Iterable[Piece]]:
    """The pieces; what runs the model again is shut down at once, also after an error."""
    if isinstance(pieces, list):
        yield pieces
    else:
        with closing(pieces()) as made:
            yield made


def once_only(budget: int, whose: str) -> ValueError:
    """The error of samples that exceed a budget and cannot be made anew."""
    return ValueError(
        f"memory_budget of {budget} bytes is too small for {whose}, and data can be iterated only "
        "once; raise it or pass a re-iterable (a DataLoader or a list)"
    )


def with_less_memory(
    attempt: Callable[[int], Result], memory_budget: Any, model: nn.Module, data: Iterable[Any]
) -> Result:
    """attempt(budget), and where memory runs out once more with a quarter of the budget.

    Args:
        attempt: a pass that stores samples; leaves nothing behind when it fails.
        memory_budget: bytes; None for 4 GiB, on a GPU for a quarter of its free memory.
        model, data: of the pass, which cannot be repeated where the data are an iterator.

    Raises:
        TypeError, ValueError: ``memory_budget`` is no number of bytes.
        torch.OutOfMemoryError: the second time; says what to set.
    """
    budget = budget_for(memory_budget, model_device(model), 4 * 2**30, 1 / 4)
    try:
        return attempt(budget)
    except torch.OutOfMemoryError as error:
        if isinstance(data, Iterator):
            raise out_of_memory(error, False) from error
    # Behind the except clause, whose error holds on to the tensors of the failed attempt.
    release()
    try:
        return attempt(budget // 4)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, True) from error


def whole_or_halves(
    batch: Batch, attempt: Callable[[Batch, bool], Result], undo: Callable[[], None]
) -> list[Result]:
    """What is made of a batch; of its halves, one after the other, where memory does not suffice.

    Args:
        batch: of a pass.
        attempt: makes it of a batch, told whether that is the whole one.
        undo: takes back what a failed attempt has left.

    Raises:
        torch.OutOfMemoryError: for the halves, too, or the batch cannot be halved; says what to do.
    """
    try:
        return [attempt(batch, True)]
    except torch.OutOfMemoryError as error:
        parts = halves(batch)
        if len(parts) == 1:
            raise out_of_memory(error, False) from error
    # Behind the except clause, whose error holds on to the tensors of the failed attempt.
    undo()
    release()
    try:
        return [attempt(part, False) for part in parts]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # Something in the batch may not be cut by samples.
        raise out_of_memory(error, True) from error
