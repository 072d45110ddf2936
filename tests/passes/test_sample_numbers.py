"""Numbers of samples, read off what a DataLoader draws, and draws that go by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from hesskern.passes.batches import batches, halves
from hesskern.passes.pieces import pieces
from hesskern.passes.sample_numbers import Numbers, Positions, numbered

N = 23


class Own(Dataset[Tensor]):
    """A sample is its own number."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.as_tensor(index) % N

    def __len__(self) -> int:
        return N


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(N))


class Wrapped(DataLoader[Any]):
    """A loader whose elements are not what its sampler draws."""

    def __iter__(self) -> Any:
        return (element + 1 for element in super().__iter__())


class Uneven(BatchSampler):
    """Batches of several sizes, in lists that it changes behind each."""

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in np.random.default_rng(0).permutation(N):
            batch.append(index)
            if len(batch) > index % 4:
                yield batch
                batch.clear()
        yield batch


class AsTensors(BatchSampler):
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield torch.tensor(batch)


SEQUENTIAL = SequentialSampler(range(N))
KNOWN = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 5, "shuffle": True},
    "last left out": {"batch_size": 5, "shuffle": True, "drop_last": True},
    "with a generator": {"shuffle": True, "generator": torch.Generator().manual_seed(1)},
    "with replacement": {"sampler": WeightedRandomSampler(torch.ones(N), 30), "batch_size": 4},
    "backwards": {"sampler": range(N - 1, -1, -1), "batch_size": 3},
    "from the end": {"sampler": range(-1, -N - 1, -1), "batch_size": 3},
    "batches of the sampler": {"batch_sampler": BatchSampler(RandomSampler(range(N)), 4, False)},
    "uneven": {"batch_sampler": Uneven(SEQUENTIAL, 1, False)},
    "tensors": {"batch_sampler": AsTensors(SEQUENTIAL, 3, False)},
    "batches as indices": {"sampler": BatchSampler(SEQUENTIAL, 4, False), "batch_size": None},
    "workers": {"batch_size": 2, "shuffle": True, "num_workers": 2},
    "workers far ahead": {"shuffle": True, "num_workers": 2, "prefetch_factor": 5},
}


class TestOfALoader:
    @pytest.mark.parametrize("name", KNOWN)
    def test_what_it_draws(self, name: str) -> None:
        loader: DataLoader[Any] = DataLoader(Own(), **KNOWN[name])
        before = copy.copy(vars(loader))
        for _ in range(2):
            count = 0
            for element, numbers in numbered(loader):
                assert numbers is not None
                assert numbers.known
                assert numbers.values.dtype == np.int64
                assert numbers.values.tolist() == element.tolist()
                count += len(element)
            assert count in (N, 30, N // 5 * 5)
        assert vars(loader) == before

    def test_of_subsets(self) -> None:
        inner = Subset(Own(), [5, 3, 8, 1, 20])
        loader = DataLoader(Subset(inner, torch.tensor([4, 0, -2])), batch_size=2, shuffle=True)
        found = []
        for element, numbers in numbered(loader):
            assert numbers is not None
            assert numbers.values.tolist() == element.tolist()
            found += element.tolist()
        assert sorted(found) == [1, 5, 20]

    def test_the_same_random_numbers_are_used(self) -> None:
        """A pass leaves torch's generator, and a loader's own, as it would without numbers."""
        for workers in (0, 1):
            own = torch.Generator().manual_seed(4)
            loader = DataLoader(Own(), 4, shuffle=True, num_workers=workers)
            of_its_own = DataLoader(Own(), 4, shuffle=True, generator=own)
            states = []
            for walk in (iter, lambda data: (element for element, _ in numbered(data))):
                torch.manual_seed(2)
                own.manual_seed(4)
                found = [e.tolist() for it in (loader, of_its_own) for e in walk(it)]
                states.append((found, torch.get_rng_state().tolist(), own.get_state().tolist()))
            assert states[0] == states[1]

    def test_workers_that_stay(self) -> None:
        loader = DataLoader(Own(), 3, shuffle=True, num_workers=2, persistent_workers=True)

        def workers() -> list[int]:
            assert loader._iterator is not None
            return [process.pid for process in loader._iterator._workers]

        def walk() -> None:
            for element, numbers in numbered(loader):
                assert numbers is not None
                assert numbers.values.tolist() == element.tolist()

        walk()
        first = workers()
        walk()
        # An epoch of its own in between, and one that is left early.
        assert sorted(int(i) for element in loader for i in element) == list(range(N))
        next(iter(numbered(loader)))
        walk()
        assert workers() == first
        assert loader._iterator is not None
        assert loader._iterator._index_sampler is loader.batch_sampler

    @pytest.mark.parametrize(
        "data",
        [
            [torch.arange(3)],
            DataLoader(Stream(), batch_size=4),
            Wrapped(Own(), batch_size=4),
            DataLoader(Own(), batch_size=None),
            DataLoader(Own(), batch_size=4, num_workers=1, in_order=False),
            DataLoader({"a": torch.zeros(1)}, sampler=["a"]),
        ],
        ids=["list", "stream", "own iteration", "single", "any order", "keys"],
    )
    def test_where_it_draws_none(self, data: Any) -> None:
        assert [numbers for _, numbers in numbered(data)] == [None for _ in data]


# From there to the batches


def pairs(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.stack(samples).double()
    return x[:, None], x


def numbers_of(data: Any, positions: Positions | None = None) -> list[tuple[int, list[int]]]:
    found = batches(data, torch.device("cpu"), positions=positions)
    return [(batch.numbers.part, batch.numbers.values.tolist()) for batch in found]


class TestOfBatches:
    def test_of_a_loader(self) -> None:
        data = DataLoader(Own(), 4, shuffle=True, collate_fn=pairs)
        for batch in batches(data, torch.device("cpu")):
            assert batch.numbers.known
            assert batch.numbers.values.tolist() == batch.targets.tolist()
            first, second = halves(batch)
            for half in (first, second):
                assert half.numbers.values.tolist() == half.targets.tolist()

    def test_positions(self) -> None:
        data = [(torch.zeros(n, 2), torch.zeros(n)) for n in (3, 0, 2, 1)]
        assert numbers_of(data) == [(1, [0, 1, 2]), (1, []), (1, [3, 4]), (1, [5])]
        positions = Positions(part=3, begin=2**40)
        assert numbers_of(data[2:], positions) == [(3, [2**40, 2**40 + 1]), (3, [2**40 + 2])]
        assert positions.next == 2**40 + 3

    def test_batches_that_lack_samples_are_numbered_apart(self) -> None:
        def dropping(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
            return pairs([sample for sample in samples if sample != 5])

        found = numbers_of(DataLoader(Own(), 4, collate_fn=dropping))
        assert [part for part, _ in found] == [0, 1 + 2**30, 0, 0, 0, 0]
        assert found[1][1] == [4, 5, 6]

    def test_of_pieces(self) -> None:
        data = DataLoader(Own(), 4, shuffle=True, collate_fn=pairs)
        found = list(pieces(batches(data, torch.device("cpu")), lambda _: 6))
        assert [piece.count for piece in found] == [6, 6, 6, 5]
        for piece in found:
            assert piece.batch.numbers.values.tolist() == piece.batch.targets.tolist()

    def test_pieces_end_where_the_kind_of_numbers_changes(self) -> None:
        def dropping(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
            return pairs([sample for sample in samples if sample != 5])

        data = DataLoader(Own(), 4, collate_fn=dropping)
        found = list(pieces(batches(data, torch.device("cpu")), lambda _: 9))
        assert [piece.count for piece in found] == [4, 3, 9, 6]
        assert [piece.batch.numbers.known for piece in found] == [True, False, True, True]

    def test_what_has_samples_elsewhere(self) -> None:
        numbers = Numbers(np.array([7, 8]), 1)
        inside = numbers.inside(3)
        assert inside.part == 1 + 2**30
        assert not set(inside.values) & set(Numbers(np.array([8, 9]), 1).inside(3).values)
        assert inside.inside(2).part == inside.part


def test_a_concatenation_is_numbered_through() -> None:
    data = ConcatDataset([Subset(Own(), range(3)), Subset(Own(), range(3, 8))])
    for element, numbers in numbered(DataLoader(data, 3, shuffle=True)):
        assert numbers is not None
        assert numbers.values.tolist() == element.tolist()
