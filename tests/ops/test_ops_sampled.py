"""sampled_cross_entropy_gradient against the reference in float64, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import BF16, F16, F32, F64, random
from torch import Tensor

from hesskern import ops
from hesskern.ops import reference

TOLERANCE = {F32: 1e-6, F64: 1e-13, BF16: 4e-3, F16: 1e-3}


def uniforms(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=F64)


def in_layout(logits: Tensor, layout: str) -> Tensor:
    """The same values, classes side by side, positions (or samples) side by side, or apart."""
    if layout == "classes":
        return logits.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "positions":
        return logits.contiguous() if logits.dim() == 3 else logits.t().contiguous().t()
    return logits.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("layout", ["classes", "positions", "apart"])
@pytest.mark.parametrize("shape", [(7, 10), (1, 1), (9, 1, 3), (3, 33, 5), (2, 130, 3)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_against_the_reference(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    logits = in_layout(random(shape, dtype), layout)
    n, t = shape[0], math.prod(shape[2:])
    targets = torch.arange(n * t).reshape(n, *shape[2:]) % 3
    terms = torch.arange(n) % 4 + 1
    u = uniforms(2 * n * t)[::2]
    for more in ((), (targets, 1), (targets, -7, terms, 0.5), (None, -100, terms)):
        found = ops.sampled_cross_entropy_gradient(logits, u, *more)
        expected = reference.sampled_cross_entropy_gradient(logits.double(), u, *more)
        assert found.dtype == dtype
        assert found.stride() == torch.empty_like(logits).stride()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1 - 2**-53])
def test_classes_of_probability_zero_are_never_drawn(u: float) -> None:
    logits = random((6, 9), F32)
    logits[:, [0, 3, 8]] = -torch.inf
    logits[:, 7] = -200.0
    found = ops.sampled_cross_entropy_gradient(logits, torch.full((6,), u, dtype=F64))
    drawn = found.argmin(1)
    assert drawn.tolist() == [1 if u == 0 else 6] * 6
    assert bool((found[:, [0, 3, 7, 8]] == 0).all())


def test_the_frequencies_are_the_probabilities() -> None:
    logits = random((1, 5), F64)
    count = 4000
    u = (torch.arange(count).double() + 0.5) / count
    found = ops.sampled_cross_entropy_gradient(logits.expand(count, 5), u)
    frequencies = found.argmin(1).bincount(minlength=5) / count
    torch.testing.assert_close(frequencies.double(), logits.softmax(1)[0], rtol=0, atol=1 / count)


def test_huge_logits() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    found = ops.sampled_cross_entropy_gradient(logits, torch.tensor([0.9, 0.5], dtype=F64))
    expected = torch.tensor([[0.0, 0.0, 0.0], [1 / 3, -2 / 3, 1 / 3]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_logits_that_are_no_numbers(dtype: torch.dtype, bad: float) -> None:
    logits = random((3, 4, 2), dtype)
    logits[0, 1, 1] = logits[2, 3, 0] = bad
    targets = torch.zeros(3, 2).long()
    targets[2, 0] = -100
    found = ops.sampled_cross_entropy_gradient(logits, uniforms(6), targets)
    # A token's row is NaN as a whole, and no other one; a masked token has none.
    expected = torch.zeros(3, 4, 2, dtype=torch.bool)
    expected[0, :, 1] = True
    assert torch.equal(found.isnan(), expected)
    assert bool((found[2, :, 0] == 0).all())


def test_everything_ignored() -> None:
    logits, targets = random((4, 3), F32), torch.full((4,), 2)
    found = ops.sampled_cross_entropy_gradient(logits, uniforms(4), targets, 2)
    assert torch.equal(found, torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0), (2, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    count = shape[0] * math.prod(shape[2:])
    found = ops.sampled_cross_entropy_gradient(torch.zeros(shape), torch.zeros(count, dtype=F64))
    assert found.shape == shape


def test_logits_are_data() -> None:
    logits = random((4, 3), F32).requires_grad_()
    assert not ops.sampled_cross_entropy_gradient(logits, uniforms(4)).requires_grad


@pytest.mark.parametrize("gap", [10.0, 16.0, 20.0])
def test_a_class_that_is_nearly_certain_keeps_its_digits(gap: float) -> None:
    """p - 1 has none in float32; the other classes' sum has."""
    logits = torch.tensor([[gap, 0.0, 0.0]])
    u = torch.tensor([0.5], dtype=F64)
    found = ops.sampled_cross_entropy_gradient(logits, u)
    wide = ops.sampled_cross_entropy_gradient(logits.double(), u)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_classes_rarer_than_the_steps_of_float32_have_their_share(dtype: torch.dtype) -> None:
    """exp(-20) is a thirtieth of 2^-24: numbers in float32 would draw it always or never there."""
    rare = math.exp(-20.0)
    logits = torch.tensor([[-20.0, 0.0, -20.0]], dtype=dtype)
    total = 1 + 2 * rare
    shares = (torch.arange(100, dtype=F64) + 0.5) / 100
    # Evenly over the first class's share, and over what lies behind the second's.
    first = shares * 2 * rare / total
    behind = 1 - shares * 2 * rare / total
    drawn = [
        ops.sampled_cross_entropy_gradient(logits.expand(100, 3), u).argmin(1)
        for u in (first, behind)
    ]
    assert drawn[0].bincount(minlength=3).tolist() == [50, 50, 0]
    assert drawn[1].bincount(minlength=3).tolist() == [0, 50, 50]
