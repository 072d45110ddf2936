"""kronecker_factors goes on from its checkpoint, and ends at the bits of an uninterrupted pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CE, Attention, Between, ResidualConv, classes, randn, seeded
from resumed import Seen, bits, broken_off
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hesskern as hk

BATCHES = 5


def batches(*shape: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Batches of 3 samples, the last of 2."""
    return [
        (randn(n, *shape, seed=i, dtype=dtype), classes(n, c=3, seed=i))
        for i, n in enumerate([3] * (BATCHES - 1) + [2])
    ]


def weighted() -> list[tuple[Tensor, ...]]:
    given = batches(4)
    return [(x, y, randn(len(x), seed=i).abs().float()) for i, (x, y) in enumerate(given)]


def model(kind: Callable[[], nn.Module] | None = None) -> nn.Module:
    return seeded(Between(torch.relu) if kind is None else kind()).float()


class Tied(nn.Module):
    """A head that shares its weight with an embedding, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).mean(1)))


def looked_up() -> list[tuple[Tensor, Tensor]]:
    return [(classes(3, 5, c=3, seed=i), classes(3, c=3, seed=i)) for i in range(BATCHES)]


def padded(inputs: Tensor) -> Tensor:
    return (inputs[..., 0] > -1).float()


CASES: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "exact": lambda: (model(), batches(4), {}),
    "drawn": lambda: (model(), batches(4), {"output": "mc", "mc_samples": 2, "seed": 3}),
    "float64": lambda: (model().double(), batches(4, dtype=torch.float64), {}),
    "bfloat16": lambda: (model().bfloat16(), batches(4, dtype=torch.bfloat16), {}),
    "images": lambda: (model(ResidualConv), batches(2, 5, 5), {"bias": "joint"}),
    "diagonals": lambda: (model(Tied), looked_up(), {"diagonal": True}),
    "large": lambda: (model(), batches(4), {"diagonal": True, "max_outputs": 4}),
    "weights in the data": lambda: (model(), weighted(), {"output": "empirical"}),
    "weights": lambda: (model(), batches(4), {"sample_weight": randn(14).abs()}),
    "masks": lambda: (model(Attention), batches(4, 4), {"position_mask": padded}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("after", [1, 3, BATCHES])
def test_bits(case: str, after: int, tmp_path: Path) -> None:
    net, data, settings = CASES[case]()
    call = partial(hk.kronecker_factors, net, data, CE, **settings)
    whole = bits(call(), tmp_path)
    path = tmp_path / "pass.checkpoint"
    broken_off(call, path, after)
    seen = Seen()
    assert bits(call(checkpoint=path, progress=seen), tmp_path) == whole
    # The progress callback broke behind the batch's end, when its state was there.
    assert [done for _, done in seen] == list(range(after + 1, BATCHES + 1))
    assert not path.exists()


def test_broken_off_again_and_again(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    call = partial(hk.kronecker_factors, net, data, CE, output="mc")
    for after in range(1, BATCHES + 1):
        broken_off(call, path, after)
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


def test_seen_batches_do_not_run(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    call = partial(hk.kronecker_factors, net, data, CE)
    broken_off(call, path, 3)
    given: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    call(checkpoint=path)
    assert given
    # Nothing of the first three batches, however often one of the others ran.
    assert all(any(torch.equal(x, batch) for batch, _ in data[3:]) for x in given)


def test_data_that_come_once(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"

    def call(**how: Any) -> hk.Factors:
        return hk.kronecker_factors(net, iter(data), CE, **how)

    broken_off(call, path, 2)
    assert bits(call(checkpoint=path), tmp_path) == bits(call(), tmp_path)


def test_a_state_is_written_by_a_clock_that_does_not_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", lambda: 1e9 * (-1) ** len(written))
    path = tmp_path / "pass.checkpoint"
    written: list[bytes] = []

    def progress(description: str, done: int, total: int | None) -> None:
        now[0] += 25
        written.append(path.read_bytes() if path.exists() else b"")

    hk.kronecker_factors(model(), batches(4) * 2, CE, checkpoint=path, progress=progress)
    # At 175 seconds, behind the fourth batch, and at 250, behind the seventh.
    assert written[:3] == [b""] * 3
    assert written[2] != written[3] == written[4] == written[5]
    assert written[5] != written[6] == written[7] == written[8] != written[9]


class Noisy(Dataset[tuple[Tensor, int]]):
    """Samples with noise of torch's, Python's and numpy's global generators."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import random

        noise = random.random() + float(np.random.rand())
        return torch.full((4,), float(index)) + torch.rand(4) + noise, index % 3


def shuffling(generator: torch.Generator | None = None) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [False, True])
def test_shuffling_loaders_come_in_the_same_order(own: bool, tmp_path: Path) -> None:
    import random

    net, path = model(), tmp_path / "pass.checkpoint"

    def call(seed: int, **how: Any) -> hk.Factors:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        generator = torch.Generator().manual_seed(seed) if own else None
        return hk.kronecker_factors(net, shuffling(generator), CE, **how)

    whole = bits(call(0), tmp_path)
    left = torch.get_rng_state()
    broken_off(partial(call, 0), path, 3)
    # Another process would stand elsewhere.
    assert bits(call(1, checkpoint=path), tmp_path) == whole
    assert torch.equal(torch.get_rng_state(), left)
    assert bits(call(1), tmp_path) != whole


def test_workers_of_a_loader(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"

    def call(seed: int, **how: Any) -> hk.Factors:
        torch.manual_seed(seed)
        data = DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2)
        return hk.kronecker_factors(net, data, CE, **how)

    broken_off(partial(call, 0), path, 3)
    assert bits(call(1, checkpoint=path), tmp_path) == bits(call(0), tmp_path)


def test_no_state_without_a_checkpoint(here: Path) -> None:
    hk.kronecker_factors(model(), batches(4), CE, checkpoint_every=0)
    assert list(here.iterdir()) == []


def test_a_batch_that_fails_leaves_the_states_before_it(tmp_path: Path) -> None:
    net, data, path = model(), batches(4), tmp_path / "pass.checkpoint"
    bad = [*data[:3], (data[3][0] * torch.nan, data[3][1]), data[4]]
    with pytest.raises(ValueError, match="batch 3"):
        hk.kronecker_factors(net, bad, CE, checkpoint=path, checkpoint_every=0)
    whole = bits(hk.kronecker_factors(net, data, CE), tmp_path)
    assert bits(hk.kronecker_factors(net, data, CE, checkpoint=path), tmp_path) == whole


def test_an_iterable_that_is_a_function(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "pass.checkpoint"

    def drawn() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(BATCHES):
            yield torch.randn(3, 4), classes(3, c=3, seed=i)

    def call(seed: int, **how: Any) -> hk.Factors:
        torch.manual_seed(seed)
        return hk.kronecker_factors(net, drawn(), CE, **how)

    broken_off(partial(call, 0), path, 2)
    assert bits(call(5, checkpoint=path), tmp_path) == bits(call(0), tmp_path)
