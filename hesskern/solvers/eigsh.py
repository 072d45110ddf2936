"""Eigenpairs of symmetric operators that are known by their products with vectors."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from hesskern.choices import Which, check_choice
from hesskern.parallel.ranks import Ranks, section_of
from hesskern.progress import Progress, reporter
from hesskern.solvers.alike import agree_alike, ranks_of
from hesskern.solvers.davidson import davidson, olsen, seed_block, seed_preconditioner
from hesskern.solvers.device_subspace import block_for, subspace_for
from hesskern.solvers.gram import gram_eigenpairs
from hesskern.solvers.lanczos import Search, confirm, lanczos, restart
from hesskern.solvers.result import EigenResult
from hesskern.solvers.subspace import (
    CountedOperator,
    OutOfProducts,
    Subspace,
    SymmetricOperator,
    check_products,
    on_the_host,
)

__all__ = ["eigsh"]

_SMALL = 128
_PENDING = 16
_CHAIN_ROOM = 20


def eigsh(
    H: SymmetricOperator | Tensor,
    k: int,
    which: Which = "LA",
    tol: float = 1e-4,
    start: Any = None,
    seed: int = 0,
    max_matvecs: int | None = None,
    progress: bool | Progress = False,
    block: int | None = None,
    group: Any = None,
) -> EigenResult:
    """The ``k`` most wanted eigenpairs of a symmetric operator.

    Thick-restart Lanczos with full reorthogonalization; on a device the host waits for
    it only where it looks whether pairs have converged, with the next step queued (at the price of
    a step too many in the end, within ``max_matvecs``). Repeated eigenvalues are found
    with their multiplicity: when all residuals are small the search goes on from a random vector
    orthogonal to everything found, until it can tell that nothing is missing. Operators that are
    hardly larger than the basis this takes (and all with P <= 128) are formed and solved densely;
    those that are R^T R with no more rows than the basis holds vectors are solved by R R^T.

    Args:
        H: [P, P], float32 or float64: a symmetric tensor, or anything with ``shape``, ``dtype``,
            ``device`` and ``H @ v`` for ``v`` [P] and [P, b]; ``to_dense()`` is used if it is there
            and P is small, and so is ``few_rows(limit)``, R [q <= limit, P] with H = R^T R or None.
        k: number of pairs, 1 <= k <= P.
        which: "LA" the largest eigenvalues, "SA" the smallest, "LM" the largest in absolute value.
        tol: bound on every residual ‖H v - λ v‖ / |λ_1| (see :class:`EigenResult`). Below about
            1e-6 in float32 rounding is in the way: the search ends with a warning.
        start: None; or [P, s], vectors near the wanted ones; or an operator near H that has
            ``eigsh(k)`` and ``solve_shifted(R [P, b], shifts [b])``, such as a
            :class:`KroneckerOperator`. The latter's leading eigenvectors seed a generalized
            Davidson iteration preconditioned by it when one product says that this is cheaper,
            and a Lanczos run otherwise. It fits "LA" and "LM".
        seed: of the random vectors; equal seeds give equal results.
        max_matvecs: largest number of single-vector products, at least k; None: 1000 + 10 P.
        progress: True for a bar on stderr, or a callback ``("eigsh", converged pairs, k)``.
        block: random directions that Lanczos begins with, at most 16, and so vectors in a product:
            fewer products with more vectors in all. None: 1 on the CPU, k // 5 but at most 4 on a
            device. The pairs and their residuals are the same, up to ``tol``.
        group: ranks of torch.distributed that all call this with the same arguments. They run the
            same search on the same products, compare at every restart and at the end where they
            are, and get the same bits. None: those that hold H's samples, if it was made with a
            ``group``; another one is only needed for operators of one's own.

    Returns:
        :class:`EigenResult`; ``matvecs`` counts single vectors (a block of b counts b, a dense
        solution P).

    Raises:
        ValueError: an argument is out of range, ``start`` does not fit, or ``H @ v`` gave NaN,
            Inf, or another shape or dtype.
        RankError: with a group, ranks have other arguments or come to other bits, or another rank
            has failed.

    Warns:
        RuntimeWarning: not converged; names the worst residual.
    """
    ranks = ranks_of(group, H)
    with section_of(ranks, "eigsh"):
        operator = _checked(H, k, which, tol, max_matvecs)
        start = _checked_start(start, which, operator)
        if block is None:
            block = block_for(operator, k)
        elif isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= _PENDING:
            raise ValueError(
                f"block must be an integer with 1 <= block <= {_PENDING}, got {block!r}"
            )
        report = reporter(progress)
        if ranks is not None:
            report = ranks.watching("eigsh", report)
            _agree_on_arguments(ranks, operator, start, (k, which, tol, seed, block))

        def agree(space: Subspace) -> None:
            if ranks is not None:
                where = f"eigsh at restart {space.restarts + 1}"
                agree_alike(ranks, where, {"products": operator.count}, values=space.ritz()[0])

        size = operator.size
        # Of the basis, and of the rows that may take its place.
        capacity = k + max(60, k // 2)
        small = size <= max(_SMALL, 2 * k + 40) and size <= operator.limit
        rows = None
        if not small and which != "SA" and hasattr(H, "few_rows"):
            rows = H.few_rows(min(capacity, operator.limit))
        if small:
            values, vectors, residuals, scale = _dense(H, operator, k, which)
        elif rows is not None:
            values, vectors, residuals, scale = _by_gram(rows, operator, k, seed)
        else:
            search = Search(
                k,
                which,
                float(tol),
                torch.Generator().manual_seed(seed),
                lambda done: report("eigsh", done, k),
                block,
                agree,
            )
            space = subspace_for(operator, capacity, _PENDING)
            values, vectors, residuals, scale = _iterate(space, search, start)
        met = int((residuals <= tol).sum())
        converged = met == k
        report("eigsh", met, k)
        if not converged:
            why = (
                f"at the limit of {operator.limit} products"
                if operator.left == 0
                else f"at the rounding of {operator.dtype}"
            )
            warnings.warn(
                f"eigsh stopped {why}: the worst residual is {float(residuals.max()):.2g}, "
                f"above tol={tol:g}",
                RuntimeWarning,
                stacklevel=2,
            )
        residuals = residuals + _left_out(H, scale)
        if ranks is not None:
            found = {"values": values, "vectors": vectors, "residuals": residuals}
            agree_alike(ranks, "eigsh", {"products": operator.count}, **found)
        return EigenResult(
            values.to(vectors), vectors, residuals.to(vectors), converged, operator.count
        )


def _agree_on_arguments(
    ranks: Ranks, operator: CountedOperator, start: Any, others: tuple[Any, ...]
) -> None:
    """Raises RankError on every rank, where one was given others."""
    known = not isinstance(start, Tensor) and hasattr(start, "diagonal")
    near = start.diagonal() if known else start
    facts = {
        "P": operator.size,
        "dtype": str(operator.dtype),
        "device": operator.device.type,
        "max_matvecs": operator.limit,
        "start": type(start).__name__,
        **dict(zip(("k", "which", "tol", "seed", "block"), others, strict=True)),
    }
    compared = {"start": near} if isinstance(near, Tensor) else {}
    agree_alike(ranks, "eigsh", facts, **compared)


def _left_out(H: Any, scale: float) -> float:
    """Bound on what a pruned operator adds to every residual."""
    pruned = float(getattr(H, "pruning_error", 0.0) or 0.0)
    if pruned == 0:
        return 0.0
    return pruned / scale if scale else math.inf


def _checked(H: Any, k: int, which: Which, tol: float, max_matvecs: int | None) -> CountedOperator:
    shape = tuple(getattr(H, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"H must be square, [P, P] with P >= 1, got shape {list(shape)}")
    if getattr(H, "dtype", None) not in (torch.float32, torch.float64):
        raise ValueError(f"H must be float32 or float64, got {getattr(H, 'dtype', None)}")
    if isinstance(H, Tensor):
        H = H.detach()
        gap, largest = float((H - H.T).abs().max()), float(H.abs().max())
        if gap > 100 * torch.finfo(H.dtype).eps * largest:
            raise ValueError(f"H must be symmetric, got |H - H^T| up to {gap:.2g}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= shape[0]:
        raise ValueError(f"k must be an integer with 1 <= k <= P = {shape[0]}, got {k!r}")
    check_choice("which", which, Which)
    if not (isinstance(tol, float | int) and 0 < tol < math.inf):
        raise ValueError(f"tol must be positive, got {tol!r}")
    if max_matvecs is None:
        return CountedOperator(H, 1000 + 10 * shape[0])
    if isinstance(max_matvecs, bool) or not isinstance(max_matvecs, int) or max_matvecs < k:
        raise ValueError(f"max_matvecs must be an integer >= k = {k}, got {max_matvecs!r}")
    return CountedOperator(H, max_matvecs)


def _checked_start(start: Any, which: Which, operator: CountedOperator) -> Any:
    size = operator.size
    if start is None:
        return None
    if isinstance(start, Tensor):
        if start.dim() != 2 or start.shape[0] != size or start.shape[1] == 0:
            raise ValueError(f"start must be [P, s] = [{size}, s], got {list(start.shape)}")
        if not bool(on_the_host(torch.isfinite(start).all())):
            raise ValueError("start must be finite, got NaN or Inf")
        return start.detach().to(operator.dtype).to(operator.device)
    if not (hasattr(start, "eigsh") and hasattr(start, "solve_shifted")):
        raise ValueError(
            "start must be None, a tensor [P, s] or an operator with eigsh and solve_shifted, "
            f"got {type(start).__name__}"
        )
    like = (start.dtype, torch.device(start.device).type)
    if tuple(start.shape) != (size, size) or like != (operator.dtype, operator.device.type):
        raise ValueError(
            f"start must be [{size}, {size}], {operator.dtype} on {operator.device}, like H; "
            f"got {list(start.shape)}, {start.dtype} on {start.device}"
        )
    if which == "SA":
        raise ValueError("start: an operator gives leading eigenvectors, which='SA' wants the last")
    return start


def _order(values: Tensor, which: Which) -> Tensor:
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)
    return values.argsort(descending=which == "LA", stable=True)


def _dense(
    H: Any, operator: CountedOperator, k: int, which: Which
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Values [k], vectors [P, k], relative residuals [k] and |λ_1|, from the formed matrix."""
    if isinstance(H, Tensor) or not hasattr(H, "to_dense"):
        identity = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
        matrix = operator.apply(identity)
    else:
        matrix = H.to_dense()
        operator.count = operator.size
    check_products(matrix)
    matrix = matrix.double()
    matrix = (matrix + matrix.T) / 2
    values, vectors = torch.linalg.eigh(matrix)
    scale = float(values.abs().max())
    order = _order(values, which)[:k]
    values, vectors = values[order], vectors[:, order].to(operator.dtype)
    residuals = (matrix @ vectors.double() - vectors.double() * values).norm(dim=0)
    return values, vectors, residuals / scale if scale else residuals, scale


def _by_gram(
    rows: Tensor, operator: CountedOperator, k: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """As :func:`_dense`, from few rows R [q, P] with H = R^T R."""
    operator.count = len(rows)
    check_products(rows)
    values, vectors, residuals = gram_eigenpairs(rows, k, torch.Generator().manual_seed(seed))
    scale = float(values[0])
    return values, vectors, residuals / scale if scale else residuals, scale


def _iterate(space: Subspace, search: Search, start: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """As :func:`_dense`, by products alone."""
    residuals = None
    with contextlib.suppress(OutOfProducts):
        residuals = _search(space, search, start)
    values, coefficients = search.wanted(space)
    vectors = space.combine(coefficients)
    if space.restarts:
        gram = on_the_host(space.inner(vectors, vectors).double())
        inverse = torch.linalg.inv(torch.linalg.cholesky(gram))
        vectors = inverse.to(vectors) @ vectors
        coefficients = coefficients @ inverse.T
    if residuals is None or space.restarts:
        residuals = space.residual_norms(values, coefficients)
    scale = space.scale
    return values, vectors.T.contiguous(), residuals / scale if scale else residuals, scale


def _search(space: Subspace, search: Search, start: Any) -> Tensor | None:
    """Expands ``space`` until nothing is missing.

    Returns:
        The residuals' norms [k] of what is found, where they are known already.
    """
    block = max(4, min(8, search.k // 25))
    preconditioned = _seed(space, search, start)
    corrections = olsen(start) if preconditioned and not isinstance(start, Tensor) else None
    chains = 1
    while True:
        if preconditioned:
            davidson(space, search, block, corrections)
        elif not lanczos(space, search):
            return None
        if space.room < _CHAIN_ROOM:
            restart(space, search)
        complete = confirm(space, search, chains)
        if complete and (norms := _settled(space, search, block)) is not None:
            return norms
        # More copies at a time, as long as one chain outside the basis has room to be conclusive.
        chains = 2 if chains == 1 else 1


def _seed(space: Subspace, search: Search, start: Any) -> bool:
    """Puts the start into the basis; tells whether Davidson's method goes on from there."""
    if start is None:
        return False
    if not isinstance(start, Tensor):
        return seed_preconditioner(space, search, start)
    rows = start.T[: space.capacity - _PENDING]
    if len(rows) == 1:
        space.push(rows)
        return False
    seed_block(space, rows)
    return space.size > 0


def _settled(space: Subspace, search: Search, block: int) -> Tensor | None:
    """The norms [k] of the residuals, from vectors, if they are within the tolerance as they are.

    If not, what a recurrence has lost to rounding is made up by corrections; where these no longer
    help, the images are recomputed, and what then remains is what the tolerance is raised to.
    """
    at_once, refreshed = True, False
    while True:
        values, coefficients = search.wanted(space)
        norms = space.residual_norms(values, coefficients)
        if search.count_converged(norms, space.scale) == search.k:
            return norms if at_once else None
        at_once = False
        before = space.operator.count
        if davidson(space, search, block, None) and space.operator.count > before:
            continue
        if refreshed:
            search.tol = 1.5 * float(norms.max()) / space.scale
            return None
        space.restart(*search.wanted(space))
        space.refresh()
        refreshed = True
