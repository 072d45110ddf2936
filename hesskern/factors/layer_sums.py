"""Running sums of one layer: what its Kronecker factors are means of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hesskern.devices import on_host
from hesskern.graph.nodes import product
from hesskern.ops import foreach
from hesskern.spill.rooms import Room, Spill

__all__ = [
    "BatchSum",
    "Counted",
    "LayerSums",
    "Layout",
    "SumMemory",
    "add_diagonals",
    "add_sums",
    "bordered",
    "scale_sums",
]

# Sums of more bytes than this are given back to the host between batches: the model takes them.
_LARGE = 2**24
# A layer's sums of more bytes than this have a piece of their own there.
_APART = 2**18

# Elements between which sums begin: 256 bytes of float32, as an allocator would align them.
_ALIGNED = 64


@dataclass
class LayerSums:
    """Running sums of one layer; upper triangles only.

    Attributes:
        inputs: [d, d] or [g, d, d], without the bias.
        outputs: [m, m], summed over samples and positions; its diagonal [m] of large layers.
        column: [g d] sum of the inputs over samples and positions; used with a joint bias.
        images: sums of the inputs, one per use; None once their shapes varied.
        positions: weighted sum of positions per sample, as far as the host knows it.
    """

    inputs: Tensor
    outputs: Tensor
    column: Tensor
    images: list[Tensor] | None = field(default_factory=list)
    positions: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where all of them lie."""
        return self.inputs.device

    def copy(self, clone: Callable[[Tensor], Tensor] = torch.clone) -> LayerSums:
        """The same in memory of its own.

        Args:
            clone: copies a tensor.
        """
        images = None if self.images is None else [clone(image) for image in self.images]
        return LayerSums(
            clone(self.inputs),
            clone(self.outputs),
            clone(self.column),
            images,
            float(self.positions),
        )

    def clear_below(self) -> None:
        """Makes zeros of what lies below the diagonals."""
        self.inputs.triu_()
        if self.outputs.dim() > 1:
            self.outputs.triu_()

    def fits(self, other: LayerSums) -> bool:
        """Whether adding ``other`` changes nothing but sums."""
        if self.images is None:
            return True
        return other.images is not None and [i.shape for i in self.images] == [
            i.shape for i in other.images
        ]

    def _tensors(self) -> list[Tensor]:
        return [self.inputs, self.outputs, self.column, *(self.images or ())]


def scale_sums(layers: Iterable[LayerSums], factor: float | Tensor) -> None:
    """Multiplies all sums by a number, or by a 0-dim tensor, which leaves the positions alone."""
    tensors = []
    for sums in layers:
        tensors += sums._tensors()
        if not isinstance(factor, Tensor):
            sums.positions *= factor
    foreach.scale_(tensors, factor)


def add_diagonals(mine: dict[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Adds to tensors by name others; those without one of their name are taken as they are."""
    shared = [name for name in other if name in mine]
    foreach.add_([mine[name] for name in shared], [other[name] for name in shared])
    for name, diagonal in other.items():
        mine.setdefault(name, diagonal)


def add_sums(pairs: Iterable[tuple[LayerSums, LayerSums]], below: bool = False) -> None:
    """Adds to the first of every pair the second. Images are lost where their shapes differ.

    Args:
        pairs: of sums of one layer each.
        below: whether there may be any values below the second ones' diagonals, which are not
            added then.
    """
    whole: list[tuple[Tensor, Tensor]] = []
    triangles: list[tuple[Tensor, Tensor]] = []
    for mine, other in pairs:
        mine.positions += other.positions
        if not mine.fits(other):
            mine.images = None
        # One that has lost its images takes none.
        for one, another in zip(mine._tensors(), other._tensors(), strict=False):
            matrix = one is mine.inputs or (one is mine.outputs and one.dim() > 1)
            if not (below and matrix):
                whole.append((one, another))
            elif foreach.have_triangles(one, another):
                triangles.append((one, another))
            else:
                whole.append((one, another.triu()))
    if triangles:
        foreach.add_triangles_(*_parted(triangles))
    foreach.add_(*_parted(whole))


def _parted(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


@dataclass(frozen=True)
class Layout:
    """Shapes of a layer's sums.

    Attributes:
        inputs, outputs, column, images: as in :class:`LayerSums`.
        dtype, device: of all of them.
        blank: which of inputs and outputs may begin with any values, as the first of what is added
            to them takes their place.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    column: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    blank: tuple[bool, bool] = (False, False)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.inputs, self.outputs, self.column, *self.images)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * sum(map(product, self.shapes))


class Counted(NamedTuple):
    """A number that positions are counted in.

    Attributes:
        number: weighted number of samples of a part of the data, or of a mask's positions in it;
            0-dim float64 where only a device knows it.
        positions: how many times the number goes into every layer's positions.
        samples: whether it is a number of samples.
    """

    number: float | Tensor
    positions: dict[str, int]
    samples: bool = True


@dataclass
class BatchSum:
    """The sums of one batch.

    Attributes:
        layers: by name, without their positions.
        pieces: the memory that they lie in, some elements of which belong to none.
        counts: per part of the batch its number of samples with every layer's positions per sample,
            and its masks' positions with the layers that they belong to.
        diagonals: sums of squared gradients by parameter, of its shape.
        blank: matrices that hold any values yet, by layer and attribute.
        below: whether there may be any values below diagonals.
    """

    layers: dict[str, LayerSums]
    pieces: list[Tensor]
    counts: list[Counted] = field(default_factory=list)
    diagonals: dict[str, Tensor] = field(default_factory=dict)
    blank: set[tuple[str, str]] = field(default_factory=set)
    below: bool = False

    def started(self, name: str, matrix: str) -> float:
        """The factor of what a layer's matrix holds before rows are added to it: 0 or 1."""
        if (name, matrix) not in self.blank:
            return 1.0
        self.blank.remove((name, matrix))
        return 0.0

    def fill(self) -> None:
        """Makes zeros of matrices that nothing was added to."""
        for name, matrix in self.blank:
            getattr(self.layers[name], matrix).zero_()
        self.blank.clear()

    def mask(self, alive: Tensor) -> None:
        """Makes all sums zero where the 0-dim ``alive`` is False, whatever they hold."""
        dead = ~alive
        for piece in self.pieces:
            piece.masked_fill_(dead.to(piece.device), 0)
        self.counts = [
            counted._replace(
                number=counted.number.masked_fill(dead.to(counted.number.device), 0)
                if isinstance(counted.number, Tensor)
                else alive.double() * counted.number
            )
            for counted in self.counts
        ]

    def join(self, other: BatchSum) -> None:
        """Adds another part of the same batch."""
        shared = [(self.layers[n], sums) for n, sums in other.layers.items() if n in self.layers]
        add_sums(shared, self.below or other.below)
        self.below = self.below or other.below
        self.layers = {**other.layers, **self.layers}
        self.pieces += other.pieces
        self.counts += other.counts
        add_diagonals(self.diagonals, other.diagonals)


class SumMemory:
    """Memory for the sums of one batch after the other.

    On a host large sums are let go of between batches, and those of every layer lie by themselves
    from the second batch on: the next batch's activations take their place, and give it back when
    rows have gone backwards. The first ones stay as the running sums, in one piece, so that they
    leave no holes.

    Args:
        place: where the memory lies; None: on the layers' device.
    """

    def __init__(self, place: Spill | None = None) -> None:
        self._place = place
        self._layouts: dict[str, Layout] = {}
        self._sum: BatchSum | None = None
        self._begun = False

    def zeros(self, layouts: dict[str, Layout]) -> BatchSum:
        """Sums of no samples, in the memory of those before, which must not be needed any more.

        Some of them may be blank, but never the first ones.
        """
        if self._sum is None or layouts != self._layouts:
            # The ones before are let go first.
            self._sum = None
            self._sum, self._layouts = _zeros(layouts, self._begun, self._place), dict(layouts)
            self._begun = True
        else:
            for piece in self._sum.pieces:
                piece.zero_()
        found = self._sum
        layers = {
            name: LayerSums(s.inputs, s.outputs, s.column, list(s.images or ()))
            for name, s in found.layers.items()
        }
        if sum(piece.nbytes for piece in found.pieces) > _LARGE and all(map(on_host, found.pieces)):
            self._sum = None
        blank = set(found.blank)
        return BatchSum(layers, list(found.pieces), blank=blank, below=bool(blank))

    def let_go(self) -> None:
        """Leaves the memory to whoever holds the sums."""
        self._sum = None


def _zeros(layouts: dict[str, Layout], scattered: bool, place: Spill | None) -> BatchSum:
    scattered = scattered and sum(layout.nbytes for layout in layouts.values()) > _LARGE
    groups: dict[tuple[torch.dtype, torch.device, str], list[str]] = {}
    for name, layout in layouts.items():
        # One piece needs one fill; on a host only smaller ones find room between others.
        large = scattered and layout.device.type == "cpu" and layout.nbytes > _APART
        apart = name if large else ""
        groups.setdefault((layout.dtype, layout.device, apart), []).append(name)
    pieces, found = [], {}
    blank: set[tuple[str, str]] = set()
    for (dtype, device, _), names in groups.items():
        shapes = [shape for name in names for shape in layouts[name].shapes]
        room = [-(-product(shape) // _ALIGNED) * _ALIGNED for shape in shapes]
        # What the host sets to zero takes as long as adding it up.
        empty = scattered and place is None and device.type == "cpu"
        if empty:
            piece = torch.empty(sum(room), dtype=dtype, device=device)
        else:
            piece = Room(place, device).zeros([sum(room)], dtype)
        pieces.append(piece)
        begins = accumulate([0, *room])
        parts = iter(
            [
                piece.as_strided(shape, _strides(shape), begin)
                for shape, begin in zip(shapes, begins, strict=False)
            ]
        )
        for name in names:
            inputs, outputs, column = (next(parts) for _ in range(3))
            images = [next(parts) for _ in layouts[name].images]
            found[name] = LayerSums(inputs, outputs, column, images)
            if empty:
                blank.update(_left_blank(name, found[name], layouts[name]))
    return BatchSum({name: found[name] for name in layouts}, pieces, blank=blank)


def _left_blank(name: str, sums: LayerSums, layout: Layout) -> list[tuple[str, str]]:
    """Makes zeros of all sums of a layer but those that may stay blank, which are returned."""
    matrices = ((sums.inputs, "inputs"), (sums.outputs, "outputs"))
    left = [(name, matrix) for (_, matrix), may in zip(matrices, layout.blank, strict=True) if may]
    for tensor, matrix in matrices:
        if (name, matrix) not in left:
            tensor.zero_()
    for tensor in (sums.column, *(sums.images or ())):
        tensor.zero_()
    return left


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a tensor without gaps, its last axis the fastest."""
    return [product(shape[i + 1 :]) for i in range(len(shape))]


def bordered(matrix: Tensor, column: Tensor, corner: float, out: Tensor | None = None) -> Tensor:
    """[(g,) d + 1, d + 1]: the matrix with E[sum_t x_t] [g d] and the number of positions added.

    Args:
        matrix: [(g,) d, d].
        column: [g d].
        corner: the last entry.
        out: where the result goes; None: in memory of its own.
    """
    blocks = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
    g, d, _ = blocks.shape
    out = blocks.new_empty(g, d + 1, d + 1) if out is None else out.view(g, d + 1, d + 1)
    out[:, :d, :d] = blocks
    out[:, :d, d] = out[:, d, :d] = column.reshape(g, d)
    out[:, d, d] = corner
    return out if matrix.dim() == 3 else out[0]
