"""Block generalized Davidson: the basis grows by corrections computed from residuals.

Morgan and Scott, "Generalizations of Davidson's method for computing eigenvalues of sparse
symmetric matrices", SIAM Journal on Scientific and Statistical Computing 7 (1986), 817-825; the
projected correction is Olsen's (Chemical Physics Letters 169 (1990), 463-472).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hesskern.solvers.lanczos import Search, lanczos, restart
from hesskern.solvers.result import EigenResult
from hesskern.solvers.subspace import (
    CountedOperator,
    OutOfProducts,
    Subspace,
    SymmetricOperator,
    lengths,
    on_the_host,
)

__all__ = ["Correction", "Preconditioner", "davidson", "olsen", "seed_block", "seed_preconditioner"]

Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``correction(residuals [b, P], values [b], vectors [b, P])``: new directions [b, P]."""

_PATIENCE = 20


class Preconditioner(SymmetricOperator, Protocol):
    """An operator near H that knows its eigenpairs and solves shifted systems."""

    def eigsh(self, k: int, /) -> EigenResult: ...

    def solve_shifted(self, vectors: Tensor, shifts: Tensor, /) -> Tensor: ...


def olsen(preconditioner: Preconditioner) -> Correction:
    """t = -(K - θ I)^-1 (r - ε v) with ε such that t is orthogonal to v.

    Without the second term the correction of an exact preconditioner would be v itself.
    """

    def correct(residuals: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        count = len(values)
        both = torch.cat([residuals, vectors]).T
        solved = preconditioner.solve_shifted(both, torch.cat([values, values])).T
        t, u = solved[:count], solved[count:]
        inner = (u * vectors).sum(dim=1)
        # A shift on one of K's eigenvalues makes both terms large and the quotient still fine;
        # only v orthogonal to (K - θ I)^-1 v leaves nothing to project with.
        safe = inner.abs() > 1e-3 * lengths(u)
        epsilon = torch.where(safe, (t * vectors).sum(dim=1) / torch.where(safe, inner, 1.0), 0.0)
        return epsilon[:, None] * u - t

    return correct


def davidson(space: Subspace, search: Search, block: int, correct: Correction | None) -> bool:
    """Expands ``space`` by corrections of the leading pairs that have not converged.

    Pairs that have converged stay in the basis and get no more corrections.

    Args:
        space: holds at least one vector, and its pending directions are dropped.
        search: what is searched.
        block: how many corrections at a time.
        correct: None for the residuals themselves.

    Returns:
        True when all residuals, computed from vectors, are within the tolerance; False when
        rounding keeps them from it.

    Raises:
        OutOfProducts: at the limit of products; ``space`` holds what was found.
    """
    settled, reference = 0, torch.zeros(0, dtype=torch.float64)
    best, stalled = math.inf, 0
    epsilon = torch.finfo(space.operator.dtype).eps
    space.drop_pending()
    while True:
        if space.room < block:
            restart(space, search)
            space.drop_pending()
        values, coefficients = search.ritz(space)
        bound = search.tol * space.scale
        wanted = min(search.k, space.size)
        moved = (values[:settled] - reference[:settled]).abs() > bound
        before = settled
        settled = int(moved.nonzero()[0]) if bool(moved.any()) else settled
        settled, targets, residuals, first_norm = _open_pairs(
            space, values, coefficients, settled, wanted, block, bound
        )
        reference = values[:wanted].clone()
        search.report(settled)
        if not targets:
            if wanted == search.k:
                return True
            if not space.push_random(1, search.generator):
                return True
        else:
            worst = first_norm / max(space.scale, 1e-300)
            progress = settled > before or worst < 0.7 * best
            best = worst if progress else best
            stalled = 0 if progress else stalled + 1
            if stalled >= _PATIENCE:
                if worst < 1e4 * epsilon:
                    return False
                correct, stalled = None, 0
            added = 0
            if correct is not None:
                theta = values[targets].to(residuals)
                vectors = space.combine(coefficients[:, targets])
                added = space.push(correct(residuals, theta, vectors))
            if not added and not space.push(residuals):
                return False
        space.advance(list(range(min(space.pending, max(1, space.operator.left)))), krylov=False)
        space.drop_pending()


def _open_pairs(
    space: Subspace,
    values: Tensor,
    coefficients: Tensor,
    settled: int,
    wanted: int,
    block: int,
    bound: float,
) -> tuple[int, list[int], Tensor, float]:
    """The first ``block`` pairs from ``settled`` on with residuals above ``bound``.

    Returns:
        How many leading pairs are settled now, the positions of the open ones, their residuals, and
        the first one's norm.
    """
    targets: list[int] = []
    rows: list[Tensor] = []
    first_norm = 0.0
    for start in range(settled, wanted, block):
        part = slice(start, min(start + block, wanted))
        residuals = space.residuals(values[part], coefficients[:, part])
        norms = on_the_host(lengths(residuals))
        for position, norm in enumerate(norms.tolist(), start):
            if norm > bound and len(targets) < block:
                first_norm = first_norm or norm
                targets.append(position)
                rows.append(residuals[position - start])
        if len(targets) == block:
            break
    settled = targets[0] if targets else wanted
    return settled, targets, torch.stack(rows) if rows else values.new_zeros(0, 0), first_norm


def seed_block(space: Subspace, rows: Tensor) -> None:
    """Puts the span of ``rows`` [s, P] into the basis, at one product per dimension."""
    step = 8
    for start in range(0, len(rows), step):
        if space.push(rows[start : start + step]):
            space.advance(list(range(space.pending)), krylov=False)
    space.drop_pending()


def seed_preconditioner(space: Subspace, search: Search, preconditioner: Preconditioner) -> bool:
    """Starts from K's leading eigenvectors and tells whether Davidson's method will pay.

    One product with a signed sum of them measures how near K is to H, and so what residuals the
    seeds will have. Davidson's method takes a product per seed, and then one for every factor
    exp(3.2) off a residual (as measured on interpolations between layer Hessians and their
    Kronecker forms, where it holds up to differences of a third). A Lanczos run with K itself,
    without any product with H, tells whether Lanczos would get by with fewer: it needs little more
    than two products per pair whatever it starts from. If so, the sum is its start vector and
    nothing is lost.

    Returns:
        True with all k seeds in the basis; False with the sum alone, ready for Lanczos steps.
    """
    k = search.k
    pairs = preconditioner.eigsh(k)
    kappa = on_the_host(pairs.values.double())
    largest = float(kappa.abs().max())
    if largest == 0.0:
        return False
    weights = kappa.abs().clamp(min=1e-6 * largest).reciprocal()
    weights *= torch.randint(0, 2, (k,), generator=search.generator).double() * 2 - 1
    rows = pairs.vectors.T
    mixed = weights.to(rows) @ rows
    if not space.push(mixed[None]):
        return False
    space.advance([0])
    image = space.images(torch.ones(1, 1))[0] * lengths(mixed)
    apart = on_the_host(lengths(image - (weights * kappa).to(rows) @ rows))
    difference = float(apart) / math.sqrt(k)
    # NaN is none: the next look says so.
    if not difference <= 1 / 3:
        return False
    factors = (difference * kappa.abs() / largest / search.tol).clamp(min=1.0).log()
    cost = k + max(int((factors > 0).sum()), math.ceil(float(factors.sum()) / 3.2))
    if _lanczos_takes_fewer(preconditioner, cost, space, search):
        return False
    seed_block(space, rows)
    return True


def _lanczos_takes_fewer(
    preconditioner: Preconditioner, cost: int, space: Subspace, search: Search
) -> bool:
    rehearsal = type(space)(CountedOperator(preconditioner, cost - 1), space.capacity, 1)
    generator = torch.Generator().manual_seed(0)
    alone = replace(search, generator=generator, report=lambda _: None, agree=lambda _: None)
    try:
        lanczos(rehearsal, alone)
    except OutOfProducts:
        return False
    return True
