"""Losses, targets and outputs that are refused, and what the errors say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LOSSES
from networks import Shaped, classes, randn, seeded
from torch import nn

import hesskern as hk


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(4)), NotImplementedError, "CrossEntropyLoss.weight"),
        (
            nn.BCEWithLogitsLoss(weight=torch.ones(4)),
            NotImplementedError,
            "BCEWithLogitsLoss.weight",
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)),
            NotImplementedError,
            "BCEWithLogitsLoss.pos_weight=....",
        ),
        (
            nn.CrossEntropyLoss(reduction="none"),
            ValueError,
            "reduction must be 'mean' or 'sum', got 'none'",
        ),
        (nn.MSELoss(reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        (nn.L1Loss(), TypeError, r"loss must be nn.CrossEntropyLoss\(\).*got L1Loss"),
        (nn.CrossEntropyLoss, TypeError, "loss must be .* got <class"),
        (F.cross_entropy, TypeError, "loss must be .* got <function cross_entropy"),
        ("cross_entropy", TypeError, "loss must be .* got 'cross_entropy'"),
        (None, TypeError, "loss must be .* got None"),
    ],
)
def test_refused_losses(loss: Any, error: type[Exception], message: str) -> None:
    model, data = seeded(Shaped((4,))), LOSSES["cross-entropy"].data()
    for call in (
        lambda: hk.kronecker_factors(model, data, loss),
        lambda: hk.layer_hessians(model, data, loss),
        lambda: hk.FactorAccumulator(model, loss),
        lambda: hk.AutogradHessian(model, data, loss, params=["a.weight"]),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "targets", "error", "message"),
    [
        ("cross-entropy", torch.tensor([0, 1, 4, 0, 0]), ValueError, r"lie in \[0, 4\).*found 4"),
        (
            "cross-entropy",
            torch.tensor([0, -1, 0, 0, 0]),
            ValueError,
            r"index=-100; found -1",
        ),
        (
            "cross-entropy",
            torch.zeros(4, dtype=torch.long),
            ValueError,
            r"must be \[5\], got \[4\]",
        ),
        ("cross-entropy", torch.zeros(5, 1, dtype=torch.long), ValueError, r"\[5\], got \[5, 1\]"),
        ("cross-entropy", torch.zeros(5, dtype=torch.int32), TypeError, "int64.*got torch.int32"),
        ("cross-entropy", torch.zeros(5, dtype=torch.bool), TypeError, "int64.*got torch.bool"),
        (
            "cross-entropy",
            torch.zeros(5).double(),
            ValueError,
            r"\[5, 4\] for .* got \[5\]",
        ),
        ("cross-entropy", torch.full((5, 4), 0.5).double(), ValueError, "sums from 2 to 2"),
        ("cross-entropy", torch.full((5, 4), torch.nan).double(), ValueError, "sum to one"),
        ("cross-entropy", [0, 1, 2, 3, 0], TypeError, "targets must be a tensor, got list"),
        ("tokens", torch.zeros(5, dtype=torch.long), ValueError, r"must be \[5, 4\], got \[5\]"),
        ("mse", torch.zeros(5).double(), ValueError, r"shape \[5, 4\] for MSELoss, got \[5\]"),
        ("mse", None, TypeError, "targets must be a tensor for MSELoss, got NoneType"),
        ("bce", torch.full((5, 4), 1.5).double(), ValueError, r"lie in \[0, 1\].*from 1.5 to 1.5"),
        ("bce", torch.full((5, 4), torch.nan).double(), ValueError, r"lie in \[0, 1\]"),
        ("bce", torch.zeros(5, 3).double(), ValueError, r"\[5, 4\] for BCEWithLogitsLoss, got"),
    ],
)
def test_targets_that_do_not_fit(
    name: str, targets: Any, error: type[Exception], message: str
) -> None:
    case = LOSSES[name]
    model = seeded(Shaped(case.shape))
    data = [(randn(5, 3), targets)]
    stream = hk.FactorAccumulator(model, case.loss)
    for call in (
        lambda: hk.kronecker_factors(model, data, case.loss),
        lambda: hk.layer_hessians(model, data, case.loss),
        lambda: stream.update(*data[0]),
        lambda: (
            hk.AutogradHessian(model, data, case.loss, params=["a.weight"])
            @ torch.ones(12).double()
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_outputs_without_a_class_axis() -> None:
    model = seeded(Shaped(()))
    with pytest.raises(ValueError, match=r"outputs must be \[N, c\].*got \[5\]"):
        hk.kronecker_factors(model, [(randn(5, 3), classes(5, c=2))], nn.CrossEntropyLoss())
