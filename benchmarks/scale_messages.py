"""What calls send in groups of many equal ranks: counted on real calls in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from equal_ranks import EqualRanks, equal_ranks
from scale_tables import table
from torch import Tensor, nn

import hesskern as hk

__all__ = ["messages"]

RANKS = (2, 8, 64, 1024)
# float32 sums of equal parts, in another order than one process takes.
_TOLERANCE = 1e-6


def messages() -> str:
    """A row for each call and number of ranks; every result is held against one process's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )
    data = [(torch.randn(64, 784), torch.randint(10, (64,)))]
    rows = []
    for name, call in _calls(model, data).items():
        expected = call(None)
        for ranks in RANKS:
            with equal_ranks(ranks) as group:
                found = call(group)
                difference = _difference(found, expected)
                if not difference <= _TOLERANCE:
                    raise AssertionError(f"{name}, {ranks} ranks: off by {difference:.1e}")
                rows.append(_row(name if ranks == RANKS[0] else "", ranks, group))
    headings = "ranks", "collectives", "messages", "kB sent", "to the store, first rank"
    return table(["call", *headings], rows)


def _calls(model: nn.Module, data: Any) -> dict[str, Callable[[Any], list[Tensor]]]:
    loss = nn.CrossEntropyLoss()

    def factors(group: Any) -> list[Tensor]:
        found = hk.kronecker_factors(model, data, loss, group=group)
        return [t for f in found.values() for t in (f.input_covariance, f.output_hessian)]

    def hessians(group: Any) -> list[Tensor]:
        found = hk.layer_hessians(model, data, loss, group=group)
        return [torch.tensor([H.trace() for H in found.values()])]

    def product(group: Any) -> list[Tensor]:
        H = hk.layer_hessians(model, data, loss, group=group)["0"]
        if group is not None:
            group.forget()
        return [H @ torch.ones(H.shape[0])]

    def pairs(group: Any) -> list[Tensor]:
        H = hk.layer_hessians(model, data, loss, group=group)["4"]
        if group is not None:
            group.forget()
        return [hk.eigsh(H, 10).values]

    return {
        "`kronecker_factors`": factors,
        "`layer_hessians`": hessians,
        "`H @ v`, [200, 784]": product,
        "`eigsh(H, 10)`, [10, 200]": pairs,
    }


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _row(name: str, ranks: int, group: EqualRanks) -> list[str]:
    others = ranks - 1
    sent = sum(group.sent.values())
    count = sum(group.messages.values())
    return [
        name,
        f"{ranks:,}",
        f"{count // others:,}",
        f"{count:,}",
        f"{sent / 1e3:,.1f}",
        f"{sum(group.store.calls.values()):,}",
    ]
