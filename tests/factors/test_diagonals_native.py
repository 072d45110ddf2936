"""Diagonals of native models of transformers: every parameter that is no matrix, by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_sample import diagonal_loops, native_predictions
from torch import Tensor
from transformer_models import NATIVE, Native

import hesskern as hk

# Of Swin: rows taken by two numbers at once.
TABLES = (".relative_position_bias_table",)
# Padding on the right: absolute positions are those of the samples alone.
PADDED = ("gpt2", "llama", "bert", "bert_tagger")


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples one by one, without their padding."""
    parts = []
    for i in range(len(batch["labels"])):
        part = {key: value[i : i + 1] for key, value in batch.items()}
        keep = part.get("attention_mask")
        if keep is not None:
            chosen = keep[0].bool()
            part = {
                key: value[:, chosen] if value.shape == keep.shape else value
                for key, value in part.items()
            }
        parts.append(part)
    return parts


def padded(native: Native) -> dict[str, Tensor]:
    """Three samples with padding on the right, which bears no labels."""
    batch = native.batch(3)
    keep = torch.arange(batch["input_ids"].shape[1]) < torch.tensor((3, 5, 4))[:, None]
    batch = {**batch, "attention_mask": keep.long()}
    batch["input_ids"] = batch["input_ids"].masked_fill(~keep, 0)
    batch["labels"] = batch["labels"].masked_fill(~keep, -100)
    # Every sample has a label behind its first token.
    batch["labels"][:, 1] = 3
    return batch


def check(
    name: str, data: list[dict[str, Tensor]], output: Any, missing: tuple[str, ...] = ()
) -> None:
    native = NATIVE[name]
    model = native.model()
    found = hk.kronecker_factors(model, data, native.loss, output=output, diagonal=True)
    layers = {f"{layer}.weight" for layer in found}
    # Experts of one parameter are layers of their own, with numbers behind its name.
    fused = {layer.rpartition(".")[0] for layer in found}
    rest = {n for n, _ in model.named_parameters()} - layers - fused
    assert rest - set(found.diagonals) == {n for n in rest if n.endswith(missing)}
    samples = [part for batch in data for part in alone(batch)]
    predictions = native_predictions(isinstance(native.loss, hk.CausalLM))
    expected = diagonal_loops(model, samples, predictions, found.diagonals, output)
    # RMS norms and rotations of transformers have float32 inside.
    limit = 1e-6 if name in ("llama", "mixtral", "t5") else 1e-10
    largest = max(float(diagonal.max()) for diagonal in expected.values())
    for n, diagonal in expected.items():
        assert found.diagonals[n].shape == diagonal.shape
        error = float((found.diagonals[n] - diagonal).norm())
        # Biases of keys have gradients of rounding alone: a softmax does not see them.
        assert error <= limit * float(diagonal.norm()) + 1e-20 * largest, (n, error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("output", ["exact", "empirical"])
@pytest.mark.parametrize("name", NATIVE)
def test_of_every_parameter(name: str, output: str) -> None:
    check(name, [NATIVE[name].batch(3), NATIVE[name].batch(2, seed=1)], output, TABLES)


@pytest.mark.filterwarnings("ignore")
def test_of_a_large_head_tied_to_its_embedding() -> None:
    """The head's factors are of its linear use, the diagonal of the embedding is of all uses."""
    native = NATIVE["gpt2"]
    model, data = native.model(), [native.batch(3)]
    whole = hk.kronecker_factors(model, data, native.loss, diagonal=True)
    found = hk.kronecker_factors(model, data, native.loss, diagonal=True, max_outputs=10)
    head = found.large["lm_head"]
    assert head.tied_to == "transformer.wte"
    assert torch.allclose(head.output_diagonal, whole["lm_head"].output_hessian.diagonal())
    name = "transformer.wte.weight"
    assert torch.allclose(found.diagonals[name], whole.diagonals[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PADDED)
def test_of_padded_batches(name: str) -> None:
    check(name, [padded(NATIVE[name])], "empirical")


@pytest.mark.filterwarnings("ignore")
def test_of_a_padded_encoder() -> None:
    """T5: what an encoder and a decoder look up alike has no mask of its own, and is left out."""
    native = NATIVE["t5"]
    batch = native.batch(3)
    keep = torch.arange(5) < torch.tensor((3, 5, 4))[:, None]
    ids = batch["input_ids"].masked_fill(~keep, 0)
    batch = {**batch, "attention_mask": keep.long(), "input_ids": ids}
    model = native.model()
    found = hk.kronecker_factors(model, [batch], native.loss, output="empirical", diagonal=True)
    assert "by the encoder and by the decoder" in found.skipped["shared.weight"]
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert "10 positions" in found.skipped[table]
    assert len(found.diagonals) == 8
    samples = alone(batch)
    expected = diagonal_loops(
        model, samples, native_predictions(False), found.diagonals, "empirical"
    )
    for name, diagonal in expected.items():
        error = float((found.diagonals[name] - diagonal).norm() / diagonal.norm())
        assert error <= 1e-6, (name, error)
