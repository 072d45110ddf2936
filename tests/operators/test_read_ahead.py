"""Files read ahead by a thread: all of them in order, errors by name, and no thread left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk
from hesskern.spill import raw_files
from hesskern.spill.raw_files import RawFile, own_folder, write_raw
from hesskern.spill.read_ahead import RING, read_ahead, ring_bytes


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3 * seed + 1, 5, generator=generator),
        torch.randn(0, 2, generator=generator),
        torch.randn(7, 301, generator=generator).bfloat16().T,
        torch.randn(1111 * seed, generator=generator, dtype=torch.float64),
    ]


def files(folder: Path, count: int = 7) -> list[RawFile]:
    return [write_raw(folder / f"{i}", tensors(i), "tensors") for i in range(count)]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hesskern-read-ahead"]


def equal(found: list[Tensor], given: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, given, strict=True))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("step", [raw_files._STEP, raw_files._PAGE])
def test_all_come_in_their_order(
    tmp_path: Path, direct: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)
    monkeypatch.setattr(raw_files, "_STEP", step)
    given = files(tmp_path)
    for i, found in enumerate(read_ahead(given)):
        assert equal(found, tensors(i))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found if tensor.numel())
    assert i == 6
    assert not readers()


def test_no_files() -> None:
    assert list(read_ahead([])) == []


def test_a_system_that_reads_into_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    for i, found in enumerate(read_ahead(files(tmp_path))):
        assert equal(found, tensors(i))


def test_a_file_system_that_cannot_read_past_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = os.open, os.preadv
    refused: list[Any] = []

    def open_first(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT and str(path).endswith("3"):
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    def read_first(file: int, *rest: Any) -> int:
        if len(refused) == 1:
            refused.append(file)
            raise OSError(22, "Invalid argument")
        return read(file, *rest)

    given = files(tmp_path)
    monkeypatch.setattr(os, "open", open_first)
    monkeypatch.setattr(os, "preadv", read_first)
    for i, found in enumerate(read_ahead(given)):
        assert equal(found, tensors(i))
    assert len(refused) == 2


def test_memory_is_that_of_a_few(tmp_path: Path) -> None:
    given = files(tmp_path)
    memory = set()
    for found in read_ahead(given):
        memory.add(found[0].untyped_storage().data_ptr())
    assert len(memory) <= RING
    assert ring_bytes(given) == RING * max(file.nbytes for file in given)
    assert ring_bytes(given[:1]) == given[0].nbytes


def test_only_a_few_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = files(tmp_path)
    read = RawFile.read
    begun: list[RawFile] = []

    def noted(self: RawFile, memory: Tensor) -> list[Tensor]:
        begun.append(self)
        return read(self, memory)

    monkeypatch.setattr(RawFile, "read", noted)
    for i, _ in enumerate(read_ahead(given)):
        assert len(begun) <= i + RING
    assert begun == given


def removed(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)


@pytest.mark.parametrize(
    ("damage", "message"), [(removed, "No such file"), (truncated, r"holds \d+ bytes of \d+")]
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    given = files(tmp_path)
    damage(given[4].path)
    reading = read_ahead(given)
    for i in range(4):
        assert equal(next(reading), tensors(i))
    with pytest.raises(OSError, match=f"spill: {given[4].path} cannot be read: .*{message}"):
        next(reading)
    assert not readers()


def test_whoever_stops_ends_the_thread(tmp_path: Path) -> None:
    given = files(tmp_path)
    for taken in range(4):
        reading = read_ahead(given)
        for _ in range(taken):
            next(reading)
        reading.close()
        assert not readers()


def test_ctrl_c_while_a_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = files(tmp_path)
    go_on = threading.Event()

    def slow(self: RawFile, memory: Tensor) -> list[Tensor]:
        if not go_on.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            go_on.wait(60)
        return []

    def interrupted(*_: Any) -> None:
        go_on.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(RawFile, "read", slow)
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(read_ahead(given))
    finally:
        signal.signal(signal.SIGINT, before)
    # One that was interrupted while it was being started ends by itself.
    for thread in readers():
        thread.join(60)
    assert not readers()


class Keeper:
    """Somebody that a folder goes with."""


def test_a_forked_process_leaves_the_folder_alone() -> None:
    keeper = Keeper()
    folder = own_folder(keeper)
    child = os.fork()
    if child == 0:
        del keeper
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    del keeper
    gc.collect()
    assert not folder.exists()


def spilled_hessian() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [(torch.randn(8, 6), torch.arange(8) % 3)]
    loss = nn.CrossEntropyLoss()
    H = hk.layer_hessians(model, data, loss, memory_budget=0, spill="disk")["0"]
    return H, torch.randn(H.shape[0])


def test_a_product_says_which_file_is_gone() -> None:
    H, v = spilled_hessian()
    (file, *_) = H._chunks._files
    file.path.unlink()
    with pytest.raises(OSError, match=f"spill: {file.path} cannot be read"):
        H @ v
    assert not readers()


def test_products_in_a_forked_process() -> None:
    H, v = spilled_hessian()
    expected = H @ v
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(H @ v, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(H @ v, expected)


def test_nobody_is_kept_alive() -> None:
    H, v = spilled_hessian()
    H @ v
    gone, folder = weakref.ref(H._chunks), H._chunks._folder
    del H
    gc.collect()
    assert gone() is None
    assert not folder.exists()
