"""Random numbers of a pass: known answers, distribution, and whose they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from drawn_rows import philox as slow_philox
from drawn_rows import uniform_numbers
from scipy import stats

from hesskern.passes.draws import Draws, check_seed, philox
from hesskern.passes.sample_numbers import Numbers


def of(values: list[int] | np.ndarray, part: int = 0) -> Numbers:
    return Numbers(np.asarray(values, dtype=np.int64), part)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(
    counter: list[int], key: tuple[int, int], expected: str
) -> None:
    """kat_vectors of Random123 1.14, philox4x32 of 10 rounds."""
    assert " ".join(f"{word:08x}" for word in slow_philox(counter, key)) == expected
    counters = np.array([[word, 5, word] for word in counter], dtype=np.uint32)
    words = philox(counters, key)
    for column in (0, 2):
        assert " ".join(f"{int(word):08x}" for word in words[:, column]) == expected
    assert not np.array_equal(words[:, 0], words[:, 1])


@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1, 2**33])
@pytest.mark.parametrize(("stream", "part"), [(0, 0), (3, 0), (2**32 + 1, 5)])
def test_numbers_are_those_of_the_counter(seed: int, stream: int, part: int) -> None:
    samples = [0, 5, 2**32 + 3, 2**62, 5]
    found = Draws(seed, stream).of(of(samples, part)).uniform(5)
    for sample, row in zip(samples, found.tolist(), strict=True):
        assert row == uniform_numbers(seed, sample, 5, stream, max(part - 1, 0))


def test_calls_go_on_inside_each_sample() -> None:
    numbers = of(np.arange(7))
    whole = Draws(3).of(numbers).uniform(23)
    assert whole.dtype == torch.float64
    for counts in ([1, 22], [5, 2, 16], [1] * 23, [0, 23, 0], [2, 3, 4, 5, 9]):
        each = Draws(3).of(numbers)
        assert torch.equal(torch.cat([each.uniform(count) for count in counts], 1), whole)
    tokens = Draws(3).of(numbers).uniform(2, 10)
    assert torch.equal(tokens, whole[:, :20].reshape(70, 2))
    normal = Draws(3).of(numbers)
    normal.uniform(3)
    ahead = normal.normal(20)
    assert np.allclose(stats.norm.cdf(ahead), whole[:, 3:], rtol=1e-12)


def test_many_blocks_are_those_of_few() -> None:
    whole = Draws(0).of(of(np.arange(300))).uniform(333)
    some = Draws(0).of(of([299, 0, 17])).uniform(400)[:, :333]
    assert torch.equal(whole[[299, 0, 17]], some)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_none(shape: tuple[int, int]) -> None:
    n, count = shape
    draws = Draws(0).of(of(np.arange(n)))
    assert list(draws.uniform(count).shape) == list(draws.normal(count).shape) == [n, count]


def test_seeds_streams_and_parts_are_others() -> None:
    found = [
        Draws(seed, stream).of(of([4], part)).uniform(4)[0].tolist()
        for seed, stream, part in itertools.product((0, 1, -1), (0, 1, 2), (0, 2, 3))
    ]
    assert len({number for row in found for number in row}) == 4 * len(found)
    # Positions in all of the data are drawn as samples of these numbers.
    assert torch.equal(Draws(0).of(of([4], 1)).uniform(4), Draws(0).of(of([4])).uniform(4))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_distribution(kind: str) -> None:
    """Along samples, inside a sample, along streams and along seeds; none depends on another."""
    distribution = stats.uniform if kind == "uniform" else stats.norm

    def drawn(draws: Draws, samples: int, count: int) -> np.ndarray:
        return getattr(draws.of(of(np.arange(samples))), kind)(count).numpy()

    ways = {
        "samples": drawn(Draws(0), 20000, 1)[:, 0],
        "inside": drawn(Draws(0), 1, 20000)[0],
        "streams": np.concatenate([drawn(Draws(0, s), 10, 1)[:, 0] for s in range(2000)]),
        "seeds": np.concatenate([drawn(Draws(s), 10, 1)[:, 0] for s in range(2000)]),
    }
    for way, values in ways.items():
        assert stats.kstest(values, distribution.cdf).pvalue > 1e-4, way
        ranks = values.argsort().argsort()
        for lag in (1, 2, 10):
            correlation = np.corrcoef(ranks[lag:], ranks[:-lag])[0, 1]
            assert abs(correlation) < 5 / len(values) ** 0.5, (way, lag)
    # Pairs in one sample, and of neighbouring samples, fill the square evenly.
    table = drawn(Draws(1), 20000, 4)
    for one, two in ((table[:, 0], table[:, 1]), (table[:-1, 3], table[1:, 0])):
        u, v = (distribution.cdf(values) for values in (one, two))
        counts = np.histogram2d(u, v, bins=10, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_ends_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither 0 nor 1, and normal numbers that are finite."""
    for word, expected in ((0, 2.0**-53), (2**32 - 1, 1 - 2.0**-53)):

        def constant(counter: np.ndarray, keys: object, word: int = word) -> np.ndarray:
            return np.full(counter.shape, word, dtype=np.uint32)

        monkeypatch.setattr("hesskern.passes.draws._philox", constant)
        draws = Draws(0).of(of([0]))
        assert float(draws.uniform(1)) == expected
        assert 8 < abs(float(draws.normal(1))) < 9


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seeds_beyond_64_bits_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed must lie in \[-2\*\*63, 2\*\*64\), got"):
        check_seed(seed)
