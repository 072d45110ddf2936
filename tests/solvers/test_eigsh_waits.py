"""Eigensolvers on a device: the same promises, and a host that waits only where it has to.

The CPU plays the device (played_device.py); it counts what is launched and read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import classes, randn, seeded
from played_device import Counts, OnDevice, Waited, counting, generators, played
from spectra import Counting, check, layer, spectra, symmetric
from torch import Tensor, nn

import hesskern as hk
from hesskern.solvers.device_subspace import DeviceSubspace
from hesskern.solvers.eigsh import eigsh
from hesskern.solvers.lanczos import Search, lanczos, restart
from hesskern.solvers.result import EigenResult
from hesskern.solvers.subspace import CountedOperator, OnItsWay, Subspace

LA, SA, LM = "LA", "SA", "LM"


class Operator:
    """A dense symmetric matrix on the device; notes how many vectors each product takes."""

    device = played()

    def __init__(self, matrix: Tensor, broken_from: int | None = None, by: float = math.nan):
        self.shape, self.dtype = tuple(matrix.shape), matrix.dtype
        self.matrix = OnDevice(matrix)
        self.products: list[int] = []
        self._broken_from, self._by = broken_from, by

    @property
    def count(self) -> int:
        return sum(self.products)

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products.append(1 if v.dim() == 1 else v.shape[1])
        image = self.matrix @ v
        if self._broken_from is not None and self.count > self._broken_from:
            image[7] = self._by
        return image


@contextmanager
def played_device() -> Iterator[Counts]:
    """Inside, the device's values are out of reach but by copies to the host."""
    played()
    with torch.no_grad(), generators(), counting(strict=True) as counts:
        yield counts


@pytest.fixture
def device() -> Iterator[Counts]:
    with played_device() as counts:
        yield counts


def fetched(result: EigenResult) -> EigenResult:
    """The result on the host."""
    parts = (result.values, result.vectors, result.residuals)
    assert all(isinstance(part, OnDevice) for part in parts)
    return EigenResult(*(part.inner for part in parts), result.converged, result.matvecs)  # type: ignore[attr-defined]


# what is counted


def decaying(dtype: torch.dtype = torch.float64, size: int = 400) -> Tensor:
    return symmetric(0.93 ** torch.arange(size), dtype=dtype)


class Watch:
    """Counts per step and run of Lanczos.

    Attributes:
        launches: per step, its vectors and the operators launched for it beside the product.
        reads: at every look at the pairs, copies to the host so far.
        runs: looks (restarts are such, too) and copies to the host of every run.
    """

    def __init__(self, device: Counts, patch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[int, int]] = []
        self.reads: list[int] = []
        advance, apply = DeviceSubspace.advance, CountedOperator.apply
        beside = 0

        def counted_apply(operator: CountedOperator, rows: Tensor) -> Tensor:
            nonlocal beside
            before = device.launches
            result = apply(operator, rows)
            beside = device.launches - before
            return result

        def counted_advance(space: DeviceSubspace, chosen: list[int], krylov: bool = True) -> None:
            launched, traffic = device.launches, (device.reads, device.uploads)
            advance(space, chosen, krylov)
            assert (device.reads, device.uploads) == traffic
            self.launches.append((len(chosen), device.launches - launched - beside))

        patch.setattr(CountedOperator, "apply", counted_apply)
        patch.setattr(DeviceSubspace, "advance", counted_advance)
        self.progress = lambda *_: self.reads.append(device.reads)
        self.runs: list[tuple[int, int]] = []

        def counted_lanczos(space: Subspace, search: Search) -> bool:
            looks, reads = len(self.reads) + space.restarts, device.reads
            result = lanczos(space, search)
            now = len(self.reads) + space.restarts
            self.runs.append((now - looks, device.reads - reads))
            return result

        patch.setattr("hesskern.solvers.eigsh.lanczos", counted_lanczos)


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [5, 20])
def test_a_step_reads_nothing_and_a_look_once(
    device: Counts, monkeypatch: pytest.MonkeyPatch, block: int, k: int
) -> None:
    operator = Operator(decaying(torch.float32))
    watch = Watch(device, monkeypatch)
    result = eigsh(operator, k, block=block, progress=watch.progress)
    check(operator.matrix.inner, fetched(result), k, LA, 1e-4)
    assert operator.products[0] == block
    # One vector takes 22 operators; every further one 17, three of them to keep it orthogonal to
    # those before.
    for vectors, launches in watch.launches:
        assert launches <= 5 + 17 * vectors
    assert watch.runs
    for looks, reads in watch.runs:
        assert reads <= looks
    # A quarter of the steps, and at the end what confirms and the residuals from vectors.
    assert len(watch.reads) < len(operator.products)
    if block <= 4:
        assert device.reads <= len(watch.reads) + 4
    # Larger ones leave more to corrections by Davidson's method, each of which looks three times.


def test_a_call_in_numbers(device: Counts) -> None:
    operator = Operator(decaying(torch.float32))
    eigsh(operator, 20)
    assert operator.products[0] == 4
    # A host that looked in every step read about 400 times.
    assert len(operator.products) <= 22
    assert device.reads <= 10
    assert device.uploads <= 12
    assert device.launches <= 21 * operator.count


@pytest.mark.parametrize("block", [1, 4])
def test_the_device_works_while_the_host_looks(
    device: Counts, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    operator = Operator(decaying(torch.float32))
    behind: list[int] = []
    searching = False

    class Noted(OnItsWay):
        def __init__(self, tensor: Tensor) -> None:
            self._count = operator.count
            super().__init__(tensor)

        def awaited(self) -> Tensor:
            if searching:
                behind.append(operator.count - self._count)
            return super().awaited()

    def watched(space: Subspace, search: Search) -> bool:
        nonlocal searching
        searching = True
        result = lanczos(space, search)
        searching = False
        return result

    monkeypatch.setattr("hesskern.solvers.device_subspace.OnItsWay", Noted)
    monkeypatch.setattr("hesskern.solvers.eigsh.lanczos", watched)
    result = eigsh(operator, 20, block=block)
    check(operator.matrix.inner, fetched(result), 20, LA, 1e-4)
    assert result.matvecs == operator.count
    # Products that were queued before every wait, none of which is a restart's.
    assert len(behind) >= 4
    assert set(behind) == {block}
    assert device.reads >= len(behind)
    # What the host finds a step late costs a step.
    monkeypatch.setattr(DeviceSubspace, "look_ahead", lambda _: 0)
    behind.clear()
    at_once = eigsh(operator, 20, block=block)
    assert set(behind) == {0}
    assert result.matvecs <= at_once.matvecs + 2 * block


def test_a_look_before_a_step_that_is_queued() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 90).double())
    found = []
    with played_device() as device:
        for ahead in (False, True):
            operator = Operator(matrix)
            space = DeviceSubspace(CountedOperator(operator, 15), 16, 4)
            space.push_random(3, torch.Generator().manual_seed(0))
            for _ in range(4):
                space.advance([0, 1, 2])
            reads = device.reads
            assert not ahead or space.look_ahead() == 3
            values, coefficients = space.ritz()
            assert device.reads == reads + 1
            found.append((values, coefficients, space.coupled(coefficients), space.scale))
            assert device.reads == reads + 1
            assert operator.count == (15 if ahead else 12)
        # No products are left, and no room.
        assert space.look_ahead() == 0
        # Now of the whole basis.
        values, coefficients = space.ritz()
        assert coefficients.shape == (15, 15)
        assert device.reads == reads + 2
        residuals = space.residual_norms(values, coefficients)
    for late, at_once in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(late), torch.as_tensor(at_once))
    estimates = space.coupled(coefficients).norm(dim=0)
    torch.testing.assert_close(residuals, estimates, rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("device")
def test_no_step_ahead_without_room_or_pending_directions() -> None:
    space = DeviceSubspace(CountedOperator(Operator(decaying()), 1000), 6, 4)
    space.push_random(2, torch.Generator().manual_seed(0))
    space.advance([0, 1])
    space.advance([0, 1])
    assert space.look_ahead() == 2
    assert space.look_ahead() == 0
    assert space.size == 6
    assert space.ritz()[1].shape == (4, 4)
    space.restart(*(part[..., -2:] for part in space.ritz()))
    space.drop_pending()
    assert space.look_ahead() == 0


def test_a_copy_is_waited_for_by_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA has it: the copy is queued, an event behind it, and the host waits for that alone."""
    events: list[str] = []
    host = torch.zeros(2, 3)

    class Far:
        is_cuda, device = True, torch.device("cuda", 0)

        def to(self, device: str, non_blocking: bool) -> Tensor:
            assert (device, non_blocking) == ("cpu", True)
            events.append("copy")
            return host

    class Event:
        def record(self, stream: str) -> None:
            events.append(stream)

        def synchronize(self) -> None:
            events.append("wait")
            host.fill_(7)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    sent = OnItsWay(Far())  # type: ignore[arg-type]
    assert events == ["copy", "stream of cuda:0"]
    assert torch.equal(sent.awaited(), torch.full((2, 3), 7.0))
    assert events[2:] == ["wait"]


def test_a_restart_reads_nothing(device: Counts) -> None:
    space = DeviceSubspace(CountedOperator(Operator(decaying()), 1000), 30, 8)
    search = Search(4, LA, 1e-9, torch.Generator().manual_seed(0), lambda _: None, 2)
    space.push_random(2, search.generator)
    for turn in range(9):
        while space.room >= space.pending:
            space.advance([0, 1])
        before = device.reads
        assert restart(space, search)
        assert device.reads == before + 1, "the look at what came before"
        assert space.restarts == turn + 1
    while space.room >= space.pending:
        space.advance([0, 1])
    before = device.reads
    # Every tenth makes sure of the basis: its Gram matrix, the Rayleigh matrix, the drift.
    assert restart(space, search)
    assert device.reads == before + 4


def test_the_played_device_notices() -> None:
    with played_device() as device:
        x = OnDevice(torch.arange(3.0))
        for look in (
            lambda: bool(x[0] > 0),
            lambda: float(x.sum()),
            lambda: x[0].item(),
            lambda: x[x > 1],
            lambda: x.nonzero(),
        ):
            with pytest.raises(Waited):
                look()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        assert device.reads == 0
        assert torch.equal(x.cpu(), torch.arange(3.0))
        assert device.reads == 1
        before = device.launches
        assert isinstance((x.unsqueeze(0) + 1).T, OnDevice)
        assert device.launches == before + 1


# the same promises


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("which", [LA, SA, LM])
@pytest.mark.parametrize(("dtype", "block"), [(torch.float64, 1), (torch.float32, 3)])
@pytest.mark.parametrize(
    "name",
    [
        "uniform", "indefinite", "negative definite", "repeated", "clustered", "rank 3",
        "rank 1, negative", "identity", "two values", "zero",
    ],
)  # fmt: skip
def test_agrees_with_the_dense_solution(
    name: str, dtype: torch.dtype, which: str, block: int
) -> None:
    operator = Operator(symmetric(spectra(150)[name], dtype=dtype))
    result = eigsh(operator, 8, which=which, block=block)
    check(operator.matrix.inner, fetched(result), 8, which, 1e-4)
    assert result.matvecs == operator.count


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_any_scale(scale: float) -> None:
    operator = Operator(scale * decaying(torch.float32))
    check(operator.matrix.inner, fetched(eigsh(operator, 8)), 8, LA, 1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("size", "k"), [(129, 1), (129, 40), (130, 2), (130, 20)])
def test_hardly_larger_than_what_is_solved_densely(size: int, k: int) -> None:
    operator = Operator(symmetric(torch.linspace(-1, 2, size)))
    check(operator.matrix.inner, fetched(eigsh(operator, k)), k, LA, 1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block", [1, 4])
def test_every_copy_of_a_repeated_eigenvalue(block: int) -> None:
    tail = 0.95 ** torch.arange(295, dtype=torch.float64)
    operator = Operator(symmetric(torch.cat([torch.full((5,), 3.0).double(), tail])))
    result = fetched(eigsh(operator, 8, tol=1e-6, block=block))
    check(operator.matrix.inner, result, 8, LA, 1e-6)
    assert int((result.values > 2).sum()) == 5


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block", [1, 3])
def test_restarts_many_times_and_stays_true(block: int) -> None:
    size = 160
    matrix = 2 * torch.eye(size) - torch.diag(torch.ones(size - 1), 1)
    matrix = matrix - torch.diag(torch.ones(size - 1), -1)
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        operator = Operator(matrix.to(dtype))
        result = fetched(eigsh(operator, 3, which=SA, tol=tol, block=block))
        check(operator.matrix.inner, result, 3, SA, tol)
        assert operator.count > 2 * 63


@pytest.mark.usefixtures("device")
def test_a_tolerance_below_rounding_ends_with_a_warning() -> None:
    operator = Operator(symmetric(0.97 ** torch.arange(300), dtype=torch.float32))
    with pytest.warns(RuntimeWarning, match=r"rounding of torch.float32.*worst residual"):
        result = fetched(eigsh(operator, 10, tol=1e-9))
    assert not result.converged
    assert float(result.residuals.max()) < 2e-6


def on_device(K: hk.KroneckerOperator) -> hk.KroneckerOperator:
    return hk.KroneckerOperator(OnDevice(K.A), OnDevice(K.B))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("budget", [10, 25, 61])
@pytest.mark.parametrize(
    ("start", "block"), [("none", 1), ("none", 4), ("block", 1), ("kronecker", 4)]
)
def test_stops_at_the_limit_of_products(budget: int, start: str, block: int) -> None:
    K = hk.KroneckerOperator(*(symmetric(torch.linspace(0.1, 1, n)) for n in (16, 20)))
    H = K.to_dense() + 0.02 * symmetric(torch.linspace(-1, 1, 320), seed=1)
    begin: Any = {"none": None, "block": OnDevice(torch.eye(320)[:, :7])}.get(start, on_device(K))
    operator = Operator(H)
    with pytest.warns(RuntimeWarning, match=r"limit of \d+ products"):
        result = eigsh(operator, 10, tol=1e-12, start=begin, max_matvecs=budget, block=block)
    assert operator.count == result.matvecs == budget
    result = fetched(result)
    torch.testing.assert_close(result.vectors.T @ result.vectors, torch.eye(10, dtype=H.dtype))
    fresh = (H @ result.vectors - result.vectors * result.values).norm(dim=0) / result.values[0]
    torch.testing.assert_close(result.residuals, fresh, rtol=1e-6, atol=1e-13)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("limit", range(3, 20, 4))
def test_fewer_products_than_dimensions(limit: int) -> None:
    operator = Operator(symmetric(torch.linspace(1, 2, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = fetched(eigsh(operator, 3, max_matvecs=limit, block=4))
    assert operator.count <= limit
    fresh = operator.matrix.inner @ result.vectors - result.vectors * result.values
    torch.testing.assert_close(
        result.residuals, fresh.norm(dim=0) / result.values[0], rtol=1e-2, atol=1e-12
    )


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("distance", [0.0, 0.003])
def test_a_kronecker_start(distance: float) -> None:
    H, K = layer(distance)
    operator = Operator(H)
    result = fetched(eigsh(operator, 12, start=on_device(K)))
    check(H, result, 12, LA, 1e-4)
    assert result.matvecs == operator.count
    assert result.matvecs <= eigsh(Counting(H), 12, start=K).matvecs + 12


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("columns", [1, 10, 200])
def test_any_start_vectors(columns: int) -> None:
    operator = Operator(symmetric(0.95 ** torch.arange(200)))
    start = torch.randn(200, columns, generator=torch.Generator().manual_seed(2))
    check(operator.matrix.inner, fetched(eigsh(operator, 10, start=OnDevice(start))), 10, LA, 1e-4)


@pytest.mark.usefixtures("device")
def test_useless_start_vectors_do_no_harm() -> None:
    matrix = symmetric(0.95 ** torch.arange(200))
    repeated = torch.ones(200, 5, dtype=torch.float64)
    with_nothing = torch.cat([repeated, torch.zeros(200, 1).double()], 1)
    for start in (torch.zeros(200, 2), repeated, -repeated[:, :1], with_nothing):
        result = fetched(eigsh(Operator(matrix), 10, start=OnDevice(start)))
        check(matrix, result, 10, LA, 1e-4)


@pytest.mark.usefixtures("device")
def test_equal_seeds_give_equal_results() -> None:
    first, second, other = (
        fetched(eigsh(Operator(decaying(torch.float32)), 10, seed=seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.residuals, second.residuals)
    assert not torch.equal(first.vectors, other.vectors)


# what goes wrong


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("by", [math.nan, -math.inf])
@pytest.mark.parametrize(("broken_from", "block"), [(0, 1), (13, 4), (40, 1)])
def test_a_product_that_is_not_finite(by: float, broken_from: int, block: int) -> None:
    operator = Operator(decaying(), broken_from, by)
    with pytest.raises(ValueError, match="H: H @ v must be finite, got NaN or Inf"):
        eigsh(operator, 20, tol=1e-10, block=block)
    # Found at the next look.
    assert operator.count <= max(20, broken_from) + 12


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("scale", [1e30, 1e-18, 1e-22, 1e-30])
def test_scales_whose_squares_leave_float32(scale: float) -> None:
    operator = Operator(scale * decaying(torch.float32))
    check(operator.matrix.inner, fetched(eigsh(operator, 6)), 6, LA, 1e-4)


@pytest.mark.usefixtures("device")
def test_products_at_the_end_of_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"H: (products with H overflow|H @ v must be finite)"):
        eigsh(Operator(torch.full((400, 400), 2e38)), 3)


@pytest.mark.usefixtures("device")
def test_not_finite_where_it_is_solved_densely() -> None:
    for at in (0, 5):
        with pytest.raises(ValueError, match="H: H @ v must be finite"):
            eigsh(Operator(symmetric(torch.linspace(0, 1, 40)), at), 3)


@pytest.mark.parametrize("block", [0, -1, 17, 2.0, True, "4"])
def test_blocks_that_are_none(block: Any) -> None:
    with pytest.raises(ValueError, match="block must be an integer with 1 <= block <= 16"):
        eigsh(torch.eye(6), 2, block=block)


# blocks on the CPU


def test_one_vector_at_a_time_on_the_cpu() -> None:
    seen: list[int] = []

    class Noting(Counting):
        def __matmul__(self, v: Tensor) -> Tensor:
            seen.append(v.shape[1] if v.dim() > 1 else 1)
            return super().__matmul__(v)

    check(decaying(), eigsh(Noting(decaying()), 20), 20, LA, 1e-4)
    assert set(seen) == {1}
    seen.clear()
    check(decaying(), eigsh(Noting(decaying()), 20, block=4), 20, LA, 1e-4)
    assert seen[0] == 4
    assert len(seen) < 30


# the subspace beneath


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


# densities and traces


def test_density_and_trace_read_once(device: Counts) -> None:
    for matrix in (decaying(size=60), torch.diag(torch.tensor([3.0] * 4 + [0.0] * 20).double())):
        operator = Operator(matrix)
        before = device.reads
        found = hk.spectral_density(operator, steps=24, probes=3)
        assert device.reads == before + 1
        expected = hk.spectral_density(Counting(matrix), steps=24, probes=3)
        assert torch.equal(found.nodes, expected.nodes)
        assert torch.equal(found.weights, expected.weights)
        assert set(operator.products) == {3}
        for products in (12, 300):
            operator, before = Operator(matrix), device.reads
            assert hk.hutchpp_trace(operator, products) == hk.hutchpp_trace(
                Counting(matrix), products
            )
            assert device.reads == before + 1
            assert len(operator.products) <= 3


def test_a_layer_hessian(device: Counts) -> None:
    model = seeded(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))).float()
    data = [(randn(60, 12).float(), classes(60, c=4))]
    H = hk.layer_hessians(model, data, nn.CrossEntropyLoss())["0"]
    dense = H.to_dense()

    class There:
        """The Hessian's products, by its own kernels, on the device."""

        shape, dtype, device = H.shape, H.dtype, played()

        def __matmul__(self, v: Tensor) -> Tensor:
            rows = v.T if v.dim() > 1 else v[None]
            s, x = H._chunks[0].s, H._chunks[0].x  # type: ignore[index]
            blocks = rows.contiguous().unflatten(1, H.layer_shape)
            out = hk.ops.layer_hessian_matmul(
                OnDevice(x), OnDevice(s), blocks, 1.0 / H.num_samples
            ).flatten(1)
            return out.T if v.dim() > 1 else out[0]

    result = fetched(eigsh(There(), 20))
    check(dense, result, 20, LA, 1e-4)


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
