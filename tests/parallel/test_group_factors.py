"""Kronecker factors of several ranks' data are those of one process on all of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from group_cases import GROUP_CASES, check_same, factors_of, part, taken_apart
from processes import run
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*never reached:UserWarning")


def _factors(
    group: Any, names: list[str], dtype: torch.dtype
) -> dict[str, tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]]:
    torch.set_default_dtype(torch.float32)
    found = {}
    for name in names:
        case, batches = _cast(name, dtype)
        mine = batches if group is None else part(batches, group.rank(), group.size())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            factors = factors_of(case, mine, group)
        found[name] = taken_apart(factors), dict(factors.skipped), factors.settings
    return found


def _cast(name: str, dtype: torch.dtype) -> Any:
    case = GROUP_CASES[name]
    batches = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in case.data()]
    made = case.model
    case = type(case)(lambda: made().to(dtype), case.data, case.settings, case.weights)
    return case, batches


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_they_are_those_of_one_process(size: int, dtype: torch.dtype) -> None:
    names = list(GROUP_CASES)
    want = _factors(None, names, dtype)
    found = run(_factors, size, names, dtype)
    for name in names:
        tensors, skipped, settings = want[name]
        for rank in range(size):
            check_same(found[rank][name][0], tensors, 1e-12 if dtype == torch.float64 else 1e-6)
            check_same(found[rank][name][0], found[0][name][0], 0)
            assert found[rank][name][1:] == (skipped, settings)


def test_they_are_the_same_bits_in_every_run() -> None:
    names = ["joint", "conv groups"]
    first, again = (run(_factors, 2, names, torch.float32) for _ in range(2))
    for name in names:
        check_same(first[0][name][0], again[1][name][0], 0)
