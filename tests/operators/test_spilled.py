"""Samples in files: the same Hessians, memory within the budget, files that go."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import needs_cuda
from played_device import OnDevice, played
from spilled_files import small_files
from torch import Tensor, nn

import hesskern as hk
from hesskern.operators.samples import SampleRows
from hesskern.operators.spilled import SpilledSamples
from hesskern.spill.rooms import Spill

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go; each of a few samples."""
    return small_files(tmp_path, monkeypatch, 2**11)


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 4)
    )
    data = [(torch.randn(n, 2, 6, 6), torch.arange(n) % 4) for n in (5, 3, 1, 6)]
    return model, data


@pytest.mark.parametrize("budget", [0, 4000])
def test_everything_is_that_of_samples_in_memory(budget: int, folder: Path) -> None:
    model, data = problem()
    whole = hk.layer_hessians(model, data, CE, bias="joint")
    found = hk.layer_hessians(model, data, CE, bias="joint", memory_budget=budget, spill="disk")
    factors = hk.kronecker_factors(model, data, CE, bias="joint")
    assert any(H.spilled for H in found.values())
    assert all(H.spilled for H in found.values()) == (budget == 0)
    assert list(folder.glob("hesskern-spill-*/*.samples"))
    for name, H in whole.items():
        spilt = found[name]
        assert spilt.cached
        v = torch.randn(H.shape[0], 3)
        torch.testing.assert_close(spilt @ v, H @ v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spilt.to_dense(), H.to_dense(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(spilt.diagonal(), H.diagonal(), rtol=1e-5, atol=1e-6)
        assert spilt.trace() == pytest.approx(H.trace(), rel=1e-6)
        K = factors[name].operator()
        assert spilt.inner(K) == pytest.approx(H.inner(K), rel=1e-5)
        torch.testing.assert_close(spilt.diagonal_in(K), H.diagonal_in(K), rtol=1e-4, atol=1e-6)
        B = factors[name].input_covariance
        expected = H.contract_inputs(B)
        torch.testing.assert_close(spilt.contract_inputs(B), expected, rtol=1e-4, atol=1e-5)
        top = hk.eigsh(spilt, 3).values
        torch.testing.assert_close(top, hk.eigsh(H, 3).values, rtol=1e-4, atol=1e-6)


def test_several_batches_lie_in_several_files(folder: Path) -> None:
    model, data = problem()
    H = hk.layer_hessians(model, data, CE, memory_budget=0, spill="disk")
    files = list(folder.glob("*/*.samples"))
    assert len(files) > len(H)


def test_layers_together_hold_what_one_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    data = [(torch.randn(2, 6), torch.arange(2)) for _ in range(8)]
    alive: list[SpilledSamples] = []
    most = 0
    add = SpilledSamples.add

    def watched(self: SpilledSamples, piece: SampleRows) -> None:
        nonlocal most
        if not any(self is other for other in alive):
            alive.append(self)
        most = max(most, sum(other.waiting for other in alive))
        add(self, piece)

    monkeypatch.setattr(SpilledSamples, "add", watched)
    found = hk.layer_hessians(model, data, CE, memory_budget=0, spill="disk")
    assert 0 < most <= 2**12
    for name, H in hk.layer_hessians(model, data, CE).items():
        torch.testing.assert_close(found[name].to_dense(), H.to_dense(), rtol=1e-5, atol=1e-6)


def test_the_model_does_not_run_again() -> None:
    model, data = problem()
    H = hk.layer_hessians(model, data, CE, memory_budget=0, spill="disk")
    runs: list[Any] = []
    model.register_forward_hook(lambda *given: runs.append(given))
    for layer in H.values():
        layer @ torch.randn(layer.shape[0])
    assert not runs


def test_data_that_can_be_iterated_only_once() -> None:
    model, data = problem()
    once = hk.layer_hessians(model, iter(data), CE, memory_budget=0, spill="disk")
    whole = hk.layer_hessians(model, data, CE)
    for name, H in whole.items():
        torch.testing.assert_close(once[name].to_dense(), H.to_dense(), rtol=1e-5, atol=1e-6)


def test_files_go_with_the_hessians(folder: Path) -> None:
    model, data = problem()
    found = hk.layer_hessians(model, data, CE, memory_budget=0, spill="disk")
    copy = pickle.loads(pickle.dumps(found))
    v = {name: torch.randn(H.shape[0]) for name, H in found.items()}
    expected = {name: H @ v[name] for name, H in found.items()}
    del found
    gc.collect()
    assert not list(folder.glob("hesskern-spill-*"))
    for name, H in copy.items():
        torch.testing.assert_close(H @ v[name], expected[name])


def test_what_fails_leaves_no_files(folder: Path) -> None:
    model, data = problem()
    bad = [*data, (torch.full((2, 2, 6, 6), torch.nan), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="NaN"):
        hk.layer_hessians(model, bad, CE, memory_budget=0, spill="disk")
    gc.collect()
    assert not list(folder.glob("hesskern-spill-*"))


def test_a_full_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def tell(self) -> int:
            return 0

        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", Full)
    model, data = problem()
    with pytest.raises(OSError, match=r"spill: samples cannot be written to .*TMPDIR.*No space"):
        hk.layer_hessians(model, data, CE, memory_budget=0, spill="disk")
    gc.collect()
    assert not list(folder.glob("hesskern-spill-*"))


def pieces() -> list[SampleRows]:
    generator = torch.Generator().manual_seed(0)
    return [
        SampleRows(
            torch.randn(n, 3, generator=generator), torch.randn(n, 2, 4, generator=generator)
        )
        for n in (300, 5, 700, 2)
    ]


def assert_samples(found: list[SampleRows], given: list[SampleRows]) -> None:
    for name in ("x", "s"):
        whole = torch.cat([getattr(piece, name) for piece in found])
        assert torch.equal(whole, torch.cat([getattr(piece, name) for piece in given]))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_pieces_come_back_to_a_device(place: Spill) -> None:
    played()
    given, device = pieces(), OnDevice(torch.zeros(1)).device
    samples = SpilledSamples(place, device)
    for piece in given:
        samples.add(SampleRows(OnDevice(piece.x), OnDevice(piece.s)))
    samples.finish()
    for _ in range(2):
        found = list(samples())
        assert len(found) > 1
        assert all(piece.x.device == piece.s.device == device for piece in found)
        host = [SampleRows(fetched(piece.x), fetched(piece.s)) for piece in found]
        assert_samples(host, given)


def fetched(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, OnDevice)
    return tensor.inner


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_on_a_gpu(place: Spill, device: str) -> None:
    model, data = problem()
    whole = hk.layer_hessians(model, data, CE)
    found = hk.layer_hessians(model.to(device), data, CE, memory_budget=0, spill=place)
    for name, H in found.items():
        assert H.spilled
        v = torch.randn(H.shape[0], 3)
        torch.testing.assert_close((H @ v.to(device)).cpu(), whole[name] @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spill": "tape"}, "spill must be None, 'cpu' or 'disk', got 'tape'"),
        ({"spill": "cpu"}, "spill='cpu' takes samples from a GPU"),
        ({"spill": "disk", "tolerance": 0.1}, "tolerance=0.1"),
        ({"spill": "disk", "checkpoint": "file"}, "checkpoint"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model, data = problem()
    with pytest.raises(ValueError, match=message):
        hk.layer_hessians(model, data, CE, **options)
