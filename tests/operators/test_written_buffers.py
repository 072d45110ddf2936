"""A model that writes its own buffers in eval mode, as InstanceNorm does in torch 2.10."""

from __future__ import annotations

import pytest
import torch
from networks import CE, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk


class WritesBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("running", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.running, Tensor)
        self.running.copy_(self.running.clone())
        return self.layer(x * self.running)


def test_a_buffer_that_the_model_writes_is_no_change_and_one_of_the_user_is() -> None:
    model = seeded(WritesBack())
    data = [(randn(5, 4, seed=n), classes(5, c=3)) for n in range(3)]
    stored = hk.GaussNewton(model, data, CE)
    anew = hk.GaussNewton(model, data, CE, memory_budget=1)
    v = randn(stored.shape[0], seed=7)
    for _ in range(2):
        torch.testing.assert_close(anew @ v, stored @ v)
    model.running.mul_(2)
    with pytest.raises(RuntimeError, match="the model changed"):
        anew @ v
    model.running.div_(2)
    with torch.no_grad():
        again = hk.GaussNewton(model, data, CE, memory_budget=1)
        model.layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="the model changed"):
        again @ v
