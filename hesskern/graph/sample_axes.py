"""Which rows of a layer's call belong to which sample, as the graph proves it.

A sample is an entry of the outputs' first axis. A row of a call belongs to sample n if outputs n,
and no others, depend on it. Every operation between the call and the outputs that is known to act
on samples alone says where in its operands they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hesskern.graph.nodes import axis_of, kind, output_shape, passes_gradients, product
from hesskern.graph.routed_rows import RoutedRows, merged_owners, regular
from hesskern.graph.sample_rules import PRODUCTS, RULES, STEADY
from hesskern.graph.sample_selections import PUTS, SELECTIONS
from hesskern.graph.sample_step import Axis, Step, owners_of

__all__ = ["Arrangement", "Proved", "prove"]


@dataclass(frozen=True)
class Arrangement:
    """Rows [outer, samples, inner], flattened: row r belongs to sample (r // inner) % samples.

    Attributes:
        outer, samples, inner: sizes.
    """

    outer: int
    samples: int
    inner: int

    @property
    def positions(self) -> int:
        """Rows of a sample."""
        return self.outer * self.inner

    def by_sample(self, rows: Tensor) -> Tensor:
        """[samples, positions, ...] of rows [outer samples inner, ...]; a view if it can be."""
        if self.outer == 1:
            return rows.reshape(self.samples, self.inner, *rows.shape[1:])
        shaped = rows.reshape(self.outer, self.samples, self.inner, *rows.shape[1:])
        return shaped.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class Proved:
    """What the graph says.

    Attributes:
        arrangements: for every call, or None where operations are not known to keep samples apart.
        steady: whether what they do to the samples is the same in all batches; looked into where
            an arrangement is None. A selection by numbers, or a product with an input, may move
            other rows in the next one; a sum over samples shows where the gates behind it are open.
        selected: calls whose rows are taken from those of a larger tensor.
        placed: calls whose rows become some of those of a larger tensor, along the samples' axis.
    """

    arrangements: list[Arrangement | RoutedRows | None]
    steady: bool
    selected: frozenset[Any] = frozenset()
    placed: frozenset[Any] = frozenset()


def prove(
    outputs: Tensor,
    alive: list[Any],
    calls: list[Any],
    windows: list[slice | None] | None = None,
    trusted: Collection[Any] = (),
) -> Proved:
    """Arrangements that the graph proves.

    Args:
        outputs: [N, ...] with N >= 1.
        alive: the nodes that they depend on, by :func:`hesskern.graph.nodes.behind`.
        calls: nodes of the graph with one result each, rows in front: [..., m], or [B, m, ...] for
            convolutions.
        windows: per call, which of its rows are asked about; None for all.
        trusted: calls that are known to act on some rows of a larger tensor.

    Returns:
        :class:`Proved`.
    """
    if not alive:
        return Proved([None] * len(calls), True)
    proof = _Proof(outputs, alive, calls, trusted)
    arrangements = proof.arrangements(windows or [None] * len(calls))
    placed = frozenset(node for node in calls if proof.placed.get((node, 0)))
    steady = all(one is not None for one in arrangements) or proof.steady()
    return Proved(arrangements, steady, frozenset(proof.selected), placed)


class _Proof:
    def __init__(
        self, outputs: Tensor, alive: list[Any], calls: list[Any], trusted: Collection[Any]
    ) -> None:
        self._samples = len(outputs)
        self._calls = calls
        wanted = set(calls)
        needed: set[Any] = set()
        for node in alive:
            if node in wanted or any(f in needed for f, _ in node.next_functions):
                needed.add(node)
        self._needed = needed
        self._mixed = self._moved = False
        self._selections: set[Any] = set()
        self.selected: set[Any] = set()
        # By the same keys: whether what lies there goes into a larger tensor on all its ways.
        self.placed: dict[tuple[Any, int], bool] = {}
        self._trusted = trusted
        self._device = outputs.device
        # By node and number of its output: where samples are, or None for what is not known.
        self._axes: dict[tuple[Any, int], Axis | None] = {
            (alive[-1], outputs.output_nr): Axis(0, 1)
        }
        for node in reversed(alive):
            if node in needed:
                self._pass_on(node)

    def _pass_on(self, node: Any) -> None:
        numbers = [n for n in range(len(node._input_metadata)) if (node, n) in self._axes]
        for number in numbers:
            here, shape = self._axes[node, number], output_shape(node, number)
            for operand, (follower, arriving) in enumerate(node.next_functions):
                if follower not in self._needed:
                    continue
                there, placed = None, operand == 1 and kind(node) in PUTS
                key, source = (follower, arriving), output_shape(follower, arriving)
                if here is not None and shape is not None and source is not None:
                    step = Step(
                        node, operand, shape, source, here, self._samples, self._device, number
                    )
                    there = self._step(step)
                    placed = placed or self._is_placed(step)
                self.placed[key] = placed and self.placed.get(key, True)
                if key in self._axes:
                    there = self._merged(self._axes[key], there, source)
                self._axes[key] = there

    def _is_placed(self, step: Step) -> bool:
        """Whether an operand goes into a larger tensor, here or behind."""
        node, shape, source = step.node, step.shape, step.source
        if kind(node) == "Cat" and len(shape) == len(source):
            axis = axis_of(node._saved_dim, len(shape))
            if axis == step.here.axis and shape[axis] > source[axis]:
                return True
        # Behind a selection lies the larger tensor.
        return node not in self._selections and self.placed.get((node, step.number), False)

    def _merged(
        self, one: Axis | None, other: Axis | None, shape: tuple[int, ...] | None
    ) -> Axis | None:
        """What two operations say of the same tensor."""
        if one is None or other is None or shape is None:
            return None
        if one.same(other):
            return one
        for this, that in ((one, other), (other, one)):
            if this.owners is not None and bool((this.owners < 0).all()):
                return that
        if one.axis != other.axis:
            return None
        owners = merged_owners(
            *(
                owners_of(axis, shape[one.axis], self._samples, self._device)
                for axis in (one, other)
            )
        )
        return None if owners is None else self._tidy(Axis(one.axis, 1, owners))

    def _tidy(self, there: Axis) -> Axis:
        """The same without numbers, where the samples are in order again."""
        if there.owners is None:
            return there
        self._moved = True
        inner = regular(there.owners, self._samples)
        return there if inner is None else Axis(there.axis, inner)

    def _step(self, step: Step) -> Axis | None:
        node, source = step.node, step.source
        name = "Alias" if passes_gradients(node) else kind(node)
        rule = RULES.get(name)
        if rule is None:
            return None
        try:
            there = rule(step)
        except (AttributeError, IndexError, TypeError):
            # An operation of this name with other attributes than the rule knows.
            return None
        if there is not None and 0 <= there.axis < len(source):
            if there.owners is not None:
                if name in SELECTIONS:
                    self._selections.add(node)
                if len(there.owners) == source[there.axis]:
                    return self._tidy(there)
                self._mixed = True
                return None
            period = there.inner * self._samples
            if period and source[there.axis] and source[there.axis] % period == 0:
                return there
        self._mixed = True
        return None

    def steady(self) -> bool:
        """Whether no operation moves or mixes rows by values."""
        if self._mixed or self._moved:
            return False
        return all(self._is_steady(node) for node in self._needed)

    def _is_steady(self, node: Any) -> bool:
        if passes_gradients(node) or (node in self._calls and kind(node) in PRODUCTS):
            return True
        here = [
            self._axes[node, number]
            for number in range(len(node._input_metadata))
            if (node, number) in self._axes
        ]
        if here and None not in here and None not in self._after(node):
            return True
        if kind(node) in ("Add", "Sub"):
            shape = output_shape(node)
            return all(
                output_shape(follower, number) == shape
                for follower, number in node.next_functions
                if follower is not None
            )
        return kind(node) in STEADY

    def _after(self, node: Any) -> list[Axis | None]:
        """Where samples are in the operands that gradients go on to."""
        return [
            self._axes.get((follower, number))
            for follower, number in node.next_functions
            if follower in self._needed
        ]

    def arrangements(
        self, windows: Iterable[slice | None]
    ) -> list[Arrangement | RoutedRows | None]:
        return [
            self._arrangement(node) if window is None else self._part(node, window)
            for node, window in zip(self._calls, windows, strict=True)
        ]

    def _part(self, node: Any, window: slice) -> Arrangement | RoutedRows | None:
        """Of some rows of a call."""
        here, shape = self._axes.get((node, 0)), output_shape(node)
        if here is None or shape is None or not product(shape) or here.axis == len(shape) - 1:
            return None
        return self._routed(self._row_owners(here, shape)[window], True)

    def _row_owners(self, here: Axis, shape: tuple[int, ...]) -> Tensor:
        """[R] of rows [..., m]."""
        owners = owners_of(here, shape[here.axis], self._samples, self._device)
        owners = owners.repeat_interleave(product(shape[here.axis + 1 : -1]))
        return owners.repeat(product(shape[: here.axis]))

    def _selects(self, node: Any, rows: int) -> bool:
        """Whether the graph shows that a call's rows were taken from those of a larger tensor."""
        pending, done = [node], {node}
        while pending:
            for follower, number in pending.pop().next_functions:
                shape = None if follower is None else output_shape(follower, number)
                axis = self._axes.get((follower, number))
                if follower in done or axis is None or shape is None or shape[axis.axis] != rows:
                    continue
                if follower in self._selections:
                    return True
                done.add(follower)
                pending.append(follower)
        return False

    def _routed(self, owners: Tensor, selected: bool) -> Arrangement | RoutedRows | None:
        inner = regular(owners, self._samples)
        if inner is not None:
            return Arrangement(len(owners) // (inner * self._samples), self._samples, inner)
        if not len(owners) or bool((owners < 0).any()):
            return None
        rows = RoutedRows(owners, self._samples)
        if not selected and bool((rows.counts == rows.positions).all()):
            # As many rows of each sample: they may all have been moved to other samples.
            return None
        return rows

    def _arrangement(self, node: Any) -> Arrangement | RoutedRows | None:
        here, shape = self._axes.get((node, 0)), output_shape(node)
        if here is None or shape is None or not product(shape):
            return None
        by_rows = kind(node) != "Convolution" and here.axis < len(shape) - 1
        if self._selections and by_rows and self._selects(node, shape[here.axis]):
            self.selected.add(node)
        if here.owners is not None:
            if not by_rows:
                return None
            owners = self._row_owners(here, shape)
            return self._routed(owners, node in self._trusted or node in self.selected)
        if kind(node) == "Convolution":
            rows, inner = shape[0], here.inner
            if here.axis != 0:
                return None
        else:
            rows = product(shape[:-1])
            if here.axis == len(shape) - 1:
                return None
            inner = here.inner * product(shape[here.axis + 1 : -1])
        return Arrangement(rows // (inner * self._samples), self._samples, inner)
