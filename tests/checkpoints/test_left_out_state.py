"""Seen batches are left out only where nothing that makes samples has changed since the first."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CE, Between, randn, seeded
from resumed import bits, broken_off
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

import hesskern as hk
from hesskern.passes.data_set_state import state_digest

# The samples of one batch, which the data set's state is not looked at behind, are drawn.
N, SIZE, AFTER, DRAWN = 36, 3, 6, range(15, 18)


class Samples(Dataset[tuple[Tensor, int]]):
    """Samples, some of which are multiplied."""

    def __init__(self) -> None:
        self.x = randn(N, 4, seed=0, dtype=torch.float32)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index] * self.factor(index), index % 3

    def factor(self, index: int) -> float:
        return 1.0


class Seldom(Samples):
    """Draws for one batch, and again for each that comes later than all that a checkpoint saw."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = random.Random(1)

    def factor(self, index: int) -> float:
        return self.drawn.random() if index in DRAWN or index >= AFTER * SIZE else 1.0


class OfClass(Samples):
    """Draws from a generator that belongs to the class."""

    drawn = random.Random(1)

    def factor(self, index: int) -> float:
        return self.drawn.random() if index < 3 or index > 20 else 1.0


class Every:
    """An augmentation that counts what it has seen."""

    count = 0

    def __call__(self) -> float:
        self.count += 1
        return 2.0 if self.count % 12 == 0 else 1.0


EVERY = Every()


class OfModule(Samples):
    """Asks an object of the module."""

    def factor(self, index: int) -> float:
        return EVERY()


class FourthBatch:
    """Another way to make batches of samples: the fourth is twice as large."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, samples: Any) -> Any:
        self.count += 1
        x, y = default_collate(samples)
        return x * 2 if self.count % 4 == 0 else x, y


def model() -> nn.Module:
    return seeded(Between(torch.relu)).float()


def check(make: Callable[[], Any], folder: Path) -> None:
    """A pass that was broken off ends at the bits of a whole one."""

    def call(**how: Any) -> hk.Factors:
        OfClass.drawn.seed(2)
        EVERY.count = 0
        return hk.kronecker_factors(model(), make(), CE, **how)

    whole = bits(call(), folder)
    path = folder / "pass.checkpoint"
    broken_off(call, path, AFTER)
    assert bits(call(checkpoint=path), folder) == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Samples, Seldom, OfClass, OfModule])
def test_data_sets(kind: type[Samples], workers: int, tmp_path: Path) -> None:
    check(lambda: DataLoader(kind(), SIZE, num_workers=workers), tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_how_batches_are_made_of_samples(workers: int, tmp_path: Path) -> None:
    make = partial(DataLoader, Samples(), SIZE, num_workers=workers)
    check(lambda: make(collate_fn=FourthBatch()), tmp_path)


def test_parts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(40.0))
    whole = np.load(path, mmap_mode="r")
    found = {state_digest(part) for part in (whole[:9], whole[9:18], whole[1:10], whole[1:])}
    assert None not in found
    assert len(found) == 4
    assert state_digest(whole[9:18]) == state_digest(np.load(path, mmap_mode="r")[9:][:9])


@pytest.mark.parametrize("turned", [False, True])
def test_arrays_are_looked_at_where_they_lie(turned: bool) -> None:
    array = np.zeros((2048, 2048))
    held = {"x": array[:, ::2] if turned else array}
    least = array.nbytes // 4
    state_digest(0)
    tracemalloc.start()
    assert state_digest(held, largest=least) is None
    if not turned:
        assert state_digest(held) is not None
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < least
    if not turned:
        before = state_digest(held)
        array[3, 5] = 1
        assert state_digest(held) != before
