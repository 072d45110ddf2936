"""Digests tell apart what gives other numbers, and agree on what does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from hesskern.digests import digest, module_facts

LIMIT = 0
SCALE = torch.ones(2)


def limited(x: Any, limit: int = 0) -> Any:
    return x > limit


def by_module(x: Any) -> Any:
    return x > LIMIT


def by_tensor(x: Any) -> Any:
    return x * SCALE


def helper(x: Any) -> Any:
    return by_module(x)


class Slotted:
    __slots__ = ("limit",)

    def __init__(self, limit: int) -> None:
        self.limit = limit


class Behind(Slotted):
    """Has a dictionary besides."""


@pytest.mark.parametrize(
    "make",
    [
        lambda i: partial(limited, limit=i),
        lambda i: partial(limited, i),
        lambda i: partial((limited, by_module)[i]),
        Slotted,
        Behind,
        lambda i: lambda x: x > i,
        lambda i: {"a": [torch.tensor(i)]},
    ],
    ids=["keyword", "argument", "function", "slots", "slots behind", "closure", "nested"],
)
def test_of_two_values(make: Callable[[int], Any]) -> None:
    assert digest(make(0)) == digest(make(0))
    assert digest(make(0)) != digest(make(1))


@pytest.mark.parametrize("function", [by_module, helper, lambda x: [by_module(y) for y in x]])
def test_of_a_value_of_the_module(
    function: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(function)
    monkeypatch.setitem(globals(), "LIMIT", 1)
    assert digest(function) != before
    monkeypatch.setitem(globals(), "LIMIT", 0)
    assert digest(function) == before


def test_of_a_tensor_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(by_tensor)
    monkeypatch.setitem(globals(), "SCALE", torch.zeros(2))
    assert digest(by_tensor) != before


class Named(nn.Module):
    """Says where it is."""

    def extra_repr(self) -> str:
        return f"at {hex(id(self))}"


def test_modules() -> None:
    first, again = (module_facts(nn.Sequential(nn.ELU(0.5), Named())) for _ in range(2))
    assert first == again
    assert list(first) == ["", "0", "1"]
    assert first["0"] == ["torch.nn.modules.activation.ELU", "alpha=0.5"]
