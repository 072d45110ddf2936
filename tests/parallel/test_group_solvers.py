"""Eigenpairs, spectra and traces of Hessians whose samples lie on several ranks."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from group_cases import check_same, part
from networks import CE, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn

import hesskern as hk


def _wide() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 4)))


def _data() -> list[Any]:
    return [(randn(n, 30, seed=n), classes(n, c=4, seed=n)) for n in (9, 14, 3, 20, 11, 8)]


def _hessian(group: Any, dtype: torch.dtype = torch.float64) -> hk.LayerHessian:
    data = [(x.to(dtype), y) for x, y in _data()]
    batches = data if group is None else part(data, group.rank(), group.size())
    return hk.layer_hessians(_wide().to(dtype), batches, CE, "0", group=group)["0"]


def _near(H: hk.LayerHessian) -> hk.KroneckerOperator:
    return hk.nearest_kronecker(H)


def _solved(group: Any) -> dict[str, Tensor]:
    H = _hessian(group)
    found = {}
    ways: dict[str, dict[str, Any]] = {
        "largest": {"k": 5},
        "with restarts": {"k": 30, "tol": 1e-8},
        "near": {"k": 4, "start": _near(H)},
        "block": {"k": 6, "block": 3},
    }
    for name, given in ways.items():
        result = hk.eigsh(H, **given)
        found[f"{name} values"], found[f"{name} vectors"] = result.values, result.vectors
        numbers = [float(result.converged), float(result.matvecs)]
        found[f"{name} numbers"] = torch.tensor(numbers)
    density = hk.spectral_density(H, 20, 3)
    found["density"] = torch.stack([density.nodes, density.weights])
    trace = hk.hutchpp_trace(H, 30)
    found["trace"] = torch.tensor([trace.value, trace.error])
    # An operator of which a part alone is of the ranks.
    found["difference"] = hk.eigsh(H - _near(H), 3, "LM", tol=1e-9).values
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_find_what_one_process_finds(size: int) -> None:
    want = _solved(None)
    found = run(_solved, size, store="tcp")
    dense = _hessian(None).to_dense()
    exact = torch.linalg.eigvalsh(dense).flip(0)
    for tensors in found:
        check_same(tensors, found[0], 0)
        for name, values in tensors.items():
            if name.endswith(" values"):
                assert torch.allclose(values, exact[: len(values)], rtol=0, atol=1e-4 * exact[0])
        for way in ("largest", "with restarts"):
            vectors, values = tensors[f"{way} vectors"], tensors[f"{way} values"]
            assert float((dense @ vectors - vectors * values).norm(dim=0).max()) <= 1e-4 * exact[0]
        for name in ("density", "trace", "difference"):
            assert torch.allclose(tensors[name], want[name], rtol=1e-6, atol=1e-8)


class _Own:
    """An operator of one's own, whose products are the same on every rank but the last."""

    def __init__(self, matrix: Tensor, wrong: int) -> None:
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self._matrix, self._wrong = matrix, wrong

    def __matmul__(self, v: Tensor) -> Tensor:
        self._wrong -= 1
        return self._matrix @ v * (1.0 + 1e-15 * (self._wrong == 0))


def _matrix() -> Tensor:
    root = randn(400, 400)
    return root @ root.T


def _apart(group: Any, at: int) -> None:
    wrong = at if group.rank() == 1 else -1
    hk.eigsh(_Own(_matrix(), wrong), 40, tol=1e-9, group=group)


@pytest.mark.parametrize(("at", "where"), [(20, "eigsh at restart 1"), (10**9, None)])
def test_ranks_that_come_apart_are_told_at_a_restart(at: int, where: str | None) -> None:
    for outcome in outcomes(_apart, 2, at, store="tcp"):
        if where is None:
            assert outcome.error is None
        else:
            assert outcome.message.startswith(f"RankError: {where}, which all ranks run alike")
            assert "on rank 0" in outcome.message
            assert "on rank 1" in outcome.message


def _arguments(group: Any, name: str) -> None:
    H, other = _hessian(group), group.rank() == 1
    if name == "seed":
        hk.eigsh(H, 3, seed=int(other))
    elif name == "start":
        hk.eigsh(H, 3, start=randn(300, 2, seed=int(other)))
    elif name == "vectors":
        H @ randn(300, seed=int(other))
    elif name == "steps":
        hk.spectral_density(H, 10 + other)
    elif name == "products":
        hk.hutchpp_trace(H, 10 + other)
    else:
        hk.eigsh(H, 10**6 if other else 3)


@pytest.mark.parametrize("name", ["seed", "start", "vectors", "steps", "products"])
def test_other_arguments_on_one_rank_are_refused_on_all(name: str) -> None:
    for outcome in outcomes(_arguments, 2, name, store="tcp"):
        assert outcome.message.startswith("RankError: ")
        assert "the ranks differ" in outcome.message
        assert name in outcome.message
        assert "on rank 1" in outcome.message


def test_an_argument_that_one_rank_alone_refuses() -> None:
    first, second = outcomes(_arguments, 2, "k", store="tcp")
    assert second.message == "ValueError: k must be an integer with 1 <= k <= P = 300, got 1000000"
    assert first.message == f"RankError: rank 1 of 2 failed in eigsh: {second.message}"


def _killed(group: Any) -> None:
    H = _hessian(group)
    if group.rank() == 1:
        product, left = H._matmul, [5]

        def fatal(block: Tensor) -> Tensor:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return product(block)

        H._matmul = fatal
    hk.eigsh(H, 5)


def test_a_rank_that_is_killed_in_a_search_is_named() -> None:
    first, second = outcomes(_killed, 2, timeout=5.0, store="tcp")
    assert second.exitcode == -signal.SIGKILL
    assert first.message.startswith("RankError: rank 1 of 2 did not get to a product with the")
