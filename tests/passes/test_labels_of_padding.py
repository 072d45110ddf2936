"""Labels at padding, of losses of transformers: as if they were -100, as in the samples alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from torch import Tensor, nn

import hesskern as hk

LENGTHS = {"right": (slice(0, 2), slice(0, 4), slice(0, 3)), "left": (slice(2, 4), slice(0, 4))}
LOSSES: dict[str, Any] = {
    "causal": hk.CausalLM,
    "masked": hk.MaskedLM,
    "tokens": hk.TokenClassification,
    "seq2seq": hk.Seq2SeqLM,
}


class Tokens(nn.Module):
    """Logits [N, T, 5] that padding does not reach; of a decoder where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, inputs_embeds: Tensor, **masks: Tensor) -> Tensor:
        return self.head(self.decoder(inputs_embeds).tanh())

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels


def batches(side: str, loss: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A padded batch with labels everywhere, and its samples alone."""
    generator = torch.Generator().manual_seed(3)
    rows = LENGTHS[side]
    x = torch.randn(len(rows), 4, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, x.shape[:2], generator=generator)
    mask = torch.zeros_like(labels)
    for one, kept in zip(mask, rows, strict=True):
        one[kept] = 1
    batch = {"inputs_embeds": x, "labels": labels}
    alone = [
        {key: value[n : n + 1, kept] for key, value in batch.items()} for n, kept in enumerate(rows)
    ]
    if loss == "seq2seq":
        batch["decoder_attention_mask"] = mask
    batch["attention_mask"] = torch.ones_like(mask) if loss == "seq2seq" else mask
    return batch, alone


@pytest.mark.parametrize("reduction", ["mean", "token"])
@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize("name", LOSSES)
def test_as_the_samples_alone(name: str, side: str, reduction: Any) -> None:
    padded, alone = batches(side, name)
    loss, model = LOSSES[name](reduction=reduction), seeded(Tokens()).double()
    if name == "seq2seq":
        model.config = type("Config", (), {"is_encoder_decoder": True})()
    for output in ("exact", "empirical"):
        found, expected = (
            hk.kronecker_factors(model, data, loss, output=output) for data in ([padded], alone)
        )
        assert found.num_samples == expected.num_samples
        for layer in expected:
            torch.testing.assert_close(
                found[layer].output_hessian, expected[layer].output_hessian, rtol=1e-9, atol=1e-12
            )
    scores = hk.influence(None, model, [padded], [padded], loss).scores.double()
    other = hk.influence(None, model, alone, alone, loss).scores.double()
    torch.testing.assert_close(scores, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "masked", "tokens"])
def test_scores_are_products_of_the_gradients_of_the_samples_own_losses(name: str) -> None:
    padded, alone = batches("right", name)
    model = seeded(Tokens()).double()
    rows = []
    for sample in alone:
        z, labels = model(sample["inputs_embeds"])[0], sample["labels"][0]
        loss = (
            F.cross_entropy(z[:-1], labels[1:]) if name == "causal" else F.cross_entropy(z, labels)
        )
        rows.append(torch.autograd.grad(loss, [model.decoder.weight, model.head.weight]))
    gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = gradients @ gradients.T
    found = hk.influence(None, model, [padded], [padded], LOSSES[name]()).scores.double()
    torch.testing.assert_close(
        found / found.norm(), expected / expected.norm(), rtol=1e-5, atol=1e-6
    )
