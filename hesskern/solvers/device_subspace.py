"""The same basis on a device, whose steps never make the host wait.

A step of the CPU's :class:`Subspace` looks at norms: to repeat Gram-Schmidt, to drop what lies in
the span. Here every step queues the same operations, whatever the values: two passes of classical
Gram-Schmidt with the vectors normalized between them ("twice is enough": Giraud, Langou, Rozložník
and van den Eshof, Numerische Mathematik 101 (2005), 87-100), and a random direction in the place of
one that lies in the span, as an exhausted Krylov space is left on the CPU. What the host needs of a
step, the coefficients of its images in the basis, goes to an outbox on the device. The host reads
it in one piece when it next wants to know, and does then what it would have done step by step.

Where Lanczos looks whether pairs have converged, the next step is queued first: while the host
waits for the records of those before and solves their eigenproblem, the device goes on. What the
host finds is one step late, which costs a step in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesskern.solvers.subspace import (
    CountedOperator,
    OnItsWay,
    Subspace,
    check_products,
    lengths,
    on_the_host,
)

__all__ = ["DeviceSubspace", "block_for", "subspace_for"]

_LARGEST_BLOCK = 4
# Of the basis: blocks fill more of it, and a restart before the pairs are confirmed has the host
# wait for what it does to their orthogonality.
_MORE_ROOM = 20
# Of inner products: blocks enough for every multiprocessor, long enough to be worth one. Short
# vectors are not cut: there the second launch takes longer than one multiprocessor does.
_MOST_PIECES, _SHORTEST_PIECE, _SHORTEST_CUT = 128, 256, 4096


def block_for(operator: CountedOperator, k: int) -> int:
    """How many random directions a search for ``k`` pairs begins with.

    A block takes more products than single vectors do, the more the fewer pairs are wanted
    (benchmarks/NOTES.md, Eigenpairs). On a device several vectors share what a product reads and
    packs, and the launches of a step; the CPU's products with several vectors take as long as with
    one after another. Sizes alone decide, not times, so that equal seeds give equal results.
    """
    if operator.device.type == "cpu":
        return 1
    return max(1, min(_LARGEST_BLOCK, k // 5))


def subspace_for(operator: CountedOperator, capacity: int, pending: int) -> Subspace:
    """The form of :class:`Subspace` for the operator's device."""
    if operator.device.type == "cpu":
        return Subspace(operator, capacity, pending)
    return DeviceSubspace(operator, capacity + _MORE_ROOM, pending)


@dataclass(frozen=True)
class _Step:
    """An advance whose records nobody has read.

    Attributes:
        start, stop: of the vectors that it moved into the basis.
        rest: pending directions that stayed behind.
        added: new pending directions behind those, from the first images on.
    """

    start: int
    stop: int
    rest: int
    added: int


@dataclass(frozen=True)
class _Posted:
    """Records of some steps on their way to the host."""

    steps: list[_Step]
    records: OnItsWay


class DeviceSubspace(Subspace):
    """:class:`Subspace` with one read of the device for all steps since the last.

    T, B and the scale are those of the last look; whatever needs them looks first. NaN and Inf in
    products are found then as well.

    Args:
        operator, capacity, pending: as for :class:`Subspace`.
    """

    chain_steps = 4

    def __init__(self, operator: CountedOperator, capacity: int, pending: int) -> None:
        super().__init__(operator, capacity, pending)
        rows, device = len(self._basis), operator.device
        # Row i: the image of basis vector i is the sum of its entries times the basis vectors,
        # those that were pending or came of the step itself included; its norm in the last column.
        self._outbox = torch.zeros(self.capacity, rows + 1, dtype=torch.float64, device=device)
        self._outward = torch.zeros(self.capacity, dtype=torch.float64)
        self._steps: list[_Step] = []
        self._posted: _Posted | None = None
        # How large the basis was before a step that was begun ahead; None once that was told.
        self._before: int | None = None
        self._noise = _generator(device).manual_seed(0)
        self._pieces = _pieces(operator.size)

    @property
    def coupling(self) -> Tensor:
        """B [c, n], float64 on the CPU; looks."""
        self.look()
        return self._coupling

    @coupling.setter
    def coupling(self, coupling: Tensor) -> None:
        self._coupling = coupling

    def until_check(self, k: int, missing: int) -> int:
        # Lanczos takes more than two products for a pair: half of one is never too late by more
        # than a few, and looks become frequent only at the end.
        return max(super().until_check(k, missing), missing // 2)

    def inner(self, rows: Tensor, others: Tensor) -> Tensor:
        if self._pieces == 1:
            return rows @ others.T
        # One product of few rows would run on as few multiprocessors, each along all of P.
        a = rows.unflatten(1, (self._pieces, -1)).transpose(0, 1)
        b = others.unflatten(1, (self._pieces, -1)).permute(1, 2, 0)
        return torch.bmm(a, b).sum(0)

    def look(self) -> None:
        """Reads what the steps since the last look have recorded, if there were any.

        Raises:
            ValueError: the products held NaN or Inf, or their norms overflow.
        """
        self._read_posted()
        self._post()
        self._read_posted()

    def look_ahead(self) -> int:
        """Queues the next step behind the records of those before.

        The device works at it while the host waits for these and solves their small eigenproblem.
        """
        count = self.pending
        if not 0 < count <= min(self.room, self.operator.left):
            return 0
        self._post()
        self._before = self.size
        self.advance(list(range(count)))
        return count

    def _post(self) -> None:
        steps, self._steps = self._steps, []
        if steps:
            # No later step writes to these rows before they are read.
            records = self._outbox[steps[0].start : steps[-1].stop]
            self._posted = _Posted(steps, OnItsWay(records))

    def _read_posted(self) -> None:
        posted, self._posted = self._posted, None
        if posted is None:
            return
        records, first = posted.records.awaited(), posted.steps[0].start
        for step in posted.steps:
            self._replay(step, records[step.start - first : step.stop - first])

    def _replay(self, step: _Step, records: Tensor) -> None:
        start, stop = step.start, step.stop
        count, behind = stop - start, stop + step.rest
        norms = records[:, -1]
        used = records[:, : behind + step.added]
        new = used[: step.added, behind:].tril()
        if not bool(torch.isfinite(norms).all() and torch.isfinite(used[:, :behind]).all()):
            check_products(self._images[start:stop])
            raise ValueError(f"H: products with H overflow {self.operator.dtype}")
        columns = records[:, :stop].T
        self._rayleigh[:stop, start:stop] = columns
        self._rayleigh[start:stop, :stop] = columns.T
        corner = self._rayleigh[start:stop, start:stop]
        corner.copy_((corner + corner.T) / 2)
        self._ritz = None
        self.scale = max(self.scale, float(norms.max()))
        coupling = self._coupling.new_zeros(step.rest + step.added, stop)
        coupling[: step.rest, :start] = self._coupling[count:]
        coupling[: step.rest, start:stop] = used[:, stop:behind].T
        coupling[step.rest :, start : start + step.added] = new.T
        self._coupling = coupling
        self._outward[start:stop] = 0.0
        self._outward[start : start + step.added] = new.diagonal()

    # growing

    def push(self, rows: Tensor) -> int:
        self.look()
        norms = lengths(rows)
        good = torch.isfinite(norms) & (norms > 0)
        rows = torch.where(good[:, None], rows / norms[:, None].to(rows), 0.0)
        rows = rows[: len(self._basis) - self.size - self.pending]
        if not len(rows):
            return 0
        threshold = 100 * self._epsilon
        found = self._orthonormalize(
            self._outside(rows), torch.full_like(norms, threshold), torch.zeros_like(rows), None
        )
        outside: list[float] = on_the_host(torch.stack(found)).tolist()
        kept = [i for i, length in enumerate(outside) if length > threshold]
        first = self.size + self.pending
        if 0 < len(kept) < len(rows):
            self._basis[first : first + len(kept)] = self._taken(first, kept)
        self._add_pending(len(kept))
        return len(kept)

    def push_random(self, count: int, generator: torch.Generator) -> int:
        """Adds ``count`` random directions orthogonal to the span as pending.

        They are drawn on the device, from a seed that ``generator`` (on the CPU) gives.
        """
        self.look()
        count = min(count, len(self._basis) - self.size - self.pending)
        if count <= 0:
            return 0
        self._noise.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        rows = self._random(count)
        zeros = torch.zeros(count, dtype=rows.dtype, device=rows.device)
        self._orthonormalize(self._outside(rows), zeros, self._random(count), None)
        self._add_pending(count)
        return count

    def advance(self, chosen: list[int], krylov: bool = True) -> None:
        self._bring_forward(chosen)
        start, stop = self.size, self.size + len(chosen)
        self._images[start:stop] = self.operator.apply(self._basis[start:stop])
        images, span, records = self._images[start:stop], self._span(), self._outbox[start:stop]
        norms = lengths(images)
        records[:, -1] = norms
        coefficients = self.inner(images, span)
        records[:, : len(span)] = coefficients
        added = min(len(chosen), len(self._basis) - len(span)) if krylov else 0
        if added:
            rest = torch.addmm(images[:added], coefficients[:added], span, alpha=-1)
            threshold = 10 * self._epsilon * norms
            self._orthonormalize(rest, threshold, self._random(added), records)
        self.pending -= len(chosen)
        self._steps.append(_Step(start, stop, self.pending, added))
        self.size, self.pending = stop, self.pending + added

    def drop_pending(self) -> None:
        self.look()
        super().drop_pending()

    def _add_pending(self, count: int) -> None:
        self.pending += count
        self._coupling = torch.cat([self._coupling, self._coupling.new_zeros(count, self.size)])

    def _random(self, count: int) -> Tensor:
        options: dict[str, Any] = {"dtype": self.operator.dtype, "device": self.operator.device}
        return torch.randn(count, self.operator.size, generator=self._noise, **options)

    def _outside(self, rows: Tensor) -> Tensor:
        """One pass of Gram-Schmidt of ``rows`` [b, P] against the span."""
        span = self._span()
        return torch.addmm(rows, self.inner(rows, span), span, alpha=-1) if len(span) else rows

    def _orthonormalize(
        self, rows: Tensor, thresholds: Tensor, instead: Tensor, records: Tensor | None
    ) -> list[Tensor]:
        """Puts an orthonormal basis of ``rows`` behind the pending ones, one for each.

        Args:
            rows: [b, P], after one pass against the span.
            thresholds: [b or more] lengths up to which a row counts as inside the span.
            instead: [b, P], what then takes its place.
            records: [b or more, ...] to which the rows' coefficients are added, one for every
                vector of the basis; zero for what takes a row's place.

        Returns:
            of every row the length [] of what lay outside the span and the rows before it; zero
            where nothing did.
        """
        first = self.size + self.pending
        tiny = torch.finfo(rows.dtype).tiny
        found = []
        for i in range(len(rows)):
            known, place = self._basis[: first + i], self._basis[first + i : first + i + 1]
            row = rows[i : i + 1]
            if i:
                fresh = known[first:]
                along = self.inner(row, fresh)
                row = torch.addmm(row, along, fresh, alpha=-1)
            length = lengths(row)[0]
            inside = length <= thresholds[i]
            row = torch.where(inside, instead[i : i + 1], row / length)
            length = length.masked_fill(inside, 0.0)
            if len(known):
                again = self.inner(row, known)
                row = torch.addmm(row, again, known, alpha=-1)
            size = lengths(row)[0]
            torch.div(row, size.clamp_min(tiny), out=place)
            found.append(length * size)
            if records is not None:
                record = records[i : i + 1]
                if i:
                    record[:, first : first + i] = along
                record[:, : first + i].add_(again * length)
                record[0, first + i] = found[-1]
        return found

    # Rayleigh-Ritz

    def ritz(self) -> tuple[Tensor, Tensor]:
        size, self._before = self._before, None
        if size is None:
            self.look()
            return super().ritz()
        self._read_posted()
        return torch.linalg.eigh(self._rayleigh[:size, :size])

    def rayleigh_block(self, indices: list[int]) -> Tensor:
        self.look()
        return super().rayleigh_block(indices)

    def outward(self, indices: list[int]) -> Tensor:
        """The lengths of the new directions: their product is that of the singular values.

        Zero where a random direction took the place of one inside the span.
        """
        self.look()
        return self._outward[indices]

    def _recompute_rayleigh(self) -> None:
        super()._recompute_rayleigh()
        if not bool(torch.isfinite(self._rayleigh[: self.size, : self.size]).all()):
            check_products(self._images[: self.size])
            raise ValueError(f"H: products with H overflow {self.operator.dtype}")


def _pieces(size: int) -> int:
    """Into how many equal pieces inner products of vectors [size] are cut."""
    most = min(_MOST_PIECES, size // _SHORTEST_PIECE) if size >= _SHORTEST_CUT else 1
    return max(pieces for pieces in range(1, most + 1) if size % pieces == 0)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device)
