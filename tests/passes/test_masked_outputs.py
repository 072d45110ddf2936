"""Outputs at masked positions are not looked at, unless torch's own loss has a label there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import seeded
from played_device import generators, played
from torch import Tensor, nn

import hesskern as hk

CLASSES = 5


class Tagger(nn.Module):
    """Logits [N, T, c], or [N, c, T]; ``fill`` where the mask is zero."""

    def __init__(self, fill: float, classes_last: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)
        self.fill, self.classes_last = fill, classes_last

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        z = self.head(self.layer(inputs_embeds).relu())
        z = z.masked_fill(attention_mask.unsqueeze(2) == 0, self.fill)
        return z if self.classes_last else z.transpose(1, 2)


def data(labelled: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.randint(0, CLASSES, (3, 4), generator=generator)
    labels[1, 2] = -100
    return {"inputs_embeds": x, "attention_mask": mask}, labels.where(
        (mask == 1) | torch.tensor(labelled), -100
    )


LOSSES: dict[str, tuple[Any, bool]] = {
    "transformers": (hk.TokenClassification(), True),
    "torch": (nn.CrossEntropyLoss(), False),
}


def numbers(
    name: str, output: str, fill: float, labelled: bool = False, device: str = "cpu"
) -> Any:
    loss, classes_last = LOSSES[name]
    inputs, labels = data(labelled)
    inputs["inputs_embeds"] = inputs["inputs_embeds"].to(device)
    given: dict[str, Any] = {"position_mask": lambda given: given["attention_mask"]}
    model = seeded(Tagger(fill, classes_last)).double().to(device)
    if output == "hessian":
        found = hk.layer_hessians(model, [(inputs, labels)], loss, **given)
        return {key: H.to_dense().cpu() for key, H in found.items()}
    found = hk.kronecker_factors(model, [(inputs, labels)], loss, output=output, **given)
    return {key: f.output_hessian.cpu() for key, f in found.items()}


@pytest.mark.parametrize("device", ["cpu", "played"])
@pytest.mark.parametrize("output", ["exact", "mc", "empirical", "hessian"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_there_does_not_matter(name: str, output: str, device: str) -> None:
    played()
    with generators():
        expected = numbers(name, output, 0.0)
        for fill in (float("nan"), float("inf"), -float("inf")):
            found = numbers(name, output, fill, device=device)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "played"])
@pytest.mark.parametrize("output", ["exact", "mc", "empirical", "hessian"])
def test_a_label_there_is_a_term_of_torchs_own_loss(output: str, device: str) -> None:
    played()
    with generators(), pytest.raises(ValueError, match="the model's outputs contain NaN or Inf"):
        numbers("torch", output, float("nan"), labelled=True, device=device)


@pytest.mark.parametrize("device", ["cpu", "played"])
@pytest.mark.parametrize("output", ["exact", "mc", "empirical", "hessian"])
def test_a_label_there_does_not_matter_to_those_of_transformers(output: str, device: str) -> None:
    played()
    with generators():
        expected = numbers("transformers", output, 0.0)
        found = numbers("transformers", output, float("nan"), labelled=True, device=device)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_positions_that_are_data_are_looked_at_without_a_label(name: str) -> None:
    loss, classes_last = LOSSES[name]
    inputs, labels = data()

    class Broken(Tagger):
        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            where = torch.zeros_like(attention_mask)
            where[1, 2] = 1
            z = super().forward(inputs_embeds, attention_mask)
            return z.masked_fill(where.unsqueeze(2 if classes_last else 1) == 1, float("nan"))

    model = seeded(Broken(0.0, classes_last)).double()
    with pytest.raises(ValueError, match="the model's outputs contain NaN or Inf"):
        hk.kronecker_factors(
            model, [(inputs, labels)], loss, position_mask=lambda given: given["attention_mask"]
        )
