"""Padded batches of native models of transformers: the curvature of their samples alone."""

from __future__ import annotations

import pytest
import torch
from masked import trimmed
from tensors import relative_error
from torch import Tensor
from transformer_models import NATIVE, Native

import hesskern as hk

SIDES = ("right", "left")
LENGTHS = (3, 5, 4)
FACTORS = ("input_covariance", "output_hessian")
# Positions are counted from the first token, wherever the padding is: embeddings that are looked up
# by them, and rotations, which are made in float32.
ABSOLUTE = ("gpt2", "llama", "bert", "bert_tagger", "bert_classifier")


def padded(native: Native, name: str, side: str) -> dict[str, Tensor]:
    """A batch of three samples with padding, which bears no labels."""
    batch = native.batch(3)
    width = batch["input_ids"].shape[1]
    place = torch.arange(width) if side == "right" else torch.arange(width).flip(0)
    keep = place < torch.tensor(LENGTHS)[:, None]
    batch = {**batch, "attention_mask": keep.long()}
    batch["input_ids"] = batch["input_ids"].masked_fill(~keep, 0)
    if batch["labels"].shape == keep.shape:
        batch["labels"] = batch["labels"].masked_fill(~keep, -100)
        # Every sample has a label behind its first token.
        for labels, row in zip(batch["labels"], keep, strict=True):
            labels[row.nonzero()[1]] = 3
    if name in ABSOLUTE:
        batch["position_ids"] = (keep.cumsum(1) - 1).clamp(min=0)
    return batch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(
            (name, side)
            for name in ("gpt2", "llama", "bert", "bert_tagger", "t5")
            for side in SIDES
        ),
        # Its pooler reads the first position.
        ("bert_classifier", "right"),
    ],
)
def test_factors_and_hessians(name: str, side: str) -> None:
    native = NATIVE[name]
    batch = padded(native, name, side)
    parts = trimmed(batch)
    for output in ("exact", "empirical"):
        found = hk.kronecker_factors(native.model(), [batch], native.loss, output=output)
        expected = hk.kronecker_factors(native.model(), parts, native.loss, output=output)
        assert list(found) == list(expected)
        for layer, right in expected.items():
            assert found[layer].positions == pytest.approx(right.positions)
            for factor in FACTORS:
                error = relative_error(getattr(found[layer], factor), getattr(right, factor))
                assert error <= 1e-10, (layer, factor, error)
        narrow, apart = (
            hk.kronecker_factors(native.model(torch.float32), data, native.loss, output=output)
            for data in ([batch], parts)
        )
        for layer, right in expected.items():
            for factor in FACTORS:
                exact = getattr(right, factor)
                error, own = (
                    relative_error(getattr(f[layer], factor).double(), exact)
                    for f in (narrow, apart)
                )
                # Or as far as the model itself is from float64 without any padding.
                assert error <= max(1e-5, 10 * own), (layer, factor, error, own)
    assert 4 in {f.positions for f in found.values()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "side"), [("gpt2", "left"), ("bert", "left"), ("bert_classifier", "right")]
)
def test_operators(name: str, side: str) -> None:
    native = NATIVE[name]
    batch, model = padded(native, name, side), native.model()
    parts = trimmed(batch)
    found = hk.layer_hessians(model, [batch], native.loss)
    for layer, right in hk.layer_hessians(model, parts, native.loss).items():
        vector = torch.randn(right.shape[0], dtype=torch.float64)
        assert relative_error(found[layer] @ vector, right @ vector) <= 1e-10
        assert found[layer].trace() == pytest.approx(right.trace(), rel=1e-10)
    whole, apart = (hk.GaussNewton(model, d, native.loss) for d in ([batch], parts))
    vector = torch.randn(whole.shape[0], dtype=torch.float64)
    assert relative_error(whole @ vector, apart @ vector) <= 1e-10
    layer = next(iter(found))
    one, other = (hk.position_mean_hessian(model, d, native.loss, layer) for d in ([batch], parts))
    assert one.trace() == pytest.approx(other.trace(), rel=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder", [False, True])
def test_encoder_and_decoder_equally_long(decoder: bool) -> None:
    """Names tell whose positions a mask means, and a decoder may have a mask of its own."""
    native = NATIVE["t5"]
    batch, model = padded(native, "t5", "right"), native.model()
    width = batch["input_ids"].shape[1]
    labels = torch.randint(1, 11, (3, width), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([5, 2, 4] if decoder else [5, 5, 5])[:, None]
    keep = torch.arange(width) < lengths
    batch["labels"] = labels.masked_fill(~keep, -100)
    if decoder:
        batch["decoder_attention_mask"] = keep.long()
    found = hk.kronecker_factors(model, [batch], native.loss)
    parts = []
    for i, (length, target) in enumerate(zip(LENGTHS, lengths[:, 0].tolist(), strict=True)):
        parts.append(
            {
                "input_ids": batch["input_ids"][i : i + 1, :length],
                "attention_mask": torch.ones(1, length, dtype=torch.long),
                "labels": batch["labels"][i : i + 1, :target],
            }
        )
    expected = hk.kronecker_factors(model, parts, native.loss)
    for layer, right in expected.items():
        for factor in ("input_covariance", "output_hessian"):
            error = relative_error(getattr(found[layer], factor), getattr(right, factor))
            assert error <= 1e-10, (layer, factor, error)
        encoder = layer.startswith("encoder") or layer.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        mean = sum(LENGTHS) / 3 if encoder else float(lengths.sum()) / 3
        assert found[layer].positions == pytest.approx(mean)


@pytest.mark.filterwarnings("ignore")
def test_a_mask_that_is_added_to_scores_is_refused() -> None:
    native = NATIVE["gpt2"]
    batch = padded(native, "gpt2", "right")
    batch["attention_mask"] = 2 * batch["attention_mask"]
    stream = hk.FactorAccumulator(native.model(), native.loss)
    with pytest.raises(ValueError, match=r"must hold 0 .* and 1 .* alone, got values from 0 to 2"):
        stream.update(batch)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match=r"leaves no position|no label"):
        stream.update(batch)
    assert stream.num_samples == 0
