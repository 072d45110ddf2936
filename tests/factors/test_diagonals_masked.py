"""Diagonals where padding reaches the outputs: what comes back to it counts nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import CE, classes, seeded
from per_sample import diagonal_loops, plain_predictions
from torch import Tensor, nn
from torch.func import functional_call

import hesskern as hk


class Leaks(nn.Module):
    """All positions count in its mean, padding among them.

    With ``cut`` the parameters act on masked positions as constants: then autograd's own gradients
    are those of the positions that are data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.fc, self.pixel = nn.Linear(4, 5), nn.Conv1d(5, 6, 1)
        self.scale = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)
        self.place = nn.Parameter(torch.randn(1, 5, 4))
        self.cut = False

    def _applied(self, module: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
        y: Tensor = module(x)
        if not self.cut:
            return y
        constants = {name: p.detach() for name, p in module.named_parameters()}
        chosen = keep[:, None, :] if y.shape[1] == 6 else keep[:, :, None]
        return torch.where(chosen, y, functional_call(module, constants, (x,)))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        keep = mask.bool()
        place = self.place
        if self.cut:
            place = torch.where(keep[:, :, None], place, place.detach())
        x = self._applied(self.embed, tokens, keep) + place
        x = self._applied(self.fc, self._applied(self.norm, x, keep), keep).tanh()
        x = self._applied(self.pixel, x.transpose(1, 2), keep)
        x = self._applied(self.scale, x, keep).tanh().mean(2)
        scores: Tensor = self.head(x)
        return scores


@pytest.mark.parametrize("output", ["exact", "empirical"])
def test_masked_positions_count_nowhere(output: Any) -> None:
    model = seeded(Leaks()).eval()
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.tensor((3, 5, 2))[:, None]).long()
    target = classes(3, c=3)
    data = [((tokens, mask), target)]
    options: dict[str, Any] = {"output": output, "diagonal": True}
    found = hk.kronecker_factors(model, data, CE, position_mask=lambda inputs: inputs[1], **options)
    weights = {"fc.weight", "pixel.weight", "head.weight"}
    assert set(found.diagonals) == {n for n, _ in model.named_parameters()} - weights
    model.cut = True
    samples = [((tokens[i : i + 1], mask[i : i + 1]), target[i : i + 1]) for i in range(3)]
    expected = diagonal_loops(model, samples, plain_predictions, found.diagonals, output)
    for name, diagonal in expected.items():
        error = float((found.diagonals[name] - diagonal).norm() / diagonal.norm())
        assert error <= 1e-10, (name, error)
    # Without a mask they are others.
    model.cut = False
    whole = hk.kronecker_factors(model, data, CE, **options).diagonals
    for name in set(expected) - {"head.bias"}:
        assert not torch.allclose(whole[name], expected[name], rtol=0.1)
