"""Losses of their own that ranks of a group bring: the same ones are, and others are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from group_cases import GROUP_CASES, check_same, part, taken_apart
from processes import outcomes, run
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes.loss_facts import loss_facts
from hesskern.passes.losses import resolve_loss

RANK = 0


@dataclass
class Settings:
    scale: float = 1.0


class Way(Enum):
    ONE = "one"
    OTHER = "other"


class Logger:
    """Something that is another one on every rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


class Scaled:
    """Rows that are the identity times what the attributes say."""

    def __init__(self, **given: Any) -> None:
        self.scale = 1.0
        self.device, self.place, self.logger = "cuda:0", torch.device("cuda", 0), Logger(0)
        self.__dict__.update(given)

    def output_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)


class OtherMethod(Scaled):
    def output_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().output_root(outputs, targets) / 2


class OfModules(nn.Module):
    def __init__(self, weight: float = 1.0, kind: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), kind())
        self.temperature = 1.0
        nn.init.constant_(self.inner[0].weight, weight)
        nn.init.zeros_(self.inner[0].bias)

    def output_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)


def _enclosing(scale: float) -> Callable[..., Tensor]:
    def root(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)

    return root


def _one(outputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    return scale * torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1) + RANK


def _two(outputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    return scale * torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1) - RANK


def _warmer() -> OfModules:
    loss = OfModules()
    loss.temperature = 2.0
    return loss


# The same, and others: what is said of the first difference is in the last.
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "class": (Scaled, lambda: OtherMethod(), "OtherMethod"),
    "constant": (Scaled, lambda: Scaled(scale=2.0), "2.0"),
    "tensor": (
        lambda: Scaled(matrix=torch.ones(2)),
        lambda: Scaled(matrix=torch.tensor([1.0, 1.0 + 2**-23])),
        "output_root.matrix",
    ),
    "in a list": (lambda: Scaled(all=[1, (2, 3)]), lambda: Scaled(all=[1, (2, 4)]), "4"),
    "in a mapping": (lambda: Scaled(all={"a": 1}), lambda: Scaled(all={"b": 1}), '"b"'),
    "settings": (lambda: Scaled(s=Settings()), lambda: Scaled(s=Settings(3.0)), "3.0"),
    "number of NumPy": (lambda: Scaled(s=np.float32(1)), lambda: Scaled(s=np.float32(7)), "7.0"),
    "member of an enum": (lambda: Scaled(s=Way.ONE), lambda: Scaled(s=Way.OTHER), "Way.OTHER"),
    "range": (lambda: Scaled(s=range(2)), lambda: Scaled(s=range(5)), "range(0, 5)"),
    "parameter": (OfModules, lambda: OfModules(2.0), "inner.0.weight"),
    "module": (OfModules, lambda: OfModules(kind=nn.Tanh), "Tanh"),
    "constant of a module": (OfModules, _warmer, "2.0"),
    "function": (lambda: _one, lambda: _two, "_two"),
    "enclosed": (lambda: _enclosing(1.0), lambda: _enclosing(2.0), "2.0"),
    "partial": (lambda: partial(_one, scale=1.0), lambda: partial(_one, scale=2.0), "2.0"),
}


def _facts(loss: Any) -> Any:
    known = isinstance(loss, nn.Module) or hasattr(loss, "output_root")
    resolved = resolve_loss(loss) if known else resolve_loss(None, loss)
    return json.loads(json.dumps(loss_facts(resolved)))


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_told_apart(name: str) -> None:
    same, other, word = OTHERS[name]
    first, second = _facts(same()), _facts(other())
    assert first == _facts(same())
    assert first != second
    assert word in json.dumps(second)


def test_what_may_differ_between_ranks() -> None:
    there = Scaled(device="cuda:1", place=torch.device("cuda", 1), logger=Logger(1))
    assert _facts(there) == _facts(Scaled())
    assert _facts(Scaled(device="cpu")) != _facts(Scaled())
    # One that holds itself comes to an end.
    around = Scaled()
    around.around = [around]
    assert _facts(around) == _facts(around)


def test_losses_of_torch_count_by_what_they_say() -> None:
    first, other = (
        _facts(nn.CrossEntropyLoss()),
        _facts(nn.CrossEntropyLoss(label_smoothing=0.1)),
    )
    assert first[0] == "_CrossEntropy"
    assert first != other


def _of_rank(group: Any, odd: bool) -> dict[str, Tensor]:
    rank = group.rank() if group else 0
    case = GROUP_CASES["mlp"]
    data = part(case.data(), rank, group.size()) if group else case.data()
    loss = Scaled(device=f"cuda:{rank}", logger=Logger(rank), scale=2.0 if odd and rank else 1.0)
    return taken_apart(hk.kronecker_factors(case.model(), data, loss, group=group))


def test_in_a_group() -> None:
    for outcome in outcomes(_of_rank, 2, True):
        assert "the ranks differ. loss 1 'output_root' 1 'scale': 1.0 on rank 0, 2.0 on rank 1" in (
            outcome.message
        )
    for found in run(_of_rank, 2, False):
        check_same(found, _of_rank(None, False), 1e-12)
