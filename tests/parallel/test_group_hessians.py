"""Layer Hessians of several ranks' data are those of one process on all of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from group_cases import GROUP_CASES, GroupCase, check_same, part, sample_weights
from networks import CE, randn
from processes import run
from torch import Tensor

import hesskern as hk

NAMES = ["mlp", "joint", "empirical", "conv groups", "sizes", "mask", "routed"]


def cast(name: str, dtype: torch.dtype) -> tuple[GroupCase, list[Any]]:
    """A case and its batches, in one precision."""
    case = GROUP_CASES[name]
    return case, [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in case.data()]


def mine(batches: list[Any], group: Any) -> list[Any]:
    return batches if group is None else part(batches, group.rank(), group.size())


def hessians(name: str, dtype: torch.dtype, group: Any, **settings: Any) -> hk.LayerHessians:
    case, batches = cast(name, dtype)
    batches = mine(batches, group)
    weight = sample_weights(batches) if case.weights and batches else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hk.layer_hessians(
            case.model().to(dtype),
            batches,
            CE,
            sample_weight=weight,
            group=group,
            **{**case.settings, **settings},
        )


def numbers(name: str, found: hk.LayerHessians) -> dict[str, Tensor]:
    """All that a layer's Hessian can be asked for."""
    tensors = {}
    for layer, H in found.items():
        m, d = H.layer_shape
        A, B = (randn(n, n, seed=n).to(H.dtype) for n in (m, d))
        tensors[f"{layer} dense"] = H.to_dense()
        tensors[f"{layer} block"] = H @ randn(m * d, 3, seed=1).to(H.dtype)
        tensors[f"{layer} vector"] = H @ randn(m * d, seed=2).to(H.dtype)
        tensors[f"{layer} diagonal"] = H.diagonal()
        tensors[f"{layer} inputs"] = H.contract_inputs(B @ B.T)
        tensors[f"{layer} outputs"] = H.contract_outputs(A @ A.T)
        values = [H.trace(), H.num_samples, H.pruning_error, H.pruned_trace]
        if H.groups == 1 and not H.transposed:
            K = hk.KroneckerOperator(A @ A.T, B @ B.T)
            values.append(H.inner(K))
            tensors[f"{layer} in eigenbasis"] = H.diagonal_in(K)
        tensors[f"{layer} numbers"] = torch.tensor(values, dtype=H.dtype)
    return tensors


def known(found: hk.LayerHessians) -> Any:
    return found.skipped, {n: (H.checked, H.inexact_reason, str(H.dtype)) for n, H in found.items()}


def _all(group: Any, names: list[str], dtype: torch.dtype, settings: dict[str, Any]) -> Any:
    found = {name: hessians(name, dtype, group, **settings) for name in names}
    return {name: (numbers(name, H), known(H)) for name, H in found.items()}


def _check(size: int, dtype: torch.dtype, names: list[str], **settings: Any) -> None:
    want = _all(None, names, dtype, settings)
    found = run(_all, size, names, dtype, settings, store="tcp")
    for name in names:
        for rank in range(size):
            check_same(found[rank][name][0], want[name][0], 1e-12 if dtype.itemsize > 4 else 2e-6)
            check_same(found[rank][name][0], found[0][name][0], 0)
            assert found[rank][name][1] == want[name][1]


@pytest.mark.parametrize("size", [2, 4])
def test_they_are_those_of_one_process(size: int) -> None:
    _check(size, torch.float64, NAMES)


def test_they_are_so_in_float32() -> None:
    _check(2, torch.float32, ["mlp", "conv groups"])


def test_they_are_so_where_the_model_runs_again() -> None:
    _check(4, torch.float64, ["joint", "conv groups"], memory_budget=0)
