"""Which samples go under a bound on the norm, without an eigenvalue and with few looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import randn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hesskern.operators.pruning import norm_bound_of, prune
from hesskern.operators.samples import SampleRows


class _Looks(TorchDispatchMode):
    """Counts single values, and sizes that depend on values, that the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return function(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        self.count += getattr(function, "__name__", "") in ("tolist", "numpy")
        return function(*args, **(kwargs or {}))


@given(
    m=st.integers(1, 40),
    rank=st.integers(1, 40),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 1000),
)
def test_bound_of_a_matrix(m: int, rank: int, exponent: int, seed: int) -> None:
    rows = randn(rank, m, seed=seed) * 10.0**exponent
    gram = rows.T @ rows
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    assert largest <= float(norm_bound_of(gram)) <= 1.0002 * m ** (1 / 256) * largest


def test_bound_of_zero_is_zero() -> None:
    assert float(norm_bound_of(torch.zeros(5, 5).double())) == 0.0


def pieces(sizes: list[int], r: int = 3, m: int = 6, spread: float = 3.0) -> list[SampleRows]:
    result = []
    for i, n in enumerate(sizes):
        scale = (spread * randn(n, seed=70 + i)).exp()
        x = randn(n, 4, seed=i) * scale[:, None]
        result.append(SampleRows(x, randn(n, r, m, seed=30 + i)))
    return result


def whole(chunks: list[SampleRows]) -> Tensor:
    total = torch.zeros(24, 24).double()
    for chunk in chunks:
        for rows in chunk.dense_rows():
            total += rows.T @ rows
    return total


@pytest.mark.parametrize("sizes", [[200], [1], [30, 0, 50, 7], [1] * 20])
@pytest.mark.parametrize("tolerance", [1e-9, 1e-4, 0.03, 0.3, 0.9])
def test_what_goes_is_within_the_bound_and_has_the_smallest_shares(
    sizes: list[int], tolerance: float
) -> None:
    chunks = pieces(sizes)
    shares = [chunk.shares() for chunk in chunks]
    exact, total = whole(chunks), float(torch.cat(shares).sum())
    found = prune(list(chunks), shares, tolerance)
    gap = exact - whole(found.chunks)
    assert float(torch.linalg.eigvalsh(gap)[-1]) <= found.norm + 1e-12 * total
    assert found.norm <= tolerance * total
    assert found.trace == pytest.approx(float(gap.trace()), abs=1e-12 * total)
    stay = [chunk.shares() for chunk in found.chunks]
    gone = torch.cat(shares).sort().values[: sum(sizes) - sum(map(len, stay))]
    assert len(gone) == 0 or float(gone[-1]) <= float(torch.cat([*stay, gone[-1:]]).min())
    # Those that stay keep their order.
    for chunk, kept in zip(chunks, found.chunks, strict=True):
        places = [int((chunk.x == x).all(1).nonzero()[0, 0]) for x in kept.x]
        assert places == sorted(places)


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_no_larger_set_is_known_to_fit(tolerance: float) -> None:
    """All sets of the smallest shares tried one by one: nearly the largest that fits was found."""
    chunks = pieces([300], r=8, spread=0.5)
    (shares,) = [chunk.shares() for chunk in chunks]
    total, order = float(shares.sum()), shares.argsort()
    fitting = 0
    for count in range(1, 300):
        (chunk,) = chunks
        weighted = (chunk.s * chunk.x.norm(dim=1)[:, None, None])[order[:count]].flatten(0, 1)
        bound = min(float(norm_bound_of(weighted.T @ weighted)), float(shares[order[:count]].sum()))
        fitting = count if bound <= tolerance * total else fitting
    found = prune(list(chunks), [shares], tolerance)
    largest_trace = float(shares[order[:fitting]].sum())
    assert found.trace >= 0.9 * largest_trace
    assert found.trace > 1.5 * tolerance * total


@pytest.mark.parametrize("count", [1, 6])
def test_few_looks_however_many_pieces(count: int) -> None:
    chunks = pieces([40] * count)
    shares = [chunk.shares() for chunk in chunks]
    with _Looks() as values, _Lists() as lists:
        prune(chunks, shares, 0.05)
    # The trace, the table of all sets, and a bound for every set that is tried.
    assert values.count + lists.count <= 2 + 8


def test_shares_whose_squares_leave_float32() -> None:
    """Most samples of a saturated classifier: their gradients' squares are nothing in float32."""
    x, s = torch.full((100, 1), 1e-3), torch.full((100, 1, 2), 1e-21)
    x[0], s[0] = 1.0, 1.0
    chunk = SampleRows(x, s)
    shares = chunk.shares()
    found = prune([chunk], [shares], 0.01)
    assert [len(c.x) for c in found.chunks] == [1]
    assert found.norm == pytest.approx(float(shares[1:].sum()), rel=1e-9)
