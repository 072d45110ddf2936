"""Rows of losses in half precision are rounded once, also where the mean is over many tokens."""

from __future__ import annotations

import math

import pytest
import torch
from networks import randn
from torch import Tensor, nn

import hesskern as hk
from hesskern.passes.losses import resolve_loss

HALF = [torch.float16, torch.bfloat16]
TOKENS = 3000


def targets_of(loss: nn.Module, shape: tuple[int, ...]) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.arange(math.prod(shape[2:])).remainder(shape[1]).reshape(1, *shape[2:])
    return torch.linspace(0, 1, math.prod(shape)).reshape(shape)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (nn.CrossEntropyLoss(), (1, 7, TOKENS)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), (1, 7, 60, 60)),
        (nn.MSELoss(), (1, 5000)),
        (nn.BCEWithLogitsLoss(), (1, 300, 20)),
    ],
    ids=["tokens", "pixels", "mse", "bce"],
)
def test_empirical_rows(loss: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Divided by the number of terms first, many gradients would be zero in float16."""
    targets = targets_of(loss, shape)
    curvature = resolve_loss(loss)
    outputs = (4 * randn(*shape)).to(dtype)
    rows = curvature.empirical(outputs, targets).row(0)
    assert rows.dtype == dtype
    expected = curvature.empirical(outputs.double(), targets).row(0)
    if dtype == torch.float16 and not isinstance(loss, nn.MSELoss):
        # Divided by all terms at first, some would be none.
        terms = math.prod(shape[1:] if isinstance(loss, nn.BCEWithLogitsLoss) else shape[2:])
        lost = expected / math.sqrt(terms)
        assert bool(((lost.abs() < 2.0**-25) & (rows != 0)).any())
    error = (rows.double() - expected).abs()
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0
    limit = (
        torch.finfo(dtype).eps / 2 * 1.001 * expected.abs()
        + 1e-6 * expected.abs()
        + smallest
        + 1e-8
    )
    assert bool((error <= limit).all())


@pytest.mark.parametrize("dtype", HALF)
def test_the_factor_of_a_head_over_many_tokens(dtype: torch.dtype) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 5, bias=False)
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).transpose(1, 2)

    x = randn(1, 20_000, 2)
    targets = torch.arange(20_000).remainder(5).unsqueeze(0)
    found, expected = (
        hk.kronecker_factors(
            Head().to(d), [(x.to(d), targets)], nn.CrossEntropyLoss(), output="empirical"
        )["head"].output_hessian.double()
        for d in (dtype, torch.float64)
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2 * float(expected.max()))


def test_a_custom_loss_gets_outputs_in_the_models_dtype() -> None:
    class Squares:
        def __init__(self) -> None:
            self.seen: list[torch.dtype] = []

        def output_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.diag_embed(torch.ones_like(outputs))

        def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.seen.append(outputs.dtype)
            return (outputs - targets).square().sum(1) / 2

    loss = Squares()
    model, x = nn.Linear(3, 2).half(), randn(4, 3).half()
    hk.kronecker_factors(model, [(x, torch.zeros(4, 2).half())], loss, output="empirical")
    assert loss.seen == [torch.float16]
