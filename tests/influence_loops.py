"""Influence scores as a plain loop over samples: autograd on each alone, dense solves, float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesskern.operators.eigenbasis import EigenbasisOperator

Samples = list[tuple[Any, Any]]


def singles(batches: list[tuple[Any, Tensor]]) -> Samples:
    """Every sample as a batch of one, in float64 where it is floating point."""

    def one(value: Any, i: int) -> Any:
        if isinstance(value, dict):
            return {key: one(item, i) for key, item in value.items()}
        part = value[i : i + 1]
        return part.double() if part.is_floating_point() else part

    return [(one(x, i), one(y, i)) for x, y in batches for i in range(len(y))]


def gradients(
    model: nn.Module, samples: Samples, loss: Callable[..., Tensor], shapes: Mapping[str, Any]
) -> dict[str, Tensor]:
    """{layer: [n, m d]} for layers of shapes (m, d), with the bias where d has room for it."""
    found: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for inputs, target in samples:
        model.zero_grad()
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        loss(outputs, target).backward()
        for name, (m, d) in shapes.items():
            module = model.get_submodule(name)
            weight = module.weight.grad
            row = torch.zeros(m, d) if weight is None else weight.reshape(m, -1)
            if row.shape[1] < d:
                row = torch.cat([row, module.bias.grad[:, None]], 1)
            found[name].append(row.double().flatten().clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(rows) for name, rows in found.items()}


def loop_scores(
    E: Mapping[str, EigenbasisOperator],
    model: nn.Module,
    queries: Samples,
    train: Samples,
    loss: Callable[..., Tensor],
    damping: Mapping[str, float] | None = None,
    query_loss: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """{layer: [q, n]} in float64; damping None: a tenth of the mean eigenvalue."""
    dtype = next(model.parameters()).dtype
    shapes = {name: operator.layer_shape for name, operator in E.items()}
    model.double()
    q = gradients(model, queries, query_loss or loss, shapes)
    n = gradients(model, train, loss, shapes)
    model.to(dtype)
    scores = {}
    for name, operator in E.items():
        dense = operator.to_dense().double()
        level = 0.1 * float(dense.trace()) / len(dense) if damping is None else damping[name]
        dense += level * torch.eye(len(dense), dtype=torch.float64)
        scores[name] = torch.linalg.solve(dense, q[name].T).T @ n[name].T
    return scores


def total(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(scores.values())).sum(0)


def close(found: Any, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Scores of a query are compared with the largest of them."""
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    scale = expected.abs().flatten(1).amax(1).reshape(-1, *(1,) * (expected.dim() - 1))
    assert bool((scale > 0).all())
    assert float(((found.double() - expected) / scale).abs().max()) < tolerance
