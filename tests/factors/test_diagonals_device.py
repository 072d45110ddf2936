"""Diagonals on the CPU as a device, and of attention as torch has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import playing_device
from networks import CE, classes, randn, seeded
from per_sample import diagonal_loops, plain_predictions
from torch import Tensor, nn

import hesskern as hk


class Attends(nn.Module):
    """Projections with one bias for queries, keys and values, and torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = (
            nn.Embedding(6, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
        )
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.layer(x + self.attention(x, x, x)[0])
        scores: Tensor = self.head(x).movedim(-1, 1)
        return scores


def _attends() -> tuple[nn.Module, Any]:
    tokens = torch.randint(6, (3, 5), generator=torch.Generator().manual_seed(0))
    return seeded(Attends()).eval(), (tokens, classes(3, 5, c=3))


def test_of_attention() -> None:
    model, (tokens, target) = _attends()
    found = hk.kronecker_factors(model, [(tokens, target)], CE, diagonal=True)
    samples = [(tokens[i : i + 1], target[i : i + 1]) for i in range(3)]
    expected = diagonal_loops(model, samples, plain_predictions, found.diagonals)
    assert {"embed.weight", "attention.in_proj_bias", "layer.norm1.weight"} <= set(expected)
    for name, diagonal in expected.items():
        error = float((found.diagonals[name] - diagonal).norm() / diagonal.norm())
        assert error <= 1e-10, (name, error)


@pytest.mark.parametrize("output", ["exact", "mc"])
def test_on_a_device(output: Any) -> None:
    model, batch = _attends()
    expected = hk.kronecker_factors(model, [batch], CE, output=output, diagonal=True)
    with playing_device():
        found = hk.kronecker_factors(model, [batch], CE, output=output, diagonal=True)
    assert set(found.diagonals) == set(expected.diagonals)
    for name, diagonal in expected.diagonals.items():
        assert torch.allclose(found.diagonals[name], diagonal, rtol=1e-12, atol=0)


def test_a_bad_batch_on_a_device_adds_nothing() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)))
    good, bad = (randn(4, 4), classes(4, c=3)), (randn(4, 4, seed=1), classes(4, c=3))
    bad[0][1, 2] = float("nan")
    acc = hk.FactorAccumulator(model, CE, diagonal=True)
    with playing_device():
        with pytest.raises(ValueError, match="batch 1"):
            acc.consume([good, bad, good])
        found = acc.factors()
    expected = hk.kronecker_factors(model, [good], CE, diagonal=True)
    assert found.num_samples == 4
    for name, diagonal in expected.diagonals.items():
        assert torch.allclose(found.diagonals[name], diagonal, rtol=1e-12, atol=0)
