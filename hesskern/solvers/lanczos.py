"""Thick-restart Lanczos with full reorthogonalization, and the search for eigenvectors it missed.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM Journal
on Matrix Analysis and Applications 22 (2000), 602-616.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesskern.choices import Which
from hesskern.solvers.subspace import Subspace

__all__ = ["Search", "confirm", "lanczos", "restart"]

_LONGEST_CHAIN = 20


@dataclass
class Search:
    """What is searched, and how close is close enough.

    Attributes:
        k: number of pairs.
        which: "LA", "SA" or "LM".
        tol: bound on ‖H v - θ v‖ / |λ_1|; raised where rounding makes it unreachable.
        generator: of the random directions, on the CPU.
        report: called with the number of leading pairs that have converged.
        block: random directions that a run begins with.
        agree: called at every restart; raises where ranks that run the same search are apart.
    """

    k: int
    which: Which
    tol: float
    generator: torch.Generator
    report: Callable[[int], None]
    block: int = 1
    agree: Callable[[Subspace], None] = lambda _: None

    def key(self, values: Tensor) -> Tensor:
        """Larger is more wanted."""
        if self.which == "LM":
            return values.abs()
        return values if self.which == "LA" else -values

    def ritz(self, space: Subspace) -> tuple[Tensor, Tensor]:
        """Ritz values [n] and coefficients [n, n], the most wanted first."""
        values, coefficients = space.ritz()
        order = self.key(values).argsort(descending=True, stable=True)
        space.scale = max(space.scale, float(values.abs().max()))
        return values[order], coefficients[:, order]

    def wanted(self, space: Subspace) -> tuple[Tensor, Tensor]:
        """The k most wanted Ritz values and their coefficients [n, k]."""
        values, coefficients = self.ritz(space)
        return values[: self.k], coefficients[:, : self.k]

    def count_converged(self, residuals: Tensor, scale: float) -> int:
        """How many leading ``residuals`` [j] (absolute) are within the tolerance."""
        open_pairs = (residuals > self.tol * scale).nonzero()
        return int(open_pairs[0]) if len(open_pairs) else len(residuals)


def lanczos(space: Subspace, search: Search) -> bool:
    """Expands ``space`` by Lanczos steps until the wanted pairs have converged.

    Goes on from the pending directions of ``space`` (a random one if there is none), by the
    recurrence's own residual estimate. Several pending directions make it a block Lanczos whose
    blocks hold only what the wanted pairs still need; all of them where the next step was begun
    before they were known.

    Returns:
        False when the basis cannot grow: it spans R^P, and the pairs are exact. True when the
        estimates are within the tolerance, or the recurrence had to be given up for rounding.

    Raises:
        OutOfProducts: at the limit of products; ``space`` holds what was found.
    """
    k = search.k
    interval = since_check = space.until_check(k, k)
    while True:
        if space.size >= k and since_check >= interval:
            since_check = space.look_ahead()
            _, coefficients = search.ritz(space)
            coupled = space.coupled(coefficients[:, :k])
            converged = search.count_converged(coupled.norm(dim=0), space.scale)
            interval = space.until_check(k, k - converged)
            search.report(converged)
            if converged == k:
                return True
            if space.pending > 1 and not since_check:
                _focus(space, coupled, search.tol)
        if space.pending == 0:
            count = search.block if space.size == 0 else 1
            if not space.push_random(count, search.generator):
                return False
        if space.room < space.pending and not restart(space, search):
            return True
        # At the limit the product that is one too many raises.
        count = max(1, min(space.pending, space.operator.left))
        space.advance(list(range(count)))
        since_check += count


def restart(space: Subspace, search: Search) -> bool:
    """Shrinks the basis to the wanted Ritz vectors and a part of those behind them.

    Every tenth time the basis is orthonormalized again and one product with a random combination
    measures how far the images have drifted; they are recomputed when that matters.

    Returns:
        False if the images were recomputed (and the pending directions forgotten).
    """
    search.agree(space)
    values, coefficients = search.ritz(space)
    kept = min(search.k + max(1, 2 * (space.capacity - search.k) // 5), space.size)
    kept = max(search.k, min(kept, space.capacity - max(8, space.pending)))
    space.restart(values[:kept], coefficients[:, :kept])
    if space.restarts % 10:
        return True
    space.orthonormalize()
    if space.drift(search.generator) <= 0.1 * search.tol:
        return True
    space.refresh()
    return False


def _focus(space: Subspace, coupled: Tensor, tol: float) -> None:
    """Turns the pending directions so that the leading ones carry the residuals ``coupled`` [c, k].

    Directions that add less than a hundredth of the tolerance to any wanted pair are forgotten.
    """
    left, sizes, _ = torch.linalg.svd(coupled, full_matrices=False)
    needed = max(1, int((sizes > 0.01 * tol * space.scale).sum()))
    if needed < space.pending:
        space.rotate_pending(left[:, :needed].T)


def confirm(space: Subspace, search: Search, block: int) -> bool:
    """Looks for eigenvectors orthogonal to all that was found, from ``block`` random directions.

    A Krylov space of one vector holds one vector of every eigenspace, so copies of a repeated
    eigenvalue are missed, and so is whatever a start vector has no component in. A Lanczos chain
    outside the basis tells. Its j-th vector is p_j(H) z with z the random direction, p_j(λ) =
    Π (λ - μ_i) / Π β_i, the μ_i being the chain's Ritz values and the β_i its off-diagonal entries.
    An eigenvector with eigenvalue λ has a component of at most 1 in it, hence of at most 1 / p_j(λ)
    in z. When that is a tenth of the 1 / sqrt(P) to be expected at the last wanted value (and less
    beyond it), nothing is missing. For a block the determinants give the geometric mean.

    Args:
        space: its basis grows by the chain, whose rest replaces the pending directions.
        search: what is searched.
        block: number of random directions.

    Returns:
        True when nothing is missing; False when something was found, or the basis is full.
    """
    threshold = float(search.key(search.wanted(space)[0])[-1])
    margin = 0.1 * search.tol * space.scale
    # What is missing may lie in the pending directions as well, to which a chain beside them would
    # be orthogonal.
    space.drop_pending()
    count = space.push_random(block, search.generator)
    enough = count * math.log(10 * math.sqrt(space.operator.size))
    chain: list[int] = []
    log_beta = 0.0
    steps = 0
    while steps < _LONGEST_CHAIN:
        made = _extend(space, _LONGEST_CHAIN - steps)
        if not made:
            return space.pending == 0
        steps += len(made)
        for fresh in made:
            chain += fresh
            ritz = torch.linalg.eigvalsh(space.rayleigh_block(chain))
            if float(search.key(ritz).max()) > threshold + margin:
                return False
            beta = space.outward(fresh)
            if bool((beta == 0).any() and (beta > 0).any()):
                # A part of the block has ended, which one direction at a time can tell from.
                return False
            log_beta += float(beta.log().sum())
            # Where "SA" is wanted the key turns the axis; for "LM" both ends of it count.
            points = [threshold + margin] + [-threshold - margin] * (search.which == "LM")
            axis = ritz if search.which == "LM" else search.key(ritz)
            log_p = min(float((point - axis).abs().log().sum()) for point in points) - log_beta
            if log_p >= enough:
                return True
    return True


def _extend(space: Subspace, most: int) -> list[list[int]]:
    """Advances all pending directions up to ``most`` times: what :attr:`chain_steps` allows.

    Returns:
        The positions of every step in the basis; none where nothing is pending or there is no room.
    """
    steps: list[list[int]] = []
    while len(steps) < min(space.chain_steps, most) and 0 < space.pending <= space.room:
        if steps and space.operator.left < space.pending:
            # What was made may suffice; the product that is one too many would end it all.
            break
        steps.append(list(range(space.size, space.size + space.pending)))
        space.advance(list(range(space.pending)))
    return steps
