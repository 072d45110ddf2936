"""A host that waits for a device only where it has to: launches, reads and looks are counted.

The CPU plays the device (played_device.py).
"""

from __future__ import annotations

import pytest
import torch
from device_operators import LA, Operator, decaying, fetched, played_device
from played_device import Counts, OnDevice, Waited
from spectra import Counting, check, symmetric
from torch import Tensor

import hesskern as hk
from hesskern.solvers.device_subspace import DeviceSubspace
from hesskern.solvers.eigsh import eigsh
from hesskern.solvers.lanczos import Search, lanczos, restart
from hesskern.solvers.subspace import CountedOperator, OnItsWay, Subspace


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
    # Larger ones leave more to corrections by Davidson's method, each of which looks three times.
    if block <= 4:
        assert device.reads <= len(watch.reads) + 4


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
