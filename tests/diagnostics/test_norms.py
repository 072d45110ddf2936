"""Spectral norms by Lanczos: when it stops, and what it asks of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import classes, randn, seeded
from played_device import OnDevice, counting, generators, played
from torch import Tensor, nn

import hesskern as hk
from hesskern.diagnostics.norms import Lanczos, _run_lanczos, relative_norms


class Operator:
    """A dense symmetric matrix; notes how many vectors each product takes."""

    def __init__(self, matrix: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device
        self.matrix = matrix
        self.products: list[int] = []

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products.append(1 if v.dim() == 1 else v.shape[1])
        return self.matrix @ v


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(randn(len(values), len(values), seed=seed)).Q
    return (q * values.double()) @ q.T


SPECTRA = {
    "decaying": 0.9 ** torch.arange(200),
    "one": torch.cat([torch.ones(1), torch.zeros(99)]),
    "negative": -torch.linspace(1, 2, 120),
    "flat": torch.linspace(0.99, 1, 300),
    "three dimensions": torch.tensor([3.0, 2.0, 1.0]),
    "one dimension": torch.tensor([2.0]),
    "zero": torch.zeros(50),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_one_read_a_step_for_all_runs_and_the_same_results(name: str) -> None:
    H, K = matrix(SPECTRA[name]), matrix(SPECTRA[name].flip(0) / 2, seed=1)
    on_cpu: Any = Operator(H)
    expected = _run_lanczos(on_cpu, [None, K], 0)  # type: ignore[list-item]
    assert float(expected[0].norm) == pytest.approx(float(SPECTRA[name].abs().max()), rel=5e-3)
    played()
    with torch.no_grad(), generators(), counting(strict=True) as device:
        there: Any = Operator(OnDevice(H))
        there.device = played()
        found = _run_lanczos(there, [None, OnDevice(K)], 0)  # type: ignore[list-item]
        steps = max(len(run.products) for run in found)
        assert device.reads == steps
    # The host learns a step late that a run is done, unless there can be no more of it.
    assert steps <= len(there.products) <= steps + 1
    assert len(on_cpu.products) == steps
    for one, other in zip(found, expected, strict=True):
        assert one.done
        assert one.norm == pytest.approx(other.norm, rel=1e-12, abs=1e-300)
        assert len(one.basis) == len(one.products) == len(other.products) == len(other.basis)
        torch.testing.assert_close(one.basis.inner, other.basis)  # type: ignore[attr-defined]


def test_the_next_step_is_queued_before_the_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    H: Any = Operator(OnDevice(matrix(SPECTRA["decaying"])))
    H.device = played()
    looks: list[tuple[int, int]] = []
    look = Lanczos.look

    def noted(run: Lanczos, diagonal: float, rest: float) -> None:
        looks.append((len(looks) + 1, len(H.products)))
        look(run, diagonal, rest)

    monkeypatch.setattr(Lanczos, "look", noted)
    with torch.no_grad(), generators():
        _run_lanczos(H, [None], 0)
    assert all(made == told + 1 for told, made in looks)


def test_a_run_ends_with_the_space() -> None:
    # Far from converged, with nothing left to go to.
    run = Lanczos(torch.ones(1).double())
    assert run.open
    numbers = run.step(torch.full((1,), 5.0).double())
    assert not run.open
    run.look(*numbers.tolist())
    assert run.done
    assert run.norm == 5.0
    assert run.basis.shape == (1, 1)


def test_relative_norms_of_a_layer() -> None:
    model = seeded(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))).double()
    data = [(randn(60, 12), classes(60, c=4))]
    H = hk.layer_hessians(model, data, nn.CrossEntropyLoss())["0"]
    K = hk.kronecker_factors(model, data, nn.CrossEntropyLoss())["0"].operator()
    spectral, frobenius, error = relative_norms(H, K, 4, 0)
    dense, gap = H.to_dense(), H.to_dense() - K.to_dense()
    exact = torch.linalg.matrix_norm(gap, 2) / torch.linalg.matrix_norm(dense, 2)
    assert spectral == pytest.approx(float(exact), rel=5e-3)
    assert frobenius == pytest.approx(float(gap.norm() / dense.norm()), abs=5 * error + 1e-9)
