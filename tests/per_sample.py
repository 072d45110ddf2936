"""Diagonals of parameters by loops over samples: one backward pass per output, nothing shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Logits [K, C] of one sample at its labelled positions, and their classes [K].
Predictions = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def diagonal_loops(
    model: nn.Module,
    samples: Iterable[Any],
    predictions: Predictions,
    names: Iterable[str],
    output: str = "exact",
    weights: Iterable[float] | None = None,
) -> dict[str, Tensor]:
    """The mean over samples of J^T (diag(p) - p p^T) J / K, or of squared gradients, its diagonal.

    Args:
        model: in eval mode, in float64.
        samples: one by one, as ``predictions`` takes them.
        predictions: see above.
        names: of the parameters.
        output: "exact" or "empirical".
        weights: of the samples.
    """
    samples = list(samples)
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = {name: torch.zeros_like(p) for name, p in chosen.items()}
    factors = [1.0] * len(samples) if weights is None else list(weights)
    for sample, weight in zip(samples, factors, strict=True):
        logits, labels = predictions(model, sample)
        count = len(logits)

        def gradients(scalar: Tensor) -> list[Tensor]:
            grads = torch.autograd.grad(
                scalar, list(chosen.values()), retain_graph=True, allow_unused=True
            )
            pairs = zip(grads, chosen.values(), strict=True)
            return [torch.zeros_like(p) if g is None else g for g, p in pairs]

        if output == "empirical":
            whole = gradients(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            for name, g in zip(chosen, whole, strict=True):
                found[name] += weight * g**2 / count
            continue
        for row in logits:
            p = row.softmax(0).detach()
            jacobian = [gradients(entry) for entry in row]
            for i, name in enumerate(chosen):
                J = torch.stack([grads[i] for grads in jacobian])
                shaped = p.reshape(-1, *(1,) * (J.dim() - 1))
                variance = (shaped * J**2).sum(0) - (shaped * J).sum(0) ** 2
                found[name] += weight * variance / count
    return {name: total / sum(factors) for name, total in found.items()}


def plain_predictions(model: nn.Module, sample: tuple[Any, Tensor]) -> tuple[Tensor, Tensor]:
    """Of pairs (inputs [1, ...], class [1]) with logits [1, C], or classes [1, T] of [1, C, T]."""
    inputs, target = sample
    z = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if z.dim() == 2:
        return z, target
    return z.movedim(1, -1).reshape(-1, z.shape[1]), target.reshape(-1)


def native_predictions(shift: bool) -> Predictions:
    """Of batches of one sample for models of transformers, labels in them."""

    def predictions(model: nn.Module, sample: Any) -> tuple[Tensor, Tensor]:
        logits, labels = model(**sample).logits, sample["labels"]
        if logits.dim() == 2:
            return logits, labels
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        keep = labels[0] != -100
        return logits[0][keep], labels[0][keep]

    return predictions
