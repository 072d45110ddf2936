"""Batches of a loader that a pass has seen: which are loaded again, and the bits at the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CE, Between, randn, seeded
from resumed import bits, broken_off
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

import hesskern as hk

N, SIZE, AFTER = 29, 3, 7
Sample = tuple[Tensor, int]


class Logged(Dataset[Sample]):
    """Samples that write down, in a file that workers share, that they were loaded."""

    def __init__(self, log: Path, seed: int = 0) -> None:
        self.log, self.x = log, randn(N, 4, seed=seed, dtype=torch.float32)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Sample:
        with self.log.open("a") as file:
            file.write(f"{int(index)}\n")
        return self.noisy(self.x[index]), int(index) % 3

    def noisy(self, x: Tensor) -> Tensor:
        return x


class Torch(Logged):
    def noisy(self, x: Tensor) -> Tensor:
        return x + torch.rand(4)


class Python(Logged):
    def noisy(self, x: Tensor) -> Tensor:
        return x * random.random()


class Numpy(Logged):
    def noisy(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand())


class OwnGenerator(Logged):
    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.drawn = np.random.default_rng(5)

    def noisy(self, x: Tensor) -> Tensor:
        return x * float(self.drawn.random())


class Counting(Logged):
    """Other samples from the twelfth on."""

    count = 0

    def noisy(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * (2 if self.count > 11 else 1)


class Seldom(Logged):
    """Draws for one sample in seven."""

    def noisy(self, x: Tensor) -> Tensor:
        return x + torch.rand(4) if float(x[0]) > 1 else x


MODULE_DRAWS = random.Random(3)


class OfModule(Logged):
    def noisy(self, x: Tensor) -> Tensor:
        return x * MODULE_DRAWS.random()


class Unknown(Logged):
    """With an attribute that cannot be looked at."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.steps = (i for i in range(100))


class Drawing:
    """A sampler that draws every index when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        return (int(torch.randint(N, ())) for _ in range(N))

    def __len__(self) -> int:
        return N


def model() -> nn.Module:
    return seeded(Between(torch.relu)).float()


def loaded(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def resumed(make: Callable[[], Any], log: Path, after: int = AFTER) -> tuple[bytes, bytes, int]:
    """The bits of a whole pass and of one that was broken off, and what the end of that loaded."""
    path = log.parent / "pass.checkpoint"

    def call(seed: int, **how: Any) -> hk.Factors:
        for seeding in (torch.manual_seed, random.seed, np.random.seed, MODULE_DRAWS.seed):
            seeding(seed)
        return hk.kronecker_factors(model(), make(), CE, **how)

    whole = bits(call(0), log.parent)
    left = torch.get_rng_state(), random.getstate()
    broken_off(partial(call, 0), path, after)
    log.unlink(missing_ok=True)
    # The seed of the module's generator is no state that a checkpoint keeps.
    torch.manual_seed(99)
    MODULE_DRAWS.seed(0)
    random.seed(99)
    found = hk.kronecker_factors(model(), make(), CE, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), left[0])
    assert random.getstate() == left[1]
    return whole, bits(found, log.parent), len(loaded(log))


LEFT_OUT: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "workers": {"shuffle": True, "num_workers": 2},
    "three workers": {"num_workers": 3, "prefetch_factor": 4},
    "own generator": {"shuffle": True, "generator": 1},
    "own generator, workers": {"shuffle": True, "generator": 1, "num_workers": 2},
    "with replacement": {"sampler": RandomSampler(range(N), replacement=True, num_samples=40)},
    "weighted": {"sampler": WeightedRandomSampler(torch.ones(N).tolist(), N)},
    "drawn one by one": {"sampler": Drawing()},
    "drawn one by one, workers": {"sampler": Drawing(), "num_workers": 2},
    "lists": {"batch_size": 1, "batch_sampler": [[i, i + 1] for i in range(0, N - 1, 2)]},
    "the last dropped": {"drop_last": True, "shuffle": True},
}


def loader(dataset: Any, generator: int | None = None, **how: Any) -> DataLoader[Any]:
    if generator is not None:
        how["generator"] = torch.Generator().manual_seed(generator)
    return DataLoader(dataset, **{"batch_size": SIZE, **how})


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("case", LEFT_OUT)
def test_left_out(case: str, tmp_path: Path) -> None:
    how, log = LEFT_OUT[case], tmp_path / "log"
    make = partial(loader, Logged(log), **how)
    sizes = [len(indices) for indices in make().batch_sampler or ()]
    workers = how.get("num_workers", 0)
    # Each worker one of those before; they lie in the same hands as before.
    first = AFTER - 1 if not workers else (AFTER - workers) // workers * workers
    whole, found, count = resumed(make, log)
    assert found == whole
    assert count == sum(sizes[first:])


def test_of_a_part(tmp_path: Path) -> None:
    log = tmp_path / "log"
    part = Subset(Logged(log), list(range(N - 1, 3, -1)))
    whole, found, count = resumed(lambda: loader(part, shuffle=True), log)
    assert (found, count) == (whole, len(part) - (AFTER - 1) * SIZE)


@pytest.mark.parametrize("after", [1, 2, 10])
@pytest.mark.parametrize("workers", [0, 2])
def test_anywhere(after: int, workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    make = partial(loader, Logged(log), shuffle=True, num_workers=workers)
    whole, found, _ = resumed(make, log, after)
    assert found == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "kind", [Torch, Python, Numpy, OwnGenerator, Counting, Seldom, OfModule, Unknown]
)
def test_all_are_loaded(kind: type[Logged], workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    whole, found, count = resumed(lambda: loader(kind(log), shuffle=True, num_workers=workers), log)
    assert found == whole
    assert count == N


@pytest.mark.parametrize("kind", [Logged, Torch])
def test_workers_that_persist(kind: type[Logged], tmp_path: Path) -> None:
    log = tmp_path / "log"
    how = {"shuffle": True, "num_workers": 2, "persistent_workers": True}
    whole, found, count = resumed(lambda: loader(kind(log), **how), log)
    assert (found, count) == (whole, N)


def test_samples_of_another_kind_of_loader(tmp_path: Path) -> None:
    class Other(DataLoader[Any]):
        pass

    log = tmp_path / "log"
    whole, found, count = resumed(lambda: Other(Logged(log), SIZE), log)
    assert (found, count) == (whole, N)


def test_a_sampler_that_is_gone_through_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    whole, found, count = resumed(
        lambda: DataLoader(Logged(log), batch_sampler=iter([[i] for i in range(N)])), log
    )
    assert (found, count) == (whole, N)


def test_again_and_again(tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "pass.checkpoint"

    def call(**how: Any) -> hk.Factors:
        torch.manual_seed(2)
        data = loader(Logged(log), shuffle=True)
        return hk.kronecker_factors(model(), data, CE, output="mc", **how)

    whole = bits(call(), tmp_path)
    for after in range(1, 11):
        broken_off(call, path, after)
    log.unlink()
    assert bits(call(checkpoint=path), tmp_path) == whole
    assert len(loaded(log)) == N - 9 * SIZE


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["all", "first", "last"])
def test_other_samples_are_refused(where: str, workers: int, tmp_path: Path) -> None:
    path, log = tmp_path / "pass.checkpoint", tmp_path / "log"
    data = Logged(log)

    def call(dataset: Logged, **how: Any) -> hk.Factors:
        given = loader(dataset, num_workers=workers)
        return hk.kronecker_factors(model(), given, CE, **how)

    broken_off(partial(call, data), path, AFTER)
    other = Logged(log, seed=1 if where == "all" else 0)
    index = {"all": 0, "first": 0, "last": AFTER * SIZE - 1}[where]
    other.x[index] += 1
    with pytest.raises(ValueError, match=f"other data: batch {index // SIZE} is another one"):
        call(other, checkpoint=path)
    # The one it belongs to goes on.
    assert bits(call(data, checkpoint=path), tmp_path) == bits(call(data), tmp_path)


def test_another_order_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "pass.checkpoint", Logged(tmp_path / "log")
    order = list(range(N))

    def call(given: list[int], **how: Any) -> hk.Factors:
        return hk.kronecker_factors(model(), loader(data, sampler=given), CE, **how)

    broken_off(partial(call, order), path, AFTER)
    # Only the second batch is another one.
    order[3], order[4] = order[4], order[3]
    with pytest.raises(ValueError, match="other data: batch 1 is another one"):
        call(order, checkpoint=path)


class InFiles(Dataset[Sample]):
    """Samples of which the data set knows the names alone."""

    def __init__(self, folder: Path) -> None:
        self.names = [str(folder / f"{i}.pt") for i in range(N)]
        for i, name in enumerate(self.names):
            torch.save(randn(4, seed=i, dtype=torch.float32), name)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Sample:
        return torch.load(self.names[index]), index % 3


def test_what_is_noticed_of_files(tmp_path: Path) -> None:
    """As the README says: the last batch that was seen, not those that were left out."""
    path, folder = tmp_path / "pass.checkpoint", tmp_path / "files"
    folder.mkdir()
    data = InFiles(folder)
    call = partial(hk.kronecker_factors, model(), loader(data), CE)
    broken_off(call, path, AFTER)
    torch.save(randn(4, seed=99, dtype=torch.float32), data.names[AFTER * SIZE - 1])
    with pytest.raises(ValueError, match=f"batch {AFTER - 1} is another one"):
        call(checkpoint=path)


def test_ekfac_and_influence(tmp_path: Path) -> None:
    log, asked, path = (tmp_path / name for name in ("log", "asked", "pass.checkpoint"))

    def curvature(**how: Any) -> hk.EKFAC:
        torch.manual_seed(1)
        return hk.ekfac(model(), loader(Logged(log)), CE, **how)

    def scores(**how: Any) -> hk.Influence:
        torch.manual_seed(1)
        queries, train = loader(Logged(asked, seed=4)), loader(Logged(log))
        return hk.influence(None, model(), queries, train, CE, batch_size=2, **how)

    stages: dict[str, Callable[..., Any]] = {
        "Eigenvalue corrections": curvature,
        "Influence: samples": scores,
    }
    for stage, call in stages.items():
        whole = bits(call(), tmp_path)
        broken_off(call, path, AFTER, stage)
        log.unlink()
        asked.unlink(missing_ok=True)
        assert bits(call(checkpoint=path), tmp_path) == whole
        # Influence takes the samples two at a time, whatever batches they came in.
        assert set(loaded(log)) <= set(range((AFTER - 2) * SIZE, N))
    # Of the queries the last batch alone.
    assert loaded(asked) == list(range(N - N % SIZE, N))
