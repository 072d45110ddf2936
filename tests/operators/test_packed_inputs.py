"""Inputs that a layer's Hessian keeps packed between products, with a stand-in for the packing.

Only a GPU packs anything; tests/test_large_operators.py has the numbers.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import CE, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk
from hesskern import ops
from hesskern.operators import packed_inputs, samples
from hesskern.passes import memory


class Watch:
    """Packs into tensors that products must be passed, and takes down who calls with what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed: list[tuple[Tensor, int]] = []
        self.made: list[Tensor] = []
        self.passed: list[Tensor | None] = []
        self.inputs: list[Tensor] = []
        self.make: Callable[[Tensor], Tensor] = lambda x: torch.zeros(x.numel(), dtype=torch.int32)
        self._product = ops.layer_hessian_matmul
        monkeypatch.setattr(ops, "pack_layer_inputs", self._pack)
        monkeypatch.setattr(ops, "layer_hessian_matmul", self._multiply)

    def _pack(self, x: Tensor, columns: int) -> Tensor:
        self.packed.append((x, columns))
        self.made.append(self.make(x))
        return self.made[-1]

    def _multiply(
        self, x: Tensor, s: Tensor, V: Tensor, alpha: float, packed: Tensor | None
    ) -> Tensor:
        self.inputs.append(x)
        self.passed.append(packed)
        return self._product(x, s, V, alpha)

    def of(self, product: Callable[[], Any]) -> list[Tensor | None]:
        """What the operator was passed during a product."""
        self.passed.clear()
        self.inputs.clear()
        product()
        return list(self.passed)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def plain() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)))


def images() -> nn.Module:
    return seeded(
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    )


def hessian(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Of three batches that are not joined."""
    monkeypatch.setattr(samples, "_JOINED_BYTES", {"cpu": 0})
    data = [(randn(n, 3, seed=n), classes(n, c=4, seed=n)) for n in (4, 7, 5)]
    return hk.layer_hessians(plain(), data, CE, **options)["0"]


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.2}, {"sample_weight": randn(16).abs()}])
def test_made_once_at_the_second_product(
    options: dict[str, Any], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = hessian(monkeypatch, **options)
    v = randn(15)
    expected = H.to_dense() @ v
    first = watch.of(lambda: H @ v)
    assert first == [None] * len(first)
    assert len(first) >= 2
    assert not watch.packed
    for _ in range(3):
        passed = watch.of(lambda: torch.testing.assert_close(H @ v, expected))
        assert len(passed) == len(watch.made) == len(first)
        assert all(one is other for one, other in zip(passed, watch.made, strict=True))
        # Each with the inputs that it was made of.
        assert [x for x, _ in watch.packed] == watch.inputs
    assert {columns for _, columns in watch.packed} == {5}


@pytest.mark.parametrize("name", ["0", "3"])
def test_groups_and_positions(name: str, watch: Watch) -> None:
    data = [(randn(n, 2, 6, 6, seed=n), classes(n, c=3, seed=n)) for n in (4, 7)]
    H = hk.layer_hessians(images(), data, CE)[name]
    V = randn(H.shape[0], 3)
    expected = H.to_dense() @ V
    for _ in range(3):
        torch.testing.assert_close(H @ V, expected)
    assert len(watch.packed) == 1
    assert watch.passed[-1] is watch.made[0]


def test_wider_products_try_again_where_there_was_nothing(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = hessian(monkeypatch)
    watch.make = lambda x: torch.zeros(0, dtype=torch.int32)
    for width in (1, 1, 1, 2, 4, 4, 3, 1):
        H @ randn(15, width)
    tried = [columns for _, columns in watch.packed]
    assert tried == [5] * 3 + [10] * 3 + [20] * 3
    watch.make = lambda x: torch.ones(1, dtype=torch.int32)
    H @ randn(15, 5)
    assert len(watch.packed) == 12
    H @ randn(15, 6)
    assert len(watch.packed) == 12


def test_without_room(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    H = hessian(monkeypatch)
    asked = []

    def room(nbytes: int, device: torch.device) -> bool:
        asked.append((nbytes, device))
        return nbytes <= 8 * 3 * 5

    monkeypatch.setattr(packed_inputs, "has_room", room)
    v = randn(15)
    for _ in range(3):
        passed = watch.of(lambda: H @ v)
    # Of 4, 7 and 5 samples; nobody asks twice.
    assert asked == [(8 * 3 * n, torch.device("cpu")) for n in (4, 7, 5)]
    assert [one is None for one in passed] == [False, True, False]


def test_memory_that_runs_out_is_no_error(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    H = hessian(monkeypatch)
    v = randn(15)
    expected = H @ v

    def fail(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    watch.make = fail
    for _ in range(3):
        assert watch.of(lambda: torch.testing.assert_close(H @ v, expected)) == [None] * 3
    assert len(watch.packed) == 3


@pytest.mark.parametrize("way", [lambda H: pickle.loads(pickle.dumps(H)), copy.deepcopy])
def test_copies_begin_anew(
    way: Callable[[Any], Any], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = hessian(monkeypatch)
    v = randn(15)
    size = len(pickle.dumps(H))
    H @ v
    H @ v
    assert len(pickle.dumps(H)) == size
    twin = way(H)
    assert watch.of(lambda: twin @ v) == [None] * 3
    made = len(watch.made)
    assert None not in watch.of(lambda: twin @ v)
    assert len(watch.made) == made + 3
    # What it was copied from goes on as before.
    assert None not in watch.of(lambda: H @ v)
    assert len(watch.made) == made + 3


def test_inputs_changed_in_place_are_packed_anew(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = hessian(monkeypatch)
    v = randn(15)
    H @ v
    H @ v
    watch.packed[1][0].mul_(2)
    first, second, third = watch.of(lambda: H @ v)
    assert (first, second, third) == (watch.made[0], None, watch.made[2])
    assert watch.of(lambda: H @ v)[1] is watch.made[3]


def test_samples_that_are_not_stored(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    H = hessian(monkeypatch, memory_budget=0)
    assert not H.cached
    for _ in range(3):
        assert set(watch.of(lambda: H @ randn(15))) == {None}
    assert not watch.packed


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert memory.has_room(2**60, cpu)
    sizes = {"reserved_bytes": 300, "allocated_bytes": 100}
    known = {name: {"all": {"current": size}} for name, size in sizes.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: known)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    # A quarter of the 1,200 that are free.
    assert memory.has_room(300, gpu)
    assert not memory.has_room(301, gpu)
    # A quarter of 4,400 stays free.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4400))
    assert memory.has_room(100, gpu)
    assert not memory.has_room(101, gpu)
