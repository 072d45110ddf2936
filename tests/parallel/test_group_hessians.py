"""Layer Hessians of several ranks' data are those of one process on all of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from group_cases import GROUP_CASES, GroupCase, check_same, part, sample_weights
from networks import CE, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn

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


def _pruned(group: Any, tolerance: float) -> dict[str, Tensor]:
    found = {}
    ways: dict[str, dict[str, Any]] = {
        # Single inputs; rows stored whole, of which single ones go; whole samples, run again.
        "mlp": {},
        "conv groups": {},
        "joint": {"memory_budget": 0},
    }
    for name, given in ways.items():
        H = hessians(name, torch.float64, group, tolerance=tolerance, **given)
        found |= {f"{name} {k}": tensor for k, tensor in numbers(name, H).items()}
    if group is not None and group.rank() == 0:
        # This rank alone keeps its samples.
        given = {"memory_budget": 2**30}
    else:
        given = {"memory_budget": 0}
    for layer, H in hessians("mlp", torch.float64, group, tolerance=tolerance, **given).items():
        found[f"mixed {layer}"] = H.to_dense()
        found[f"mixed {layer} error"] = torch.tensor(H.pruning_error)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_samples_are_pruned(size: int) -> None:
    want = _pruned(None, 0.05)
    whole = hessians("mlp", torch.float64, None)
    for found in run(_pruned, size, 0.05, store="tcp"):
        check_same(found, want, 1e-11)
        for layer, H in whole.items():
            pruned, error = found[f"mlp {layer} dense"], float(found[f"mlp {layer} numbers"][2])
            gap = torch.linalg.eigvalsh(H.to_dense() - pruned)
            assert 0 < error <= 0.05 * H.trace()
            assert float(gap[0]) >= -1e-12
            assert float(gap[-1]) <= error * (1 + 1e-9)


class _Bad(list[Any]):
    """Data whose batches hold NaN, or come in another order, from the second pass on."""

    passes = 0

    def __init__(self, batches: list[Any], kind: str) -> None:
        super().__init__(batches)
        self.kind = kind

    def __iter__(self) -> Any:
        self.passes += 1
        given = list(list.__iter__(self))
        if self.passes > 1 and self.kind == "order":
            given.reverse()
        for x, y in given:
            bad = self.passes > 1 and self.kind == "NaN"
            yield (x * torch.nan if bad else x), y


def _failing(group: Any, kind: str) -> None:
    case, batches = cast("mlp", torch.float64)
    batches, bad = mine(batches, group), group.rank() == 1
    model, given = case.model(), {}
    if kind == "model" and bad:
        model[0].weight.data[0, 0] += 1
    if kind == "first pass" and bad:
        batches[0][0][0, 0] = torch.nan
    if kind in ("NaN", "order"):
        batches = _Bad(batches, kind) if bad else batches
        given = {"memory_budget": 0, "tolerance": 0.01 if kind == "order" else 0.0}
    if kind == "nothing":
        batches = []
    H = hk.layer_hessians(model, batches, CE, "2", group=group, **given)["2"]
    if kind == "changed" and bad:
        # On this rank alone.
        H._chunks = None
    if kind == "vectors":
        H @ randn(H.shape[0], seed=group.rank())
    elif kind == "length":
        H @ randn(H.shape[0] + bad)
    else:
        hk.eigsh(H, 3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("model", "layer Hessians: the ranks differ. checksums of values '0.weight'"),
        ("first pass", "rank 1 of 2 failed in layer Hessians: ValueError"),
        ("NaN", "rank 1 of 2 failed in the Hessian of layer '2': ValueError"),
        ("order", "rank 1 of 2 failed in the Hessian of layer '2': RuntimeError: data must come"),
        ("changed", "rank 1 of 2 failed in the Hessian of layer '2'"),
        ("vectors", "a product with the Hessian of layer '2': the ranks differ. checksums of"),
        ("length", "rank 1 of 2 failed in a product with the Hessian of layer '2': ValueError: ve"),
    ],
)
def test_what_fails_on_one_rank_is_told_on_all(kind: str, words: str) -> None:
    first, second = outcomes(_failing, 2, kind, store="tcp")
    assert words in first.message
    assert first.message.startswith("RankError: ")
    assert second.error is not None
    assert second.error[0] == ("RankError" if kind in ("model", "vectors") else second.error[0])


def test_no_samples_on_any_rank() -> None:
    for outcome in outcomes(_failing, 2, "nothing", store="tcp"):
        assert outcome.message.startswith("ValueError: data yielded no samples")


class _Coupled(nn.Module):
    """Its first layer acts on each sample alone where there are few, and on their mean beyond."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if len(x) > 3:
            y = y + self.first(x).mean(0)
        return self.last(torch.relu(y))


def _unfit(group: Any) -> Any:
    n = 3 if group.rank() == 0 else 5
    data = [(randn(n, 4, seed=group.rank()), classes(n, c=3))]
    model = seeded(_Coupled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = hk.layer_hessians(model, data, CE, group=group)
        G = hk.GaussNewton(model, data, CE, group=group)
        E = hk.ekfac(model, data, CE, group=group)
    return list(found), found.skipped, list(G.layer_shapes), G.to_dense(), list(E)


def test_a_layer_that_is_unfit_on_one_rank_is_left_out_on_all() -> None:
    first, second = run(_unfit, 2, store="tcp")
    assert first[0] == first[2] == first[4] == ["last"]
    assert "first" in first[1]
    assert first[:3] == second[:3]
    assert torch.equal(first[3], second[3])


def _gauss_newton(group: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for name, budget in (("mlp", None), ("joint", 0), ("sizes", None), ("routed", 0)):
        case, batches = cast(name, dtype)
        batches = mine(batches, group)
        weight = sample_weights(batches) if case.weights and batches else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            G = hk.GaussNewton(
                case.model().to(dtype),
                batches,
                CE,
                sample_weight=weight,
                memory_budget=budget,
                group=group,
                **case.settings,
            )
        size = G.shape[0]
        found[f"{name} dense"] = G.to_dense()
        found[f"{name} block"] = G @ randn(size, 2, seed=1).to(dtype)
        found[f"{name} diagonal"] = G.diagonal()
        found[f"{name} numbers"] = torch.tensor([G.trace(), G.num_samples], dtype=dtype)
        found[f"{name} largest"] = hk.eigsh(G, 2, tol=1e-9 if dtype.itemsize > 4 else 1e-4).values
        if name in ("mlp", "joint"):
            stacked = G.stacked()
            found[f"{name} stacked"] = stacked @ randn(size, seed=2).to(dtype)
    return found


def test_the_gauss_newton_matrix_is_that_of_one_process() -> None:
    want = _gauss_newton(None, torch.float64)
    for found in run(_gauss_newton, 3, torch.float64, store="tcp"):
        check_same(found, want, 1e-12)
