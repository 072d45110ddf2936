"""The subspace beneath the eigensolvers: its Krylov relation, drift and span."""

from __future__ import annotations

import pytest
import torch
from spectra import Counting, symmetric
from torch import Tensor

from hesskern.solvers.subspace import CountedOperator, Subspace


@pytest.fixture
def space() -> tuple[Tensor, Subspace]:
    matrix = symmetric(torch.linspace(-1, 2, 90))
    subspace = Subspace(CountedOperator(Counting(matrix), 1000), 30, 8)
    subspace.push_random(3, torch.Generator().manual_seed(0))
    for _ in range(6):
        subspace.advance(list(range(subspace.pending)))
    subspace.advance([1])
    return matrix, subspace


def krylov_defect(matrix: Tensor, space: Subspace) -> float:
    """‖H Q^T - Q^T T - W^T B‖, of a space whose Ritz vectors are its basis vectors or not."""
    size = space.size
    q = space.combine(torch.eye(size).double())
    pending = space._basis[size : size + space.pending]
    rayleigh = space.rayleigh_block(list(range(size)))
    return float((matrix @ q.T - q.T @ rayleigh - pending.T @ space.coupling).norm())


def test_the_krylov_relation_holds(space: tuple[Tensor, Subspace]) -> None:
    matrix, subspace = space
    assert (subspace.size, subspace.pending) == (19, 3)
    assert krylov_defect(matrix, subspace) < 1e-12
    values, coefficients = subspace.ritz()
    estimated = (subspace.coupling @ coefficients).norm(dim=0)
    torch.testing.assert_close(estimated, subspace.residual_norms(values, coefficients))
    rows = subspace.residuals(values, coefficients).norm(dim=1)
    torch.testing.assert_close(estimated, rows)
    subspace.restart(values[-8:], coefficients[:, -8:])
    assert krylov_defect(matrix, subspace) < 1e-12
    subspace.advance([2, 0])
    assert krylov_defect(matrix, subspace) < 1e-12
    subspace.orthonormalize()
    assert krylov_defect(matrix, subspace) < 1e-12


def test_drift_is_seen_and_repaired(space: tuple[Tensor, Subspace]) -> None:
    matrix, subspace = space
    generator = torch.Generator().manual_seed(0)
    assert subspace.drift(generator) < 1e-14
    noise = torch.randn(subspace.size, 90, generator=generator, dtype=torch.float64)
    subspace._images[: subspace.size] += 1e-3 * noise / noise.norm()
    measured = [subspace.drift(generator) for _ in range(20)]
    assert sum(measured) / 20 == pytest.approx(1e-3 / subspace.scale, rel=0.5)
    subspace.refresh()
    assert subspace.drift(generator) < 1e-14
    values, coefficients = subspace.ritz()
    vectors = subspace.combine(coefficients).T
    fresh = (matrix @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(subspace.residual_norms(values, coefficients), fresh)


def test_directions_inside_the_span_are_refused(space: tuple[Tensor, Subspace]) -> None:
    _, subspace = space
    inside = subspace.combine(torch.ones(subspace.size, 2).double())
    assert subspace.push(inside) == 0
    assert subspace.push(torch.zeros(2, 90, dtype=torch.float64)) == 0
