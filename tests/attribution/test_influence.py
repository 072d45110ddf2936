"""Influence scores against plain loops over samples in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk
from hesskern.operators.base import EigenbasisOperator

Data = list[tuple[Tensor, Tensor]]


def reference(
    E: Mapping[str, EigenbasisOperator] | None,
    model: nn.Module,
    queries: Data,
    train: Data,
    loss: Callable[..., Tensor],
    damping: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """{layer: [q, n]} in float64: autograd on one sample at a time, a dense solve."""
    names = list(E) if E is not None else [n for n, m in model.named_modules() if _has_weight(m)]
    dtype = next(model.parameters()).dtype
    model = model.double()

    def rows(data: Data) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for inputs, targets in data:
            for i in range(len(inputs)):
                x = inputs[i : i + 1]
                x = x.double() if x.is_floating_point() else x
                y = targets[i : i + 1]
                model.zero_grad()
                loss(model(x), y.double() if y.is_floating_point() else y).backward()
                for name in names:
                    module = model.get_submodule(name)
                    weight = module.weight.grad
                    assert isinstance(weight, Tensor)
                    row = weight.reshape(len(weight), -1)
                    if E is not None and E[name].layer_shape[1] > row.shape[1]:
                        bias = module.bias.grad
                        assert isinstance(bias, Tensor)
                        row = torch.cat([row, bias[:, None]], 1)
                    found[name].append(row.flatten().clone())
        model.zero_grad(set_to_none=True)
        return {name: torch.stack(parts) for name, parts in found.items()}

    q, n = rows(queries), rows(train)
    model.to(dtype)
    scores = {}
    for name in names:
        solved = q[name].T
        if E is not None:
            dense = E[name].to_dense().double()
            level = 0.1 * dense.trace() / len(dense) if damping is None else damping[name]
            solved = torch.linalg.solve(dense + level * torch.eye(len(dense)).double(), solved)
        scores[name] = solved.T @ n[name].T
    return scores


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))


def total(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(scores.values())).sum(0)


def close(found: Any, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    # Scores of one query are compared with the largest of them.
    scale = expected.abs().amax(1, keepdim=True)
    assert bool((scale > 0).all())
    assert float(((found.double() - expected) / scale).abs().max()) < tolerance


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)).to(dtype)


def data(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 6, generator=g).to(dtype),
            torch.randint(4, (n,), generator=g),
        )
    ]


def cut(whole: Data, size: int) -> Data:
    ((x, y),) = whole
    return list(zip(x.split(size), y.split(size), strict=True))


def corrected(
    model: nn.Module, train: Data, loss: nn.Module, **options: Any
) -> dict[str, hk.CorrectedOperator]:
    factors = hk.kronecker_factors(model, train, loss, **options)
    hessians = hk.layer_hessians(model, train, loss, **options)
    return {n: hk.eigenvalue_corrected(hessians[n], f.operator()) for n, f in factors.items()}


LOSS = nn.CrossEntropyLoss()


class TestScores:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("bias", ["none", "joint"])
    def test_a_small_network(self, dtype: torch.dtype, bias: Any) -> None:
        model, train, queries = mlp(dtype), data(40, dtype), data(5, dtype, 1)
        E = corrected(model, train, LOSS, bias=bias)
        expected = reference(E, model, queries, train, nn.functional.cross_entropy)
        found = hk.influence(E, model, queries, cut(train, 16), LOSS)
        close(found.scores, total(expected), 1e-5 if dtype == torch.float32 else 1e-12)
        assert found.scores.dtype == dtype
        assert (found.num_queries, found.num_train) == (5, 40)
        assert found.layers == ("0", "2")
