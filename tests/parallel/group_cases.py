"""Models with data for several ranks, and results taken apart into tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from dense import relative_error
from networks import CASES, CE, Routed, SharedOverPositions, classes, randn, seeded
from torch import Tensor, nn

import hesskern as hk

__all__ = ["GROUP_CASES", "GroupCase", "check_same", "part", "taken_apart"]


@dataclass
class GroupCase:
    """A call of ``kronecker_factors`` on batches that ranks share among them.

    Attributes:
        model: makes it.
        data: batches (inputs, targets).
        settings: other arguments.
        weights: whether samples have weights.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], list[Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    weights: bool = False


class Tokens(nn.Module):
    """An embedding, a norm, and a head over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.norm(self.embed(x)))).mean(1))


def _mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(5, 70), nn.ReLU(), nn.Linear(70, 6), nn.Linear(6, 3)))


def _flat() -> list[Any]:
    sizes = (4, 3, 5, 2, 1, 4, 3)
    return [(randn(n, 5, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate(sizes)]


def _images(*shape: int) -> Callable[[], list[Any]]:
    return lambda: [
        (randn(n, *shape, seed=i), classes(n, c=3, seed=i)) for i, n in enumerate((3, 2, 4, 1, 2))
    ]


def _sizes() -> list[Any]:
    """Images of one size on the first batches, of another on the last ones."""
    return [(randn(2, 2, 4 + 2 * (i > 2), 6, seed=i), classes(2, c=3, seed=i)) for i in range(5)]


def _tokens() -> list[Any]:
    return [
        (torch.randint(0, 11, (n, 5), generator=torch.Generator().manual_seed(i)), classes(n, c=3))
        for i, n in enumerate((3, 2, 4, 1, 2))
    ]


def _routes() -> list[Any]:
    """The first batches go to one expert, the others to the other."""
    found = []
    for i in range(5):
        x = randn(3, 4, seed=i)
        x[0, 0] = 1.0 if i < 3 else -1.0
        found.append((x, classes(3, c=3, seed=i)))
    return found


def _mask(inputs: Tensor) -> Tensor:
    """[N, 5]: a few positions, by the tokens themselves."""
    mask = inputs % 3 > 0
    mask[:, 0] = True
    return mask


GROUP_CASES = {
    "mlp": GroupCase(_mlp, _flat),
    "joint": GroupCase(_mlp, _flat, {"bias": "joint"}, weights=True),
    "empirical": GroupCase(_mlp, _flat, {"output": "empirical"}),
    "large": GroupCase(_mlp, _flat, {"max_outputs": 5, "diagonal": True}),
    "conv groups": GroupCase(
        lambda: seeded(CASES["conv groups"].model()), _images(4, 4, 4), {"bias": "joint"}
    ),
    "sizes": GroupCase(lambda: seeded(SharedOverPositions()), _sizes),
    "diagonal": GroupCase(lambda: seeded(Tokens()), _tokens, {"diagonal": True}, weights=True),
    "mask": GroupCase(lambda: seeded(Tokens()), _tokens, {"position_mask": _mask}),
    "routed": GroupCase(lambda: seeded(Routed()), _routes),
}


def sample_weights(batches: list[Any]) -> Tensor:
    """[total samples] of the batches, by what is in them."""
    return torch.cat([x.double().flatten(1).mean(1).sin().add(1.5) for x, _ in batches])


def part(batches: list[Any], rank: int, size: int) -> list[Any]:
    """Uneven parts: the last of three or more ranks has nothing."""
    if size > 2:
        if rank == size - 1:
            return []
        size -= 1
    begin = [-(-len(batches) * r // size) for r in range(size + 1)]
    return batches[begin[rank] : begin[rank + 1]]


def factors_of(case: GroupCase, batches: list[Any], group: Any = None, **more: Any) -> hk.Factors:
    weight = sample_weights(batches) if case.weights and batches else None
    return hk.kronecker_factors(
        case.model(), batches, CE, sample_weight=weight, group=group, **case.settings, **more
    )


def taken_apart(factors: hk.Factors) -> dict[str, Tensor]:
    """Every number of a result."""
    found = {"samples": torch.tensor(factors.num_samples, dtype=torch.float64)}
    for name, f in factors.items():
        found[f"{name} inputs"], found[f"{name} outputs"] = f.input_covariance, f.output_hessian
        found[f"{name} positions"] = torch.tensor(f.positions, dtype=torch.float64)
        for i, image in enumerate(f.input_images or ()):
            found[f"{name} image {i}"] = image
    for name, g in factors.large.items():
        found[f"{name} inputs"], found[f"{name} diagonal"] = g.input_covariance, g.output_diagonal
        found[f"{name} positions"] = torch.tensor(g.positions, dtype=torch.float64)
    found.update({f"diagonal of {name}": d for name, d in factors.diagonals.items()})
    return found


def check_same(found: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """The same tensors: to a relative error, or to the bit where the bound is zero."""
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        if bound == 0:
            assert torch.equal(found[name], tensor), name
        elif tensor.any() or found[name].any():
            assert relative_error(found[name], tensor) <= bound, name
