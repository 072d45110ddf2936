"""The passes that are killed: each gives all bits of its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import hesskern as hk

__all__ = ["WAYS"]

CE = nn.CrossEntropyLoss()


def network() -> nn.Module:
    """A convolution and two linear layers, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            shape = parameter.shape
            values = torch.randn(shape, generator=generator)
            parameter.copy_(values / max(1, shape[-1]) ** 0.5)
    return model


def batches(count: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 1, 6, 6, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def factors(folder: Path, **how: Any) -> bytes:
    """Kronecker factors of drawn targets, with diagonals, from a loader that shuffles."""
    samples = [pair for x, y in batches(24, 4) for pair in zip(x, y, strict=True)]
    loader: Any = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)
    # Without a checkpoint the order is that of this seed; with one it is the file's that counts.
    torch.manual_seed(5)
    found = hk.kronecker_factors(
        network(), loader, CE, output="mc", bias="joint", diagonal=True, **how
    )
    return _saved(found, folder)


def ekfac(folder: Path, **how: Any) -> bytes:
    """EKFAC of drawn targets."""
    return _saved(hk.ekfac(network(), batches(10, 4), CE, **how), folder)


def influence(folder: Path, **how: Any) -> bytes:
    """Influence scores by layer; pieces and batches begin at different samples."""
    train, queries = batches(16, 5), batches(2, 2, seed=1)
    found = hk.influence(None, network(), queries, train, CE, per_layer=True, batch_size=3, **how)
    return _saved(found, folder)


def layer_hessians(folder: Path, **how: Any) -> bytes:
    """Products and diagonals of Hessians, one of whose layers exceeds the budget."""
    found = hk.layer_hessians(network(), batches(12, 4), CE, memory_budget=120_000, **how)
    tensors = {}
    for name, H in found.items():
        generator = torch.Generator().manual_seed(1)
        tensors[f"{name} product"] = (
            H @ torch.randn(H.shape[0], 2, generator=generator)
        ).contiguous()
        tensors[f"{name} diagonal"] = H.diagonal()
        tensors[f"{name} stored"] = torch.tensor(H.cached)
    return save(tensors)


def certify(folder: Path, **how: Any) -> bytes:
    """A certificate: its posterior, and the errors of its draws."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    terms = hk.pacbayes.Protocol(passes=20, sampling="networks")
    given = net, net, batches(6, 10)
    found = hk.pacbayes.certify(*given, epochs=6, protocol=terms, **how)
    # A user's to keep, or not.
    how["checkpoint"].unlink(missing_ok=True)
    numbers = torch.tensor([found.bound, found.kl, found.q, found.errors], dtype=torch.float64)
    return save({**found.tensors(), "numbers": numbers})


WAYS: dict[str, Callable[..., bytes]] = {
    "factors": factors,
    "ekfac": ekfac,
    "influence": influence,
    "layer_hessians": layer_hessians,
    "certify": certify,
}


def _saved(result: Any, folder: Path) -> bytes:
    # The library that writes it may leave a file when it is killed: not one of the pass.
    path = folder / "result-file" / "result.safetensors"
    path.parent.mkdir(exist_ok=True)
    result.save(path)
    return path.read_bytes()
