"""Random numbers of a pass: each sample's own, whatever batch it comes in and whoever passes it.

A generator that is read in the order of the batches gives a sample other numbers when the data is
shuffled, cut otherwise or divided among processes. Here a number is a function of the seed, of the
sample's number and of its place among the sample's numbers alone: Philox4x32-10 (Salmon, Moraes,
Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", doi 10.1145/2063384.2063405),
which turns 128 bits of counter into 128 random bits under a key of 64.
"""

from __future__ import annotations

import sys
from itertools import cycle
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from hesskern.devices import on_host
from hesskern.passes.sample_numbers import Numbers

__all__ = ["Draws", "SampleDraws", "check_seed", "philox", "without_padding"]

_ROUNDS = 10
# Of the left and the right half of the counter.
_FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
# [10, 2, 1]: by how much the key's words have grown before every round.
_GROWN = np.arange(_ROUNDS, dtype=np.uint32)[:, None, None] * np.array(
    [[0x9E3779B9], [0xBB67AE85]], dtype=np.uint32
)

_LOW = 0 if sys.byteorder == "little" else 1
_WORD = 2**32
# Blocks at a time, which a processor's cache holds.
_TOGETHER = 2**13

_Array = np.ndarray[Any, np.dtype[Any]]


def check_seed(seed: Any) -> None:
    """Raises ValueError for what no seed of 64 bits is."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), got {seed}")


def without_padding(uniform: Tensor, labelled: Tensor) -> Tensor:
    """A sample's numbers given to its labelled tokens in their order, whatever stands around them.

    Args:
        uniform: [N T, r].
        labelled: [N, T] bool, on the same device.

    Returns:
        [N T, r]; those of tokens without a label mean nothing.
    """
    if on_host(labelled) and bool(labelled.all()):
        return uniform
    n, tokens = labelled.shape
    place = (labelled.cumsum(1) - 1).clamp_(min=0)
    place += torch.arange(n, device=place.device).unsqueeze(1) * tokens
    return uniform[place.flatten()]


def philox(counter: _Array, key: tuple[int, int]) -> _Array:
    """Philox4x32-10.

    Args:
        counter: [4, B] uint32, words of B counters, the lowest first.
        key: words of the key, each below 2^32.

    Returns:
        [4, B] uint32 random words.
    """
    return _philox(counter, _round_keys(key))


def _round_keys(key: tuple[int, int]) -> _Array:
    """[10, 2, 1] uint32: the key of every round."""
    return _GROWN + np.array(key, dtype=np.uint32)[:, None]


def _philox(counter: _Array, round_keys: _Array) -> _Array:
    """:func:`philox` with the keys of its rounds."""
    x, y = counter[::2], counter[1::2]
    # By turns, since a round reads what the last one has written.
    products = np.empty((2, *x.shape), dtype=np.uint64)
    # A product's halves lie beside each other in memory; they change places from left to right.
    halves = products.view(np.uint32).reshape(*products.shape, 2)[:, ::-1]
    low, high = halves[..., _LOW], halves[..., 1 - _LOW]
    turns = cycle(zip(products, low, high, strict=True))
    for keys, (product, lower, upper) in zip(round_keys, turns, strict=False):
        np.multiply(x, _FACTORS, out=product)
        x = upper ^ y
        x ^= keys
        y = lower
    result = np.empty(counter.shape, dtype=np.uint32)
    result[::2], result[1::2] = x, y
    return result


def _in_words(numbers: _Array) -> _Array:
    """[..., 2] uint32: uint64 numbers [...] as their lower and higher words, in their memory."""
    words = numbers.view(np.uint32).reshape(*numbers.shape, 2)
    return words if _LOW == 0 else words[..., ::-1]


class Draws:
    """Random numbers of one pass.

    Args:
        seed: in [-2^63, 2^64).
        stream: which of the passes that have this seed and draw independently of each other.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self.seed, self.stream = seed, stream
        self._round_keys: dict[int, _Array] = {}

    def of(self, numbers: Numbers) -> SampleDraws:
        """The numbers of a batch's samples, from the first on."""
        # What is numbered by its position in all of the data is drawn as what has that number.
        part = max(numbers.part - 1, 0)
        if part not in self._round_keys:
            counter = np.array([[self.stream % _WORD], [self.stream // _WORD], [part], [0]])
            low, high = self.seed % _WORD, self.seed >> 32 & (_WORD - 1)
            words = philox(counter.astype(np.uint32), (low, high))
            self._round_keys[part] = _round_keys((int(words[0, 0]), int(words[1, 0])))
        return SampleDraws(self._round_keys[part], numbers.values)


class SampleDraws:
    """Random numbers of the samples of a batch; successive calls go on inside each sample.

    Args:
        round_keys: [10, 2, 1] uint32, of Philox4x32-10.
        values: [N] int64, the samples' numbers.
    """

    def __init__(self, round_keys: _Array, values: _Array) -> None:
        self._round_keys, self._values = round_keys, values.view(np.uint64)
        self._taken = 0

    def __len__(self) -> int:
        return len(self._values)

    def uniform(self, count: int, places: int = 1) -> Tensor:
        """[N places, count] float64 on the host, uniform in (0, 1), in steps of 2^-52.

        Args:
            count: for each place in a sample.
            places: of a sample (tokens, pixels), one after the other.
        """
        drawn = self._uniform(count * places)
        return torch.from_numpy(drawn.reshape(len(self) * places, count))

    def normal(self, count: int) -> Tensor:
        """[N, count] float64 on the host, standard normal."""
        # One uniform number each: a function of nothing but that number, also in its last bits.
        return torch.from_numpy(ndtri(self._uniform(count)))

    def _uniform(self, count: int) -> _Array:
        n, begin = len(self._values), self._taken
        self._taken += count
        if not n or not count:
            return np.empty((n, count))
        # A block gives two numbers.
        first, behind = begin // 2, (begin + count + 1) // 2
        each = behind - first
        bits = np.empty((n, each, 2), dtype=np.uint64)
        flat = bits.reshape(n * each, 2)
        for start in range(0, n * each, _TOGETHER):
            block = np.arange(start, min(start + _TOGETHER, n * each), dtype=np.uint64)
            sample, place = np.divmod(block, np.uint64(each))
            place += np.uint64(first)
            numbers = np.stack((place, self._values[sample.astype(np.intp)]))
            # [4, B]: the lower word of each number before the higher one.
            words = _in_words(numbers).transpose(0, 2, 1).reshape(4, -1)
            drawn = _philox(words, self._round_keys).reshape(2, 2, -1)
            _in_words(flat[start : start + len(block)])[...] = drawn.transpose(2, 0, 1)
        bits >>= np.uint64(12)
        # In the middle of their steps: neither 0 nor 1 is among them.
        uniform = (bits.reshape(n, 2 * each).astype(np.float64) + 0.5) * 2.0**-52
        skipped = begin - 2 * first
        return np.ascontiguousarray(uniform[:, skipped : skipped + count])
