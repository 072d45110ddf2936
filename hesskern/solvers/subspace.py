"""A growing orthonormal basis with its images under a symmetric operator, and Rayleigh-Ritz on it.

Vectors are stored as rows, so that a block of them is contiguous and every projection is one matrix
product. The images ``H q`` are kept beside the basis: residuals are then computed from vectors,
not inferred from a recurrence.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hesskern.devices import on_host

__all__ = [
    "CountedOperator",
    "OnItsWay",
    "OutOfProducts",
    "Subspace",
    "SymmetricOperator",
    "check_products",
    "lengths",
    "on_the_host",
]

_COLUMNS_AT_ONCE = 1 << 15


class SymmetricOperator(Protocol):
    """What an eigensolver asks of an operator: shape, dtype, device and products."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


class OutOfProducts(Exception):
    """The next product would exceed ``max_matvecs``."""


def on_the_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU: on a device the only place where the host waits for a search."""
    return tensor.cpu()


class OnItsWay:
    """A tensor being copied to the CPU beside what the device is given to do next.

    Args:
        tensor: whose values nobody changes before :meth:`awaited` has returned.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # To pinned memory, which torch takes where a copy does not wait.
            self._tensor = tensor.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def awaited(self) -> Tensor:
        """The tensor on the CPU; on CUDA the host waits for what was queued before it alone."""
        if self._arrived is None:
            return on_the_host(self._tensor)
        self._arrived.synchronize()
        return self._tensor


def lengths(rows: Tensor) -> Tensor:
    """Norms [...] of vectors [..., P], float64: in float32 small numbers have no squares."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)


def check_products(products: Tensor) -> None:
    """Raises ValueError if products with the operator hold NaN or Inf; on a device it waits."""
    if not bool(on_the_host(torch.isfinite(products).all())):
        raise ValueError("H: H @ v must be finite, got NaN or Inf")


class CountedOperator:
    """Products with an operator, counted by single vectors, checked, and bounded in number.

    NaN and Inf are looked for on the CPU alone: on a device whoever looks at what came of the
    products has to tell.

    Args:
        operator: symmetric, shape (P, P).
        limit: the largest number of products.
    """

    def __init__(self, operator: SymmetricOperator, limit: int) -> None:
        self._operator = operator
        self.size = int(operator.shape[0])
        self.dtype = operator.dtype
        self.device = torch.device(operator.device)
        self.limit = limit
        self.count = 0

    @property
    def left(self) -> int:
        """How many products may still be made."""
        return self.limit - self.count

    def apply(self, rows: Tensor) -> Tensor:
        """Products with the vectors in ``rows`` [b, P]; returns [b, P].

        Raises:
            OutOfProducts: fewer than b products are left.
            ValueError: the operator returned another shape or dtype, or, on the CPU, NaN or Inf.
        """
        count = len(rows)
        if count > self.left:
            raise OutOfProducts
        self.count += count
        if count == 1:
            image = self._operator @ rows[0]
            expected: tuple[int, ...] = (self.size,)
        else:
            image = self._operator @ rows.T
            expected = (self.size, count)
        if tuple(image.shape) != expected or image.dtype != self.dtype:
            raise ValueError(
                f"H: H @ v must give {list(expected)} of {self.dtype}, "
                f"got {list(image.shape)} of {image.dtype}"
            )
        image = image.detach()
        if on_host(image):
            check_products(image)
        return image[None] if count == 1 else image.T


class Subspace:
    """Orthonormal basis Q [n, P], images Q H [n, P], and pending directions W [c, P].

    In the Krylov case ``H Q^T = Q^T T + W^T B`` with the Rayleigh matrix T [n, n] and the coupling
    B [c, n]: the pending directions span what the images have outside the basis, so the residual
    norm of a Ritz pair (θ, Q^T y) is ‖B y‖. T and B are float64 on the CPU.

    This is the form for the CPU, where a look at a value costs nothing and every step decides by
    what it finds; :class:`hesskern.solvers.device_subspace.DeviceSubspace` is the other.

    Args:
        operator: the counted operator, on R^P.
        capacity: the largest n.
        pending: the largest c.
    """

    chain_steps = 1
    """Steps of a chain (see :func:`hesskern.solvers.lanczos.confirm`) between two looks at it."""

    def __init__(self, operator: CountedOperator, capacity: int, pending: int) -> None:
        self.operator = operator
        self.capacity = min(capacity, operator.size)
        rows = min(capacity + pending, operator.size)
        options: dict[str, Any] = {"dtype": operator.dtype, "device": operator.device}
        self._basis = torch.empty(rows, operator.size, **options)
        self._images = torch.empty(self.capacity, operator.size, **options)
        self._rayleigh = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)
        self.size = 0
        self.pending = 0
        self.scale = 0.0
        self.restarts = 0
        # Of the Rayleigh matrix as it is; None when that has changed.
        self._ritz: tuple[Tensor, Tensor] | None = None
        self._epsilon = torch.finfo(operator.dtype).eps

    @property
    def room(self) -> int:
        """How many vectors the basis can still take."""
        return self.capacity - self.size

    @property
    def coupling(self) -> Tensor:
        """B [c, n], float64 on the CPU."""
        return self._coupling

    @coupling.setter
    def coupling(self, coupling: Tensor) -> None:
        self._coupling = coupling

    def look_ahead(self) -> int:
        """Before a look, begins what the host need not know its outcome for.

        :meth:`ritz` and :meth:`coupled`, called at once, then speak of the basis before it.

        Returns:
            How many pending directions, all or none, were moved into the basis.
        """
        return 0

    def until_check(self, k: int, missing: int) -> int:
        """How many products Lanczos makes before it looks whether the pairs have converged.

        Args:
            k: number of pairs.
            missing: how many of them had not converged at the last look.
        """
        return max(1, k // 40)

    def inner(self, rows: Tensor, others: Tensor) -> Tensor:
        """The inner products [b, n] of ``rows`` [b, P] and ``others`` [n, P]."""
        return rows @ others.T

    # growing

    def push(self, rows: Tensor) -> int:
        """Adds the parts of ``rows`` [b, P] outside the span as pending, with zero coupling.

        Returns:
            How many were added; rows that lie in the span up to rounding are left out.
        """
        norms = lengths(rows)
        good = torch.isfinite(norms) & (norms > 0)
        rows = rows[good] / norms[good, None].to(rows)
        self._project(rows)
        return self._admit(rows, 100 * self._epsilon, None)

    def push_random(self, count: int, generator: torch.Generator) -> int:
        """Adds ``count`` random directions orthogonal to the span as pending."""
        draw = torch.randn(count, self.operator.size, generator=generator, dtype=torch.float64)
        return self.push(draw.to(self.operator.dtype).to(self.operator.device))

    def advance(self, chosen: list[int], krylov: bool = True) -> None:
        """Moves pending directions into the basis, at one product each.

        Args:
            chosen: their positions among the pending directions.
            krylov: the parts of their images outside the span become pending.
        """
        self._bring_forward(chosen)
        start, count = self.size, len(chosen)
        stop = start + count
        images = self.operator.apply(self._basis[start:stop])
        self._images[start:stop] = images
        self.scale = max(self.scale, float(lengths(images).max()))
        self.size, self.pending = stop, self.pending - count
        known, rest = self.coupling[:count], self.coupling[count:]
        self.coupling = torch.cat([rest, rest.new_zeros(self.pending, count)], dim=1)
        if krylov:
            remainder = self._images[start:stop].clone()
            coefficients = self._recur(remainder, known)
        else:
            coefficients = _small(images @ self._span().T)
        columns = coefficients[:, :stop].T
        self._rayleigh[:stop, start:stop] = columns
        self._rayleigh[start:stop, :stop] = columns.T
        corner = self._rayleigh[start:stop, start:stop]
        corner.copy_((corner + corner.T) / 2)
        self._ritz = None
        self.coupling[:, start:stop] = coefficients[:, stop:].T
        if krylov:
            self._admit(remainder, 10 * self._epsilon * self.scale, slice(start, stop))

    def drop_pending(self) -> None:
        """Forgets the pending directions."""
        self.pending = 0
        self.coupling = self.coupling.new_zeros(0, self.size)

    def rotate_pending(self, rotation: Tensor) -> None:
        """Replaces the pending directions by the combinations ``rotation`` [c', c] of them."""
        stop = self.size + self.pending
        rows = self._cast(rotation) @ self._basis[self.size : stop]
        self.pending = len(rotation)
        self._basis[self.size : self.size + self.pending] = rows
        self.coupling = rotation @ self.coupling

    def _span(self) -> Tensor:
        return self._basis[: self.size + self.pending]

    def _cast(self, small: Tensor) -> Tensor:
        # Pageable memory is read before the call returns, also where the copy does not wait.
        return small.to(self.operator.dtype).to(self.operator.device, non_blocking=True)

    def _recur(self, images: Tensor, known: Tensor) -> Tensor:
        """Projects the images [b, P] of the last b basis vectors off the span, in place.

        By symmetry their coefficients on the older vectors are ``known`` [b, n - b], few of them
        not zero: subtracting these first leaves no cancellation to the full pass.
        """
        new = self._basis[self.size - len(images) : self.size]
        total = torch.zeros(len(images), self.size + self.pending, dtype=torch.float64)
        touched = known.abs().sum(dim=0).nonzero()
        if len(touched):
            first = int(touched[0])
            older = self._basis[first : self.size - len(images)]
            images.addmm_(self._cast(known[:, first:]), older, alpha=-1)
            total[:, : known.shape[1]] = known
        diagonal = images @ new.T
        images.addmm_(diagonal, new, alpha=-1)
        total[:, known.shape[1] : self.size] = _small(diagonal)
        return total + self._project(images)

    def _project(self, rows: Tensor) -> Tensor:
        """Classical Gram-Schmidt against the span, in place; coefficients [b, n + c].

        Repeated where it more than halves a norm: cancellation magnifies what rounding left.
        """
        span = self._span()
        total = torch.zeros(len(rows), len(span), dtype=torch.float64)
        before = lengths(rows)
        for _ in range(3 if len(span) else 0):
            coefficients = rows @ span.T
            rows.addmm_(coefficients, span, alpha=-1)
            total += _small(coefficients)
            after = lengths(rows)
            if bool((after > before / 2).all()):
                break
            before = after
        return total

    def _admit(self, rows: Tensor, threshold: float, columns: slice | None) -> int:
        """Orthonormalizes projected ``rows`` into the pending ones; records the coupling."""
        first = self.pending
        for position, row in enumerate(rows):
            size = float(lengths(row))
            if size <= threshold or self.size + self.pending >= len(self._basis):
                continue
            recorded = torch.zeros(self.pending - first, dtype=torch.float64)
            start = self.size + first
            while True:
                # Against the new rows alone at first; against the whole span where cancellation
                # has magnified what rounding left in its directions.
                span = self._basis[start : self.size + self.pending]
                if len(span):
                    coefficients = span @ row
                    row = row - coefficients @ span
                    recorded += _small(coefficients)[len(span) - len(recorded) :]
                before, size = size, float(lengths(row))
                if size <= threshold or size > before / 2:
                    break
                start = 0
            if columns is not None:
                self.coupling[first:, columns.start + position] = recorded
            if size <= threshold:
                continue
            self._basis[self.size + self.pending] = row / size
            self.pending += 1
            self.coupling = torch.cat([self.coupling, self.coupling.new_zeros(1, self.size)])
            if columns is not None:
                self.coupling[-1, columns.start + position] = size
        return self.pending - first

    def _bring_forward(self, chosen: list[int]) -> None:
        others = [i for i in range(self.pending) if i not in set(chosen)]
        order = [*chosen, *others]
        if order == list(range(self.pending)):
            return
        stop = self.size + self.pending
        self._basis[self.size : stop] = self._taken(self.size, order)
        self.coupling = self.coupling[order]

    def _taken(self, first: int, order: list[int]) -> Tensor:
        """Copies [b, P] of the rows at ``first`` plus each of ``order``, basis and pending ones."""
        rows = torch.tensor(order).add_(first)
        return self._basis.index_select(0, rows.to(self._basis.device, non_blocking=True))

    # Rayleigh-Ritz

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values [n], ascending, and coefficients [n, n] of the Ritz vectors; float64, CPU."""
        if self._ritz is None:
            self._ritz = torch.linalg.eigh(self._rayleigh[: self.size, : self.size])
        return self._ritz

    def coupled(self, coefficients: Tensor) -> Tensor:
        """What the images of Ritz vectors have outside the basis, by pending directions.

        Args:
            coefficients: [n, k] of the last :meth:`ritz`.

        Returns:
            B Y [c, k], float64 on the CPU.
        """
        return self._coupling @ coefficients

    def rayleigh_block(self, indices: list[int]) -> Tensor:
        """The Rayleigh matrix restricted to the basis vectors ``indices``; float64 on the CPU."""
        return self._rayleigh[indices][:, indices]

    def outward(self, indices: list[int]) -> Tensor:
        """Numbers whose product is the volume of what the images of ``indices`` have outside.

        Args:
            indices: the basis vectors of one :meth:`advance`, at the time of the last look.
        """
        return torch.linalg.svdvals(self.coupling[:, indices])

    def combine(self, coefficients: Tensor) -> Tensor:
        """The vectors [k, P] with ``coefficients`` [n, k] in the basis."""
        return self._cast(coefficients).T @ self._basis[: self.size]

    def images(self, coefficients: Tensor) -> Tensor:
        """The images H v [k, P] of :meth:`combine`'s vectors."""
        return self._cast(coefficients).T @ self._images[: self.size]

    def residuals(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """``H v - θ v`` as rows [k, P] for Ritz ``values`` [k] and ``coefficients`` [n, k]."""
        y = self._cast(coefficients)
        theta = self._cast(values)
        return y.T @ self._images[: self.size] - (y * theta).T @ self._basis[: self.size]

    def residual_norms(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Norms [k] of :meth:`residuals` without holding them; float64 on the CPU."""
        y = self._cast(coefficients)
        shifted = y * self._cast(values)
        total = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
        for part in self._column_slices():
            block = y.T @ self._images[: self.size, part]
            block.addmm_(shifted.T, self._basis[: self.size, part], alpha=-1)
            total += lengths(block).square()
        return on_the_host(total.sqrt())

    def restart(self, values: Tensor, coefficients: Tensor) -> None:
        """Shrinks the basis to the Ritz vectors with ``coefficients`` [n, r] and ``values`` [r]."""
        y = self._cast(coefficients).T.contiguous()
        size, kept = self.size, len(values)
        for part in self._column_slices():
            self._basis[:kept, part] = y @ self._basis[:size, part]
            self._images[:kept, part] = y @ self._images[:size, part]
        self._basis[kept : kept + self.pending] = self._basis[size : size + self.pending].clone()
        self.size = kept
        self._rayleigh.zero_()
        self._rayleigh[:kept, :kept] = torch.diag(values)
        self._ritz = None
        self.coupling = self.coupling @ coefficients
        self.restarts += 1

    def orthonormalize(self) -> None:
        """Removes what rounding has cost of the basis' orthonormality; the images follow."""
        q, images = self._basis[: self.size], self._images[: self.size]
        factor = torch.linalg.cholesky(_small(self.inner(q, q)))
        inverse = torch.linalg.inv(factor)
        small = self._cast(inverse)
        for part in self._column_slices():
            q[:, part] = small @ q[:, part]
            images[:, part] = small @ images[:, part]
        self.coupling = self.coupling @ inverse.T
        self._recompute_rayleigh()

    def refresh(self) -> None:
        """Recomputes all images, at one product each, and forgets the pending directions."""
        self.drop_pending()
        step = 16
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            self._images[start:stop] = self.operator.apply(self._basis[start:stop])
        self._recompute_rayleigh()

    def _recompute_rayleigh(self) -> None:
        rayleigh = _small(self.inner(self._basis[: self.size], self._images[: self.size]))
        self._rayleigh[: self.size, : self.size] = (rayleigh + rayleigh.T) / 2
        self._ritz = None

    def drift(self, generator: torch.Generator) -> float:
        """How far the stored images are off, relative to the scale, by one random combination.

        Costs one product. Returns the error of the image of a random unit combination, times the
        square root of n (an estimate of the error's Frobenius norm).
        """
        weights = torch.randn(self.size, generator=generator, dtype=torch.float64)
        mix = self._cast(weights / weights.norm())[None]
        true = self.operator.apply(mix @ self._basis[: self.size])
        stored = mix @ self._images[: self.size]
        error = float(on_the_host(lengths(true - stored)))
        return error * self.size**0.5 / max(self.scale, 1e-300)

    def _column_slices(self) -> list[slice]:
        total = self.operator.size
        return [
            slice(start, min(start + _COLUMNS_AT_ONCE, total))
            for start in range(0, total, _COLUMNS_AT_ONCE)
        ]


def _small(matrix: Tensor) -> Tensor:
    return on_the_host(matrix.double())
