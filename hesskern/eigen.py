"""Eigensolvers for symmetric operators that are known by their products with vectors."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from hesskern.progress import Progress, reporter
from hesskern.results import EigenResult

__all__ = ["eigsh"]

# Up to this order the matrix is formed and solved densely.
_DENSE = 256


class _Symmetric(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, vectors: Tensor, /) -> Tensor: ...


def eigsh(
    H: _Symmetric,
    k: int,
    which: str = "LA",
    tol: float = 1e-4,
    start: Any = None,
    seed: int = 0,
    max_matvecs: int | None = None,
    progress: bool | Progress = False,
) -> EigenResult:
    """The k most wanted eigenpairs of a symmetric operator.

    Lanczos with full reorthogonalization and thick restart (Wu & Simon, SIAM J. Matrix Anal. Appl.
    22, 2000). Krylov spaces of one vector hold one vector per eigenspace, so after convergence the
    search goes on from a random vector outside everything found, until that changes nothing:
    repeated eigenvalues come out with their multiplicity.

    Args:
        H: [P, P] with ``shape``, ``dtype``, ``device`` and ``H @ V`` for [P] and [P, k]; a
            symmetric tensor will do.
        k: number of pairs.
        which: "LA" largest, "SA" smallest, "LM" largest in absolute value.
        tol: bound on every residual ‖H v - λ v‖ / |λ_1|.
        start: [P, s] vectors whose span is a first guess, or None.
        seed: of the random vectors.
        max_matvecs: products after which the search gives up; None: 100 k + 1000.
        progress: True for a bar, or a callback.

    Returns:
        :class:`EigenResult`.

    Raises:
        ValueError: bad arguments, or a product with NaN or Inf.

    Warns:
        RuntimeWarning: not converged; names the worst residual.
    """
    size = _check(H, k, which, tol)
    report = reporter(progress)
    if size <= _DENSE or 2 * k >= size:
        values, vectors = _dense(H, size)
        image = H @ vectors
        order = _order(values, which)[:k]
        return _result(H, values[order], vectors[:, order], image[:, order], tol, 2 * size)
    solver = _Lanczos(H, size, k, which, tol, seed, max_matvecs or 100 * k + 1000)
    solver.run(start, report)
    return _result(H, *solver.pairs(), tol, solver.matvecs)


def _check(H: Any, k: int, which: str, tol: float) -> int:
    shape = tuple(H.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"H must be square [P, P], got {list(shape)}")
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which must be 'LA', 'SA' or 'LM', got {which!r}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= shape[0]:
        raise ValueError(f"k must be an integer in [1, {shape[0]}], got {k!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol!r}")
    return int(shape[0])


def _order(values: Tensor, which: str) -> Tensor:
    """Indices of values [n], most wanted first."""
    if which == "LM":
        return values.abs().argsort(descending=True)
    return values.argsort(descending=which == "LA")


def _dense(H: _Symmetric, size: int) -> tuple[Tensor, Tensor]:
    matrix = H @ torch.eye(size, dtype=H.dtype, device=H.device)
    _check_finite(matrix)
    values, vectors = torch.linalg.eigh(((matrix + matrix.T) / 2).double())
    return values.to(H.dtype), vectors.to(H.dtype)


def _check_finite(product: Tensor) -> None:
    if not bool(torch.isfinite(product).all()):
        raise ValueError("H @ v contains NaN or Inf")


def _result(
    H: _Symmetric, values: Tensor, vectors: Tensor, image: Tensor, tol: float, matvecs: int
) -> EigenResult:
    scale = max(float(values.abs().max()), torch.finfo(H.dtype).tiny)
    residuals = (image - vectors * values).norm(dim=0) / scale
    converged = bool((residuals <= tol).all())
    if not converged:
        warnings.warn(
            f"eigsh stopped after {matvecs} products with a worst residual of "
            f"{float(residuals.max()):.2g}, above tol={tol:g}",
            RuntimeWarning,
            stacklevel=3,
        )
    pruning = float(getattr(H, "pruning_error", 0.0))
    return EigenResult(values, vectors, residuals + pruning / scale, converged, matvecs)


class _Lanczos:
    """The basis Q, its image H Q, and the Rayleigh matrix of one search."""

    def __init__(
        self,
        H: _Symmetric,
        size: int,
        k: int,
        which: str,
        tol: float,
        seed: int,
        max_matvecs: int,
    ) -> None:
        self.H, self.k, self.which, self.tol = H, k, which, tol
        self.size, self.max_matvecs = size, max_matvecs
        self.capacity = min(size, max(2 * k + 10, k + 32))
        options: dict[str, Any] = {"dtype": H.dtype, "device": H.device}
        # Rows are basis vectors: contiguous to write, and GEMM takes either order.
        self.basis = torch.zeros(self.capacity, size, **options)
        self.image = torch.zeros(self.capacity, size, **options)
        self.rayleigh = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self.count = 0
        self.matvecs = 0
        self.scale = 0.0
        self.generator = torch.Generator().manual_seed(seed)

    def _random(self) -> Tensor:
        noise = torch.randn(self.size, generator=self.generator, dtype=torch.float64)
        return noise.to(self.H.dtype).to(self.H.device)

    def _orthogonalized(self, vector: Tensor) -> Tensor | None:
        """Unit vector outside the basis, or None if nothing is left of it but rounding."""
        before = float(vector.norm())
        if before == 0.0:
            return None
        basis = self.basis[: self.count]
        for _ in range(2):
            vector = vector - basis.T @ (basis @ vector)
        after = float(vector.norm())
        if after <= 100 * torch.finfo(self.H.dtype).eps * max(before, self.scale):
            return None
        vector = vector / after
        # Normalizing magnified what rounding had left inside the basis.
        vector = vector - basis.T @ (basis @ vector)
        return vector / vector.norm()

    def _append(self, vector: Tensor) -> Tensor:
        """Takes one more basis vector; returns its image."""
        j = self.count
        product = self.H @ vector
        _check_finite(product)
        self.matvecs += 1
        self.basis[j], self.image[j] = vector, product
        self.count = j + 1
        column = (self.basis[: j + 1] @ product).double().cpu()
        self.rayleigh[: j + 1, j] = column
        self.rayleigh[j, : j + 1] = column
        self.scale = max(self.scale, float(product.norm()))
        return product

    def _ritz(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, most wanted first, and their coefficients [count, count]."""
        n = self.count
        values, coefficients = torch.linalg.eigh(self.rayleigh[:n, :n])
        order = _order(values, self.which)
        return values[order], coefficients[:, order]

    def _residuals(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """[k] true residuals ‖H v - λ v‖ / |λ_1| of the k most wanted Ritz pairs."""
        k = min(self.k, len(values))
        c = coefficients[:, :k].to(self.H.dtype).to(self.H.device).T
        theta = values[:k].to(self.H.dtype).to(self.H.device).unsqueeze(1)
        gap = c @ self.image[: self.count] - theta * (c @ self.basis[: self.count])
        largest = max(float(values.abs().max()), torch.finfo(self.H.dtype).tiny)
        return gap.norm(dim=1).double().cpu() / largest

    def _restart(self, keep: int) -> None:
        """Shrinks the basis to its ``keep`` most wanted Ritz vectors."""
        values, coefficients = self._ritz()
        c = coefficients[:, :keep].to(self.H.dtype).to(self.H.device).T
        n = self.count
        self.basis[:keep] = c @ self.basis[:n]
        self.image[:keep] = c @ self.image[:n]
        self.rayleigh.zero_()
        self.rayleigh[:keep, :keep] = values[:keep].diag()
        self.count = keep

    def run(self, start: Any, report: Progress) -> None:
        self._seed_basis(start)
        vector = self._next(self._random())
        verified: Tensor | None = None
        best = float("inf")
        stalled = 0
        while vector is not None and self.matvecs < self.max_matvecs:
            product = self._append(vector)
            full = self.count == self.capacity
            if self.count < self.k or not (full or self.count % 8 == 0):
                vector = self._next(product)
                continue
            values, coefficients = self._ritz()
            residuals = self._residuals(values, coefficients)
            report("eigsh", int((residuals <= self.tol).sum()), self.k)
            worst = float(residuals.max())
            done = worst <= self.tol
            if full:
                stalled = stalled + 1 if worst > 0.9 * best else 0
                best = min(best, worst)
                if stalled >= 8 and not done:
                    return
            if done and verified is not None and self._same(verified, values) and full:
                return
            if done and (verified is None or full):
                # What a fresh start vector brings in converges from scratch.
                best, stalled = float("inf"), 0
                verified = values[: self.k].clone()
                self._restart(min(self.k + 2, self.count))
                vector = self._next(self._random())
                continue
            if full:
                outside = self._orthogonalized(product)
                self._restart(min(self.k + max(2, (self.capacity - self.k) // 3), self.count - 1))
                vector = self._next(product if outside is None else outside)
                continue
            vector = self._next(product)

    def _same(self, before: Tensor, values: Tensor) -> bool:
        largest = max(float(values.abs().max()), torch.finfo(torch.float64).tiny)
        return float((before - values[: self.k]).abs().max()) <= self.tol * largest

    def _next(self, vector: Tensor) -> Tensor | None:
        """The vector made orthogonal; a random one if it lies in the basis; None if that is all."""
        for _ in range(4):
            if self.count >= self.size:
                return None
            unit = self._orthogonalized(vector)
            if unit is not None:
                return unit
            vector = self._random()
        return None

    def _seed_basis(self, start: Any) -> None:
        if start is None:
            return
        if not isinstance(start, Tensor) or start.dim() != 2 or start.shape[0] != self.size:
            found = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise ValueError(f"start must be None or [P, s] = [{self.size}, s], got {found}")
        for column in start.to(self.H.dtype).to(self.H.device).T[: self.capacity - 2]:
            unit = self._orthogonalized(column)
            if unit is not None:
                self._append(unit)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values [k], vectors [P, k] and their images [P, k]."""
        values, coefficients = self._ritz()
        c = coefficients[:, : self.k].to(self.H.dtype).to(self.H.device).T
        vectors, image = c @ self.basis[: self.count], c @ self.image[: self.count]
        norms = vectors.norm(dim=1, keepdim=True)
        values = values[: self.k].to(self.H.dtype).to(self.H.device)
        return values, (vectors / norms).T, (image / norms).T
