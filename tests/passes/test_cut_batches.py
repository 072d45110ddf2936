"""Some samples of a batch: what counts samples is cut, what counts positions is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import randn, seeded
from torch import Tensor, nn
from transformer_models import gpt2, text

import hesskern as hk
from hesskern.passes.batches import Batch, halves, samples_of

N = 4


def test_arguments_by_position_stay_whole() -> None:
    inputs: dict[str, Any] = {
        "input_ids": torch.arange(N * N).reshape(N, N),
        "attention_mask": torch.ones(N, N),
        "position_ids": torch.arange(N),
        "cache_position": torch.arange(N),
        "decoder_position_ids": torch.arange(N),
        "lengths": torch.arange(N),
        "pairs": (torch.arange(N), torch.zeros(2, N)),
        "flag": True,
    }
    labels = torch.arange(N)
    batch = Batch(0, inputs, labels, labels, torch.ones(N), torch.ones(N, N))
    cut = samples_of(batch, slice(1, 3))
    for name in ("position_ids", "cache_position", "decoder_position_ids"):
        assert torch.equal(cut.inputs[name], inputs[name])
    assert torch.equal(cut.inputs["input_ids"], inputs["input_ids"][1:3])
    assert cut.inputs["attention_mask"].shape == (2, N)
    assert torch.equal(cut.inputs["lengths"], torch.tensor([1, 2]))
    assert torch.equal(cut.inputs["pairs"][0], torch.tensor([1, 2]))
    assert cut.inputs["pairs"][1].shape == (2, N)
    assert cut.inputs["flag"]
    assert torch.equal(cut.targets, torch.tensor([1, 2]))
    assert cut.targets is cut.given_targets
    assert cut.weight.shape == (2,)
    assert cut.mask.shape == (2, N)
    # With samples of their own they are cut; but not beside what may count either.
    inputs["position_ids"] = torch.arange(N).expand(N, N)
    assert halves(batch) == [batch]
    del inputs["lengths"]
    assert [len(half.inputs["position_ids"]) for half in halves(batch)] == [2, 2]


def square() -> dict[str, Tensor]:
    """As many samples as positions, and arguments of one value for every position."""
    batch = text(N, N)
    batch["attention_mask"][1, 2:] = 0
    batch["attention_mask"][3, 1:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "position_ids": torch.arange(N)}


def test_the_last_sample_alone() -> None:
    """Calibration runs it once more, to see that rows come sample after sample."""
    batch = square()
    found = hk.input_covariances(gpt2(), [batch])
    plain = hk.input_covariances(gpt2(), [{k: v for k, v in batch.items() if "position" not in k}])
    assert list(found) == list(plain)
    for name in plain:
        torch.testing.assert_close(found[name].input_covariance, plain[name].input_covariance)


def test_batches_in_halves() -> None:
    batch, model = square(), gpt2()
    expected = hk.kronecker_factors(model, [batch], hk.CausalLM())

    def fails(module: nn.Module, args: Any, given: Any) -> None:
        if len(given["input_ids"]) == N:
            raise torch.OutOfMemoryError("too many samples")

    model.register_forward_pre_hook(fails, with_kwargs=True)
    found = hk.kronecker_factors(model, [batch], hk.CausalLM())
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].output_hessian, layer.output_hessian)
        torch.testing.assert_close(found[name].input_covariance, layer.input_covariance)


class Mixing(nn.Module):
    """Positions are mixed by a matrix [T, T] that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.most = 100

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return self.head(torch.tanh(mixing[: x.shape[1]] @ self.layer(x)).mean(1))


@pytest.mark.parametrize("samples", [N, 2 * N])
def test_a_shared_matrix_is_cut_nowhere(samples: int) -> None:
    """Rows of it, which a model may take as they are, would be no error but another function."""
    model, loss = seeded(Mixing()).double(), nn.CrossEntropyLoss()
    batch = ((randn(samples, N, 3), randn(N, N, seed=1)), torch.arange(samples) % 2)
    whole = hk.kronecker_factors(model, [batch], loss)
    model.most = N
    found = hk.kronecker_factors(model, [batch], loss)
    for name, layer in whole.items():
        torch.testing.assert_close(found[name].output_hessian, layer.output_hessian)
    # Halves of as many samples as positions are cut no further.
    model.most = N - 1
    with pytest.raises(torch.OutOfMemoryError, match="no room for 4 samples"):
        hk.kronecker_factors(model, [batch], loss)


def test_rows_beside_a_shared_matrix_are_not_looked_at_alone() -> None:
    model = seeded(Mixing()).double()
    inputs = (randn(N, N, 3), randn(N, N, seed=1))
    weight = torch.arange(1.0, N + 1)
    with pytest.raises(ValueError, match="as many samples as positions"):
        hk.input_covariances(model, [inputs_only(inputs)], sample_weight=weight)
    assert len(hk.input_covariances(model, [inputs_only(inputs)])) == 2


def inputs_only(inputs: tuple[Tensor, ...]) -> Any:
    return inputs, None
