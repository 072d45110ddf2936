"""When two results of ``kronecker_factors`` are the same."""

from __future__ import annotations

import pytest
import torch
from dense import relative_error

import hesskern as hk

FACTORS = ("input_covariance", "output_hessian")


def assert_same(a: hk.Factors, b: hk.Factors, bound: float = 0.0) -> None:
    assert list(a) == list(b)
    for layer in a:
        for factor in FACTORS:
            x, y = getattr(a[layer], factor), getattr(b[layer], factor)
            assert torch.equal(x, y) if bound == 0 else relative_error(x, y) <= bound
        assert a[layer].num_samples == pytest.approx(b[layer].num_samples, rel=1e-12)
        assert a[layer].positions == pytest.approx(b[layer].positions, rel=1e-12)
        if a[layer].input_images is not None:
            x, y = a[layer].input_mean, b[layer].input_mean
            assert torch.equal(x, y) if bound == 0 else relative_error(x, y) <= bound
