"""Some samples of a batch: what counts samples is cut, what counts positions is not."""

from __future__ import annotations

from typing import Any

import torch
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
    # With samples of their own they are cut.
    inputs["position_ids"] = torch.arange(N).expand(N, N)
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
