"""Batches of transformers on a device that the CPU plays: the CPU's numbers, and no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from launches import waits_of_a_pass
from networks import seeded
from played_device import generators, played
from torch import Tensor, nn

import hesskern as hk


class Tokens(nn.Module):
    """Logits [N, T, 7] of tokens, or [N, 7] of their sum."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.first, self.head, self.pooled = nn.Linear(7, 6), nn.Linear(6, 7), pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = torch.nn.functional.one_hot(input_ids, 7).to(self.first.weight.dtype)
        z = self.first(x.cumsum(1)).relu()
        return {"logits": self.head(z.sum(1) if self.pooled else z)}


def batches(loss: Any, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 7, (3, 5), generator=generator)
        labels = ids.clone()
        labels[0, 1:3] = -100
        labels = labels if isinstance(loss, hk.CausalLM) else labels[:, 3]
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


LOSSES: dict[str, Any] = {
    "tokens": hk.CausalLM(),
    "tokens weighted": hk.CausalLM(reduction="token"),
    "samples": hk.SequenceClassification(),
}
PASSES: dict[str, Callable[..., Any]] = {
    "exact": lambda m, d, loss: hk.kronecker_factors(m, d, loss),
    "mc": lambda m, d, loss: hk.kronecker_factors(m, d, loss, output="mc", mc_samples=2),
    "empirical": lambda m, d, loss: hk.kronecker_factors(m, d, loss, output="empirical"),
    "hessians": lambda m, d, loss: hk.layer_hessians(m, d, loss),
}


def model_of(loss: Any) -> nn.Module:
    return seeded(Tokens(isinstance(loss, hk.SequenceClassification))).double()


def numbers(found: Any) -> Iterator[Tensor]:
    for layer in found.values():
        if isinstance(layer, hk.LayerFactors):
            yield layer.input_covariance
            yield layer.output_hessian
            yield torch.tensor([layer.num_samples, layer.positions], dtype=torch.float64)
        else:
            yield layer.to_dense()


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", LOSSES)
def test_numbers(name: str, kind: str, where: str) -> None:
    loss, run = LOSSES[name], PASSES[kind]
    device = played()
    with generators():
        data = batches(loss)
        expected = run(model_of(loss), data, loss)
        if where == "device":
            data = [{k: v.to(device) for k, v in batch.items()} for batch in data]
        found = run(model_of(loss).to(device), data, loss)
        for one, other in zip(numbers(found), numbers(expected), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("output", ["mc", "empirical"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_label_beyond_the_head(name: str, output: str) -> None:
    loss = LOSSES[name]
    device = played()
    with generators():
        model = model_of(loss).to(device)
        accumulator = hk.FactorAccumulator(model, loss, output=output)
        good, bad = batches(loss, 2)
        accumulator.update(good)
        before = accumulator.factors()
        bad["labels"].view(-1)[-1] = 7
        for data in (bad, {k: v.to(device) for k, v in bad.items()}):
            with pytest.raises(ValueError, match=r"must lie in \[0, 7\)"):
                accumulator.update(data)
        after = accumulator.factors()
        for one, other in zip(numbers(after), numbers(before), strict=True):
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0)


class Case:
    """What :func:`waits_of_a_pass` takes."""

    def __init__(self, loss: Any) -> None:
        self.model, self.loss = model_of(loss), loss

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        return batches(self.loss, count)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", LOSSES)
def test_waits(name: str, kind: str) -> None:
    case: Any = Case(LOSSES[name])
    # Behind the pass, whether a mask has cut gradients off: a look for each of the two layers.
    limit = 4 if kind == "hessians" else 2
    assert len(waits_of_a_pass(case, lambda m, d: PASSES[kind](m, d, case.loss))) <= limit
