"""The subspace of a device: inner products, the Krylov relation, its ends."""

from __future__ import annotations

import pytest
import torch
from device_operators import LA, Operator, played_device
from networks import randn
from played_device import OnDevice, played
from spectra import symmetric
from torch import Tensor

from hesskern.solvers.device_subspace import DeviceSubspace
from hesskern.solvers.lanczos import Search, lanczos
from hesskern.solvers.subspace import CountedOperator


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("size", "pieces"), [(4095, 1), (4096, 16), (5003, 1), (6000, 20)])
def test_inner_products_of_long_vectors_are_sums_of_pieces(size: int, pieces: int) -> None:
    class Identity:
        shape, dtype, device = (size, size), torch.float64, played()

        def __matmul__(self, v: Tensor) -> Tensor:
            return v

    space = DeviceSubspace(CountedOperator(Identity(), 10), 4, 2)
    assert space._pieces == pieces
    rows, others = randn(3, size), randn(5, size, seed=1)
    found = space.inner(OnDevice(rows), OnDevice(others))
    torch.testing.assert_close(found.inner, rows @ others.T)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_krylov_relation_holds(dtype: torch.dtype) -> None:
    # A block with a direction that ends: an eigenvector among the start vectors.
    values = torch.linspace(-1, 2, 90).double()
    matrix = symmetric(values, dtype=dtype)
    exact = torch.linalg.eigh(matrix.double())[1]
    with played_device():
        space = DeviceSubspace(CountedOperator(Operator(matrix), 1000), 30, 8)
        start = torch.stack([exact[:, 5], exact.sum(1), exact[:, 5] + exact[:, 7]])
        assert space.push(OnDevice(start.to(dtype))) == 3
        for _ in range(6):
            space.advance([0, 1, 2])
        space.advance([1])
        assert (space.size, space.pending) == (19, 3)
        for turn in range(2):
            size = space.size
            q = space._basis[: size + space.pending].inner.double()
            rayleigh = space.rayleigh_block(list(range(size)))
            defect = matrix.double() @ q[:size].T - q[:size].T @ rayleigh
            defect -= q[size:].T @ space.coupling
            epsilon = torch.finfo(dtype).eps
            assert float(defect.norm()) < 50 * epsilon
            assert float((q @ q.T - torch.eye(len(q))).norm()) < 50 * epsilon
            if turn == 0:
                ritz, coefficients = space.ritz()
                space.restart(ritz[-8:], coefficients[:, -8:])
                space.advance([2, 0])


def test_lanczos_until_nothing_is_left() -> None:
    # Every step ends a Krylov space, and the basis ends when it spans everything.
    with played_device():
        space = DeviceSubspace(CountedOperator(Operator(torch.eye(12).double()), 100), 12, 4)
        search = Search(12, LA, 1e-6, torch.Generator().manual_seed(0), lambda _: None, 5)
        lanczos(space, search)
        assert space.size == 12
        q = space._basis.inner
        torch.testing.assert_close(q @ q.T, torch.eye(12).double())


def test_a_smaller_block_after_a_larger_one() -> None:
    # What the outbox still holds of the larger one is nobody's.
    matrix = symmetric(torch.linspace(-1, 2, 90).double())
    generator = torch.Generator().manual_seed(0)
    with played_device():
        space = DeviceSubspace(CountedOperator(Operator(matrix), 1000), 30, 8)
        space.push_random(6, generator)
        for _ in range(3):
            space.advance(list(range(6)))
        values, coefficients = space.ritz()
        space.restart(values[-3:], coefficients[:, -3:])
        space.drop_pending()
        space.push_random(2, generator)
        size = space.size
        for _ in range(2):
            space.advance([0, 1])
        q = space._basis[: space.size + 2].inner
        fresh = matrix @ q[size : space.size].T
        inside = q[: space.size].T @ space.rayleigh_block(list(range(space.size)))[:, size:]
        defect = fresh - inside - q[space.size :].T @ space.coupling[:, size:]
        assert float(defect.norm()) < 1e-13
