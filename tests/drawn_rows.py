"""Root rows at single targets, by torch's own derivatives: those of the data, or drawn ones."""

from __future__ import annotations

from typing import Any

import torch
from dense import SampleLoss, run
from torch import Tensor, nn


def drawn_classes(logits: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """[samples, N] classes as ``output="mc"`` draws them, from uniform numbers [N, samples]."""
    uniform = torch.rand(len(logits), samples, generator=generator, dtype=logits.dtype)
    sums = logits.softmax(1).cumsum(1)
    drawn = torch.zeros(samples, len(logits), dtype=torch.long)
    for n in range(len(logits)):
        for k in range(samples):
            drawn[k, n] = int((sums[n] > uniform[n, k] * sums[n, -1]).nonzero()[0])
    return drawn


def single_target_rows(
    model: nn.Module, data: Any, loss: SampleLoss, output: str, samples: int = 1, seed: int = 0
) -> list[Tensor]:
    """Per batch [r, N, outputs per sample]: gradients of a sample's loss in its outputs.

    Args:
        output: "empirical", or "mc" for outputs [N, c] of cross-entropy.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for inputs, targets in data:
        outputs = run(model, inputs).detach()
        every = [targets]
        if output == "mc":
            every = list(drawn_classes(outputs, samples, generator))
        rows = [
            torch.stack(
                [
                    torch.autograd.functional.jacobian(
                        lambda f, n=n, chosen=chosen: loss(f, chosen[n : n + 1]),
                        outputs[n : n + 1],
                    ).flatten()
                    for n in range(len(outputs))
                ]
            )
            for chosen in every
        ]
        found.append(torch.stack(rows) / len(every) ** 0.5)
    return found
