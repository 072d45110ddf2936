"""Kronecker products are of symmetric factors."""

from __future__ import annotations

import pytest
import torch

import hesskern as hk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_that_are_not_symmetric_are_refused(dtype: torch.dtype) -> None:
    good, other = torch.eye(3, dtype=dtype), torch.eye(4, dtype=dtype)
    bad = other.clone()
    bad[0, 1] = 0.01
    with pytest.raises(ValueError, match=r"B must be symmetric, but .* differ by up to 0.01 \(lar"):
        hk.KroneckerOperator(good, bad)
    with pytest.raises(ValueError, match="A must be symmetric"):
        hk.KroneckerOperator(bad, good)
    with pytest.raises(ValueError, match="B must be symmetric"):
        hk.KroneckerOperator(other, torch.stack([other, bad]))
    with pytest.raises(ValueError, match="B must be symmetric"):
        hk.DiagonalKroneckerOperator(torch.ones(2, dtype=dtype), bad)
    with pytest.raises(ValueError, match=r"a must not be negative, got -1 in it"):
        hk.DiagonalKroneckerOperator(torch.tensor([1.0, -1.0], dtype=dtype), other)
    rounded = other + 2e-6 * torch.ones(4, 4, dtype=dtype).triu(1) * (dtype == torch.float32)
    hk.KroneckerOperator(good, rounded)
