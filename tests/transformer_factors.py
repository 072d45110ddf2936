"""Factors of native models as their tests make them, and when two results are the same."""

from __future__ import annotations

from typing import Any

import torch
from token_loop import SAMPLES, SEED
from torch import nn

import hesskern as hk


def factors_of(model: nn.Module, data: Any, loss: Any, output: str, **more: Any) -> hk.Factors:
    return hk.kronecker_factors(
        model, data, loss, output=output, mc_samples=SAMPLES, seed=SEED, **more
    )


def same(one: hk.Factors, other: hk.Factors) -> None:
    assert list(one) == list(other)
    for name in one:
        for attribute in ("input_covariance", "output_hessian"):
            torch.testing.assert_close(
                getattr(one[name], attribute), getattr(other[name], attribute), rtol=0, atol=0
            )
