"""Inner products of layer Hessians with Kronecker products, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import CASES, CE, classes, randn
from strategies import dtypes, seeds
from torch import Tensor

import hesskern as hk
from hesskern.operators.samples import SampleRows


def symmetric(*shape: int, seed: int) -> Tensor:
    """Indefinite, [..., n, n]."""
    matrix = randn(*shape, shape[-1], seed=seed)
    return matrix + matrix.mT


def random_product(H: hk.LayerHessian, seed: int = 0) -> hk.KroneckerOperator:
    m, d = H.layer_shape
    B = symmetric(d, seed=seed + 1) if H.groups == 1 else symmetric(H.groups, d, seed=seed + 1)
    return hk.KroneckerOperator(symmetric(m, seed=seed).to(H.dtype), B.to(H.dtype))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "joint"}, {"tolerance": 0.2}, {"memory_budget": 0}],
    ids=["cached", "joint", "pruned", "rerun"],
)
@pytest.mark.parametrize(
    "name",
    ["relu", "residual", "sequence", "conv stride", "conv groups", "conv 1x1", "twice"],
)
@pytest.mark.filterwarnings("ignore:the Gauss-Newton block:UserWarning")
def test_inner_of_networks(name: str, options: dict[str, Any]) -> None:
    case = CASES[name]
    hessians = hk.layer_hessians(case.model(), case.data(), CE, **options)
    for H in hessians.values():
        assert H.cached == ("memory_budget" not in options)
        K = random_product(H)
        expected = float((H.to_dense() * K.to_dense()).sum())
        scale = float(H.to_dense().norm() * K.to_dense().norm())
        assert abs(H.inner(K) - expected) <= 1e-12 * scale
        assert K.squared_norm() == pytest.approx(float(K.to_dense().square().sum()), rel=1e-12)


def test_inner_of_a_single_sample_is_that_of_its_factors() -> None:
    case = CASES["relu"]
    data = [(case.inputs(1, 1), classes(1, c=3))]
    H = hk.layer_hessians(case.model(), data, CE)["0"]
    K = hk.kronecker_factors(case.model(), data, CE)["0"].operator()
    assert H.inner(K) == pytest.approx(K.squared_norm(), rel=1e-12)


# Shapes on both sides of the choice between rows and Gram matrices of positions.
@given(
    n=st.integers(0, 5), c=st.integers(1, 4), m=st.integers(1, 6), d=st.integers(1, 7),
    t=st.none() | st.integers(1, 9), dtype=dtypes, seed=seeds,
)  # fmt: skip
def test_inner_of_sample_rows(
    n: int, c: int, m: int, d: int, t: int | None, dtype: torch.dtype, seed: int
) -> None:
    tail = () if t is None else (t,)
    rows = SampleRows(
        randn(n, d, *tail, seed=seed).to(dtype), randn(n, c, m, *tail, seed=seed + 1).to(dtype)
    )
    K = hk.KroneckerOperator(symmetric(m, seed=seed).to(dtype), symmetric(d, seed=seed).to(dtype))
    x, s = rows.x.double(), rows.s.double()
    R = torch.einsum("ncmt,ndt->ncmd", s if t else s.unsqueeze(3), x if t else x.unsqueeze(2))
    images = torch.einsum("ij,ncjl,lk->ncik", K.A.double(), R, K.B.double())
    scale = float(R.square().sum()) * float(K.A.double().norm() * K.B.double().norm())
    limit = 1e-5 if dtype == torch.float32 else 1e-13
    assert abs(rows.inner(K) - float((R * images).sum())) <= limit * scale


@pytest.mark.parametrize(
    ("shape", "form"),
    [((2, 1, 3, 2, 20), "rows"), ((2, 30, 2, 2, 40), "rows"), ((2, 9, 16, 32, 2), "gram")],
)
def test_both_ways_with_positions(shape: tuple[int, ...], form: str) -> None:
    n, c, m, d, t = shape
    rows = SampleRows(randn(n, d, t), randn(n, c, m, t, seed=1))
    K = hk.KroneckerOperator(symmetric(m, seed=2), symmetric(d, seed=3))
    assert rows._rows_are_cheaper() == (form == "rows")
    R = torch.einsum("ncmt,ndt->ncmd", rows.s, rows.x)
    expected = float((R * torch.einsum("ij,ncjl,lk->ncik", K.A, R, K.B)).sum())
    assert rows.inner(K) == pytest.approx(expected, rel=1e-11)


def test_inner_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SampleRows(randn(50, 6), randn(50, 2, 3, seed=1))
    K = hk.KroneckerOperator(symmetric(3, seed=2), symmetric(6, seed=3))
    whole = rows.inner(K)
    monkeypatch.setattr("hesskern.operators.samples._INNER_BYTES", 700)
    assert rows.inner(K) == pytest.approx(whole, rel=1e-12)


def test_inner_bad_arguments() -> None:
    case = CASES["conv groups"]
    H = hk.layer_hessians(case.model(), case.data(), CE)["0"]
    K = random_product(H)
    with pytest.raises(TypeError, match="K must be a KroneckerOperator, got LayerHessian"):
        H.inner(H)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"K must be of shape .* with groups=2, got .* groups=1"):
        H.inner(hk.KroneckerOperator(K.A, K.B[0]))
    with pytest.raises(ValueError, match=r"K must be torch.float64 on cpu, got torch.float32"):
        H.inner(hk.KroneckerOperator(K.A.float(), K.B.float()))
