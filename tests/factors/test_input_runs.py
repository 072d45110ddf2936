"""How often ``input_covariances`` runs the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk


class _Counting(nn.Module):
    """Two layers over tokens; counts the samples that it is run on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.runs: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.runs.append(len(input_ids))
        return self.second(self.first(self.embedding(input_ids)).tanh())


@pytest.mark.parametrize(
    ("padded", "runs"),
    # Where padding is left out, one sample is run alone, to know which rows are whose.
    [(False, [4, 4, 4]), (True, [4, 1, 4, 4])],
)
def test_the_model_runs_once_a_batch(padded: bool, runs: list[int]) -> None:
    torch.manual_seed(0)
    mask = torch.ones(4, 6, dtype=torch.long)
    if padded:
        mask[1, 4:] = 0
    batches = [{"input_ids": torch.randint(20, (4, 6)), "attention_mask": mask} for _ in range(3)]
    model = _Counting()
    found = hk.input_covariances(model, batches)
    assert model.runs == runs
    expected = torch.zeros(8, 8)
    for batch in batches:
        rows = model.embedding(batch["input_ids"])[mask.bool()].detach()
        expected += rows.T @ rows / 12
    torch.testing.assert_close(found["first"].input_covariance, expected)
