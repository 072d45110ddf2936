"""Sums of layers' inputs with one batch more, made while the model runs, beside those before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hesskern.factors.input_rows import Rows
from hesskern.factors.input_sums import InputSums, SharedSums
from hesskern.passes.layers import LayerSpec

__all__ = ["NextSums", "SpareMemory"]


class SpareMemory:
    """Memory of sums that are needed no more: those of each batch lie where older ones lay."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any values, but zeros below its diagonal where all others have them."""
        free = self._free.get((shape, dtype, device))
        return free.pop() if free else torch.zeros(shape, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Takes one that nobody else holds."""
        self._free.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(tensor)


@dataclass(eq=False)
class _Next:
    """What the sums of some layers become with a batch.

    Attributes:
        spec: of one of the layers.
        before: the sums of the batches before; None: there are none.
        spare: memory for more.
        inputs: [(g,) d, d] the sums before and what was added at once; None: nothing was.
        column, positions: of :class:`InputSums`, with all of the batch.
        images: of a convolution, 0-dim sums of squared entries that were added at once.
        later: what is to be added yet.
        layers: their names, in order.
        stamp: another one whenever something was added.
        step: by which it is known among all of the batch.
    """

    spec: LayerSpec
    before: InputSums | None
    spare: SpareMemory
    inputs: Tensor | None = None
    column: Tensor | None = None
    positions: float = 0.0
    images: list[Tensor] = field(default_factory=list)
    later: list[Rows] = field(default_factory=list)
    layers: dict[str, None] = field(default_factory=dict)
    stamp: object = None
    step: tuple[Hashable, Hashable] = (None, None)

    def copy(self) -> _Next:
        """The same, of no layers yet."""
        inputs = self.inputs
        if inputs is not None:
            inputs = self._room(inputs).copy_(inputs)
        found = (self.spec, self.before, self.spare, inputs, self.column, self.positions)
        return _Next(*found, list(self.images), list(self.later))

    def add(self, rows: Rows) -> None:
        """Adds a call's rows: at once, while they are in the caches, where they take more memory
        than the sums, or else later, all of them or none.
        """
        if self.column is None and self.before is not None:
            # From a file, they lie on the host.
            self.column = self.before.column.to(rows.x.device)
            self.positions = self.before.positions
        if self.column is None:
            self.column = rows.column.clone()
        else:
            self.column = self.column + rows.column.to(self.column.dtype)
        self.positions += rows.positions
        g, d = self.spec.groups, self.spec.weight_inputs
        if rows.x.numel() < g * d * d:
            self.later.append(rows.kept())
            return
        if self.spec.kind != "linear":
            # A trace counts a pixel as often as windows hold it.
            self.images.append(rows.squares())
        if self.inputs is not None:
            rows.add_to(self.spec, self.inputs)
        elif self.before is None:
            self.inputs = InputSums.zeros(self.spec, self.column.dtype, self.column.device).inputs
            rows.add_to(self.spec, self.inputs)
        else:
            self.inputs = self._room(self.before.inputs)
            rows.add_to(self.spec, self.inputs, self.before.inputs.to(self.column.device))

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums."""
        assert self.column is not None
        return self.column.dtype

    def _room(self, like: Tensor) -> Tensor:
        assert self.column is not None
        return self.spare.take(like.shape, like.dtype, self.column.device)

    def squares(self) -> list[Tensor]:
        """0-dim parts of the sum of all squared entries but :attr:`squares_before`; NaN or Inf if
        an entry is.
        """
        known = [_trace(self.inputs)] if self._traced and self.inputs is not None else []
        return [*known, *self.images, *(rows.squares() for rows in self.later)]

    @property
    def squares_before(self) -> float:
        """Sum of squared entries that :meth:`squares` does not count."""
        return 0.0 if self._traced or self.before is None else self.before.squares

    @property
    def _traced(self) -> bool:
        """Whether the trace of the sums is the sum of squares, those before included."""
        return self.spec.kind == "linear" and self.inputs is not None

    def sums(self, squares: float, alone: bool) -> InputSums:
        """All of them.

        Args:
            squares: sum of squared entries.
            alone: whether nobody else needs those before, whose memory then becomes that of all.
        """
        assert self.column is not None
        inputs = self.inputs
        if inputs is None and self.before is not None:
            inputs = self.before.inputs.to(self.column.device)
            if inputs is self.before.inputs and not alone:
                inputs = self._room(inputs).copy_(inputs)
        elif inputs is None:
            inputs = InputSums.zeros(self.spec, self.column.dtype, self.column.device).inputs
        for rows in self.later:
            rows.add_to(self.spec, inputs)
        return InputSums(inputs, self.column, squares, self.positions)


# Of layers: none, those of the batches before, or those with some of this batch.
_State = InputSums | _Next | None


def _trace(inputs: Tensor) -> Tensor:
    """0-dim float64 sum of the diagonals of [(g,) d, d]."""
    return inputs.diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64)


class NextSums:
    """The sums of all layers with one batch more; those before it stay until the batch is whole.

    Layers that have sums in common keep them in common as long as they are given the same.

    Args:
        before: the sums of the batches before.
        spare: memory for more.
    """

    def __init__(self, before: SharedSums, spare: SpareMemory) -> None:
        self._before, self._spare = before, spare
        self._now: dict[str, _Next] = {}
        self._known: dict[tuple[Hashable, Hashable], _Next] = {}

    def add(
        self, names: Iterable[str], key: Hashable, spec: LayerSpec, rows: Callable[[], Rows]
    ) -> None:
        """Adds a call's rows to the sums of some layers.

        Args:
            names: of the layers.
            key: the same for two calls only if their rows are, and their layers' geometry.
            spec: of one of the layers.
            rows: gives the rows, if they were not added before for layers with the same sums.
        """
        moving: dict[_State, list[str]] = {}
        for name in names:
            state = self._now.get(name, self._before.by_layer.get(name))
            moving.setdefault(state, []).append(name)
        given: Rows | None = None
        for state, members in moving.items():
            step = (state.stamp if isinstance(state, _Next) else state), key
            found = self._known.get(step)
            if found is None:
                found = self._moved(state, members, spec)
                given = rows() if given is None else given
                found.add(given)
                found.step, found.stamp = step, object()
                self._known[step] = found
            if isinstance(state, _Next) and state is not found:
                for name in members:
                    del state.layers[name]
                if not state.layers:
                    del self._known[state.step]
                    if state.inputs is not None:
                        self._spare.give(state.inputs)
            found.layers.update(dict.fromkeys(members))
            self._now.update(dict.fromkeys(members, found))

    def _moved(self, state: _State, members: list[str], spec: LayerSpec) -> _Next:
        """What some of the layers with the sums ``state`` go on with."""
        if not isinstance(state, _Next):
            return _Next(spec, state, self._spare)
        if len(state.layers) > len(members):
            return state.copy()
        # Layers that are given the same from here on have lost their way to it.
        del self._known[state.step]
        return state

    def of(self, names: Iterable[str]) -> list[_Next]:
        """What is new of some layers, in their order; the others are forgotten."""
        names = [name for name in names if name in self._now]
        found = {id(self._now[name]): self._now[name] for name in names}
        for one in found.values():
            one.layers = {name: None for name in names if self._now.get(name) is one}
        return list(found.values())

    def put(self, parts: Collection[tuple[_Next, float]]) -> None:
        """Has the new sums take the place of those before.

        Args:
            parts: of :meth:`of`, each with the sum of its squared entries.
        """
        by_layer = self._before.by_layer
        new = {name for one, _ in parts for name in one.layers}
        # Who reads sums before yet: layers without new ones, and those that are not added up.
        staying = {id(sums) for name, sums in by_layer.items() if name not in new}
        users = Counter(id(one.before) for one, _ in parts if one.inputs is None)
        old = {id(one.before): one.before for one, _ in parts if one.before is not None}
        for one, squares in parts:
            key = id(one.before)
            sums = one.sums(squares, key not in staying and users[key] == 1)
            if one.inputs is None:
                users[key] -= 1
            for name in one.layers:
                by_layer[name] = sums
        held = {id(sums.inputs) for sums in by_layer.values()}
        for sums in old.values():
            if id(sums.inputs) not in held:
                self._spare.give(sums.inputs)
