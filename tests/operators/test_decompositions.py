"""Eigendecompositions where LAPACK's float32 routine fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesskern as hk
from hesskern.operators.decompositions import eigenpairs


def without_result(narrow: torch.dtype | None) -> Any:
    """eigh that gives NaN for a dtype; None: for all."""
    eigh = torch.linalg.eigh

    def found(matrix: Tensor) -> Any:
        values, vectors = eigh(matrix)
        if narrow is None or matrix.dtype == narrow:
            return values.fill_(torch.nan), vectors.fill_(torch.nan)
        return values, vectors

    return found


@pytest.mark.parametrize("size", [5, 40])
def test_nan_in_float32_is_decomposed_in_float64(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.T
    expected = torch.linalg.eigvalsh(matrix.double())
    monkeypatch.setattr(torch.linalg, "eigh", without_result(torch.float32))
    ((values, vectors),) = eigenpairs([matrix], ["A"], "float32")
    torch.testing.assert_close(values, expected)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors * values.float() @ vectors.T, matrix, rtol=1e-4, atol=1e-4)


def test_nan_in_both_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", without_result(None))
    with pytest.raises(ValueError, match=r"no eigendecomposition of A .*NaN"):
        eigenpairs([torch.eye(40)], ["A"], "float32")


def test_ekfac_of_a_single_sample() -> None:
    # Factors of rank one: of some of these LAPACK gives NaN in float32.
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 4))
        data = [(torch.randn(1, 20), torch.zeros(1, dtype=torch.long))]
        found = hk.ekfac(model, data, nn.CrossEntropyLoss(), layers="2", output="empirical")
        rows = hk.layer_hessians(model, data, nn.CrossEntropyLoss(), "2", output="empirical")
        assert float(found["2"].values.sum()) == pytest.approx(rows["2"].trace(), rel=1e-4)
