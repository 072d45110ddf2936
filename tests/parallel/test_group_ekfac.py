"""EKFAC of several ranks' data, whose eigendecompositions they share out among them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from dense import relative_error
from group_cases import GROUP_CASES, check_same, part, sample_weights
from networks import CE, classes, randn, seeded
from processes import outcomes, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hesskern as hk
from hesskern.factors import eigenbases

NAMES = ["mlp", "joint", "conv groups", "mask", "routed"]


def _taken_apart(E: hk.EKFAC) -> dict[str, Tensor]:
    found = {"samples": torch.tensor(E.num_samples)}
    for name in E:
        left, right, _ = E[name].eigenbases
        found[f"{name} S"] = E[name].values
        for group, (u, v) in enumerate(zip(left, right, strict=True)):
            found[f"{name} U {group}"], found[f"{name} V {group}"] = u, v
    return found


def _settings(name: str) -> dict[str, Any]:
    return {"output": "exact", **GROUP_CASES[name].settings}


def _ekfac(group: Any, names: list[str]) -> Any:
    found = {}
    for name in names:
        case = GROUP_CASES[name]
        data = case.data()
        batches = data if group is None else part(data, group.rank(), group.size())
        weight = sample_weights(batches) if case.weights and batches else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            E = hk.ekfac(
                case.model(), batches, CE, sample_weight=weight, group=group, **_settings(name)
            )
        found[name] = _taken_apart(E), E.skipped, E.settings
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_the_curvature_of_all_data_in_bases_of_all_data(size: int) -> None:
    want, found = _ekfac(None, NAMES), run(_ekfac, size, NAMES, store="tcp")
    for name in NAMES:
        case = GROUP_CASES[name]
        data, given = case.data(), _settings(name)
        weight = sample_weights(data) if case.weights else None
        H = hk.layer_hessians(case.model(), data, CE, sample_weight=weight, **given)
        F = hk.kronecker_factors(case.model(), data, CE, sample_weight=weight, **given)
        for rank in range(size):
            tensors, *said = found[rank][name]
            check_same(tensors, found[0][name][0], 0)
            assert said == list(want[name][1:])
            assert tensors["samples"] == want[name][0]["samples"]
            assert [*tensors] == [*want[name][0]]
        for layer, f in F.items():
            groups = f.groups
            left, right = ([tensors[f"{layer} {s} {g}"] for g in range(groups)] for s in "UV")
            K = hk.CorrectedOperator.of_bases(
                left, right, tensors[f"{layer} S"], transposed=H[layer].transposed
            )
            exact = H[layer].diagonal_in(K)
            assert relative_error(tensors[f"{layer} S"], exact) <= 1e-11
            assert float(exact.sum()) == pytest.approx(H[layer].trace(), rel=1e-12)
            # Eigenvectors of the factors of all data: these are diagonal in them.
            covariance = f.input_covariance if groups > 1 else f.input_covariance[None]
            for g, (u, v) in enumerate(zip(left, right, strict=True)):
                step = len(u)
                rows = slice(g * step, (g + 1) * step)
                for matrix, basis in ((f.output_hessian[rows, rows], u), (covariance[g], v)):
                    turned = basis.T @ matrix.double() @ basis
                    off = turned - torch.diag(turned.diagonal())
                    assert float(off.norm()) <= 1e-11 * float(matrix.norm())


class _Loaders:
    """A data set, and loaders of parts of it."""

    def __init__(self) -> None:
        self.data = TensorDataset(randn(23, 5), classes(23, c=3))

    def __call__(self, group: Any) -> DataLoader[Any]:
        if group is None:
            return DataLoader(self.data, 7)
        own = range(group.rank(), 23, group.size())
        return DataLoader(Subset(self.data, own), 4)


def _drawn(group: Any) -> dict[str, Tensor]:
    model = seeded(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    loader = _Loaders()(group)
    # Bases that are the same however the sums were rounded.
    factors = hk.kronecker_factors(model, _Loaders()(None), CE)
    E = hk.ekfac(model, loader, CE, factors=factors, seed=3, group=group)
    K = hk.kronecker_factors(model, loader, CE, output="mc", seed=3, group=group)
    H = hk.layer_hessians(model, loader, CE, output="mc", seed=3, group=group)
    again = hk.layer_hessians(model, loader, CE, output="mc", seed=3, group=group, memory_budget=0)
    dense = {f"{n} H": layer.to_dense() for n, layer in H.items()}
    dense |= {f"{n} H again": layer.to_dense() for n, layer in again.items()}
    return {**_taken_apart(E), **{f"{n} M": K[n].output_hessian for n in K}, **dense}


def test_drawn_targets_are_those_of_one_process() -> None:
    want = _drawn(None)
    for found in run(_drawn, 3, store="tcp"):
        check_same(found, want, 1e-12)


def _work(group: Any) -> list[int]:
    done: list[int] = []
    decompose = eigenbases.eigenpairs

    def counted(matrices: Any, *given: Any) -> Any:
        done.extend(len(matrix) for matrix in matrices)
        return decompose(matrices, *given)

    eigenbases.eigenpairs = counted
    model = seeded(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)))
    hk.ekfac(model, [(randn(4, 12, seed=group.rank()), classes(4, c=3))], CE, group=group)
    return done


def test_every_matrix_is_decomposed_on_one_rank() -> None:
    found = run(_work, 2, store="tcp")
    assert found[0] == [12]
    assert sorted(found[1]) == [3, 9, 9]


def test_the_largest_are_shared_out_first() -> None:
    owners = eigenbases.shares([100] * 6 + [200, 10, 1], 3)
    work = [0, 0, 0]
    for size, owner in zip([100] * 6 + [200, 10, 1], owners, strict=True):
        work[owner] += size**3
    assert max(work) == 200**3
    assert eigenbases.shares([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert eigenbases.shares([], 2) == []


def _failing(group: Any, kind: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)))
    data: list[Any] = [(randn(4, 12, seed=group.rank()), classes(4, c=3))]
    given: dict[str, Any] = {}
    if kind == "decomposition" and group.rank() == 1:

        def broken(*_: Any) -> Any:
            raise ValueError("no eigendecomposition of the output Hessian of layer '0'")

        eigenbases.eigenpairs = broken
    elif kind == "factors":
        given["factors"] = hk.kronecker_factors(model, [(randn(4, 12), classes(4, c=3))], CE)
        if group.rank() == 1:
            given["factors"]["0"].output_hessian[0, 0] += 1.0
    elif kind == "second pass" and group.rank() == 1:
        data = _Worse(data)
    hk.ekfac(model, data, CE, group=group, seed=int(kind == "seed" and group.rank() == 1), **given)


class _Worse(list[Any]):
    """Data that hold NaN the second time."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        for x, y in list.__iter__(self):
            yield (x if self.passes == 1 else x * float("nan")), y


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("decomposition", "rank 1 of 2 failed in eigendecompositions: ValueError: no eigen"),
        ("factors", "EKFAC: the ranks differ. settings 'factors' 'E[M] of 0': "),
        ("second pass", "rank 1 of 2 failed in EKFAC: ValueError"),
        ("seed", "the ranks differ. settings 'seed': 0 on rank 0, 1 on rank 1"),
    ],
)
def test_what_fails_on_one_rank_is_told_on_all(kind: str, words: str) -> None:
    found = outcomes(_failing, 2, kind, store="tcp")
    assert found[0].message.startswith("RankError: ")
    assert words in found[0].message
    assert found[1].error is not None
