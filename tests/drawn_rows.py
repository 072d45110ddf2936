"""Root rows at single targets, by torch's own derivatives: those of the data, or drawn ones."""

from __future__ import annotations

from typing import Any

import torch
from dense import SampleLoss, run
from torch import Tensor, nn

_WORD = 2**32


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as its paper writes it, in Python's integers; words, the lowest first."""
    (left, right), words = key, list(counter)
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (second // _WORD) ^ words[1] ^ left,
            second % _WORD,
            (first // _WORD) ^ words[3] ^ right,
            first % _WORD,
        ]
        left, right = (left + 0x9E3779B9) % _WORD, (right + 0xBB67AE85) % _WORD
    return words


def uniform_numbers(
    seed: int, sample: int, count: int, stream: int = 0, part: int = 0
) -> list[float]:
    """A sample's first numbers in (0, 1): those of the counter (place, sample's number)."""
    low, high, *_ = philox(
        [stream % _WORD, stream // _WORD, part, 0], (seed % _WORD, seed % 2**64 // _WORD)
    )
    words: list[int] = []
    for block in range(count // 2 + 1):
        words += philox([block, 0, sample % _WORD, sample // _WORD], (low, high))
    bits = [words[2 * i] + words[2 * i + 1] * _WORD for i in range(count)]
    return [(b // 2**12 + 0.5) / 2**52 for b in bits]


def drawn_classes(logits: Tensor, samples: int, seed: int, first: int) -> Tensor:
    """[samples, N] classes as ``output="mc"`` draws them for samples at ``first`` and behind."""
    sums = logits.softmax(1).cumsum(1)
    drawn = torch.zeros(samples, len(logits), dtype=torch.long)
    for n in range(len(logits)):
        for k, uniform in enumerate(uniform_numbers(seed, first + n, samples)):
            drawn[k, n] = int((sums[n] > uniform * sums[n, -1]).nonzero()[0])
    return drawn


def single_target_rows(
    model: nn.Module, data: Any, loss: SampleLoss, output: str, samples: int = 1, seed: int = 0
) -> list[Tensor]:
    """Per batch [r, N, outputs per sample]: gradients of a sample's loss in its outputs.

    Args:
        output: "empirical", or "mc" for outputs [N, c] of cross-entropy.
    """
    found: list[Tensor] = []
    first = 0
    for inputs, targets in data:
        outputs = run(model, inputs).detach()
        every = [targets]
        if output == "mc":
            every = list(drawn_classes(outputs, samples, seed, first))
        rows = [
            torch.stack(
                [
                    torch.autograd.functional.jacobian(
                        lambda f, n=n, chosen=chosen: loss(f, chosen[n : n + 1]),
                        outputs[n : n + 1],
                    ).flatten()
                    for n in range(len(outputs))
                ]
            )
            for chosen in every
        ]
        first += len(outputs)
        found.append(torch.stack(rows) / len(every) ** 0.5)
    return found
